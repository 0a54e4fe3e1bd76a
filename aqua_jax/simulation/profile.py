"""Measures an engine on batch shapes that tell its costs apart, and makes a machine of it. No jax.

Each load is chosen for what it varies: numbers of decodes at several contexts, prompts of several
lengths, both in one step, and, where the engine has stores, more requests than the pool holds.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from typing import Any, Protocol

from aqua_jax.bench.workloads import random_prompt
from aqua_jax.config import SamplingParams
from aqua_jax.errors import ConfigError
from aqua_jax.scheduling.plan import Plan
from aqua_jax.simulation.cost import StepCost
from aqua_jax.simulation.fit import Fit, fit_line
from aqua_jax.simulation.work import Work, work_of

_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_CONTEXTS = (24, 200, 700, 1500)
_DECODES = 12  # steps of each batch
_MIXED = 40  # requests of the mixed load
_PAGED = 3  # times the pool, where there are stores


class RecordedEngineLike(Protocol):
    """`engine.recorder.RecordedEngine`, or a test's."""

    limits: dict[str, Any]
    observe: Any
    max_model_len: int

    @property
    def page_bytes(self) -> int:
        """Of a page of keys and values."""

    def add_request(self, request_id: str, prompt: Any, params: SamplingParams) -> None:
        """Accepts a request."""

    def step(self) -> Any:
        """Runs one step."""

    def has_unfinished(self) -> bool:
        """Whether another step may bring outputs."""

    def stats(self) -> dict[str, Any]:
        """Counters."""


@dataclasses.dataclass(frozen=True)
class Planned:
    """A request of a load: sent before step `after`, with random ids."""

    after: int
    prompt: int
    output: int


def designed_loads(limits: dict[str, Any], longest: int, seed: int) -> list[list[Planned]]:
    """The loads for an engine of these limits, the longest sequence being `longest` tokens."""
    pool = limits["num_pages"] * limits["page_tokens"]
    most = limits["config"]["max_num_seqs"]
    loads: list[list[Planned]] = []
    for context in _CONTEXTS:
        for batch in _BATCHES:
            whole = context + _DECODES + limits["page_tokens"]
            if whole <= longest and batch <= most and batch * whole <= pool:
                loads.append([Planned(0, context, _DECODES)] * batch)
    draw = random.Random(seed)
    room = max(2, min(longest, pool // 8))
    mixed = []
    for number in range(_MIXED):
        prompt = draw.randrange(1, max(2, room * 3 // 4))
        mixed.append(Planned(3 * number, prompt, draw.randrange(1, max(2, room // 4))))
    loads.append(mixed)
    if limits["stores"]:
        prompt, output = max(1, room // 4), max(2, room // 3)
        loads.append([Planned(0, prompt, output)] * (_PAGED * pool // (prompt + output)))
    return loads


def record(
    engine: RecordedEngineLike, vocab: int, rounds: int, seed: int
) -> list[tuple[Work, float]]:
    """Runs all loads `rounds` times; what each step did and took, in seconds."""
    steps: list[tuple[Work, float]] = []
    page_tokens = engine.limits["page_tokens"]

    def observe(plan: Plan, seconds: float) -> None:
        steps.append((work_of(plan, page_tokens), seconds))

    number = 0
    for turn in range(rounds + 1):
        for load in designed_loads(engine.limits, engine.max_model_len, seed):
            number = _run(engine, load, vocab, seed, number)
        if turn == 0:  # the first time only warms up: caches, clocks, shapes compiled on demand
            engine.observe = observe
    engine.observe = None
    return steps


def _run(
    engine: RecordedEngineLike, load: Sequence[Planned], vocab: int, seed: int, number: int
) -> int:
    done = sent = 0
    while sent < len(load) or engine.has_unfinished():
        while sent < len(load) and load[sent].after <= done:
            one = load[sent]
            engine.add_request(
                f"profile-{number}", random_prompt(one.prompt, seed * 1_000_003 + number, vocab),
                SamplingParams(
                    temperature=0.0, max_tokens=one.output, ignore_eos=True, detokenize=False
                ),
            )
            sent, number = sent + 1, number + 1
        engine.step()
        done += 1
    return number


def machine_of(
    name: str, engine: RecordedEngineLike, steps: Sequence[tuple[Work, float]]
) -> tuple[dict[str, Any], Fit]:
    """What `simulation.machines` reads, and how well it fits.

    Raises:
      ConfigError: too few steps to fit anything to.
    """
    fit = fit_line([(work, seconds) for work, seconds in steps if seconds > 0.0])
    stats, limits = engine.stats(), engine.limits
    paging = stats.get("paging") or {}
    busy, moved = paging.get("copy_busy_s", 0.0), paging.get("bytes_out", 0)
    moved += paging.get("bytes_in", 0)
    links = [
        {"store": store, "store_bytes": capacity * size, "bytes_per_s": moved / busy,
         "copy_s": 0.0, "duplex": False}
        for store, capacity, size in limits["stores"] if busy > 0.0 and moved
    ]
    return {
        "name": name,
        "cost": dataclasses.asdict(fit.line),
        "fit": {"steps": fit.steps, "error_p50": fit.error_p50, "error_p90": fit.error_p90},
        "engine": {
            "page_tokens": limits["page_tokens"], "page_bytes": engine.page_bytes,
            "num_pages": limits["num_pages"],
            "host_s": stats["host_s"] / max(1, stats["steps"]),
            "max_num_seqs": limits["config"]["max_num_seqs"],
            "max_step_tokens": limits["config"]["max_step_tokens"],
        },
        "links": links,
        "columns": [*Work._fields, "seconds"],
        "steps": [[*work, round(seconds, 7)] for work, seconds in steps],
    }, fit


def recorded_ratios(machine: dict[str, Any], cost: StepCost) -> list[float]:
    """For `cost.Varied`: what the recorded steps of a machine took by what `cost` says of them.

    Raises:
      ConfigError: the machine holds no steps.
    """
    rows = machine.get("steps")
    if not rows or machine.get("columns") != [*Work._fields, "seconds"]:
        raise ConfigError("steps", machine.get("columns"), "what `aqua-jax profile --engine` wrote")
    return [row[-1] / cost.seconds(Work(*row[:-1])) for row in rows if row[-1] > 0.0]
