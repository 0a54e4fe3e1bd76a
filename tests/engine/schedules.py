"""Random schedules of an engine that keeps pages of whoever gives way.

One seed decides about arrivals, aborts, policy and slices, the sizes of pool and tiers, how slow
copies are, what the lender does, and what breaks. Answers are compared with those of an engine that
nobody ever leaves.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import random
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from aqua_jax.config import SamplingParams
from aqua_jax.engine.engine import Engine
from aqua_jax.memory.arena import Arena
from aqua_jax.memory.client import Client
from aqua_jax.ops import moves as copy_queue
from tests.faults import processes
from tests.memory.lending import lending, new_name

LENDERS = ("none", "steady", "takes back", "changes its mind", "is killed", "several")
BREAKS = ("nothing", "nothing", "pages in stores change", "a step fails", "both")
POLICIES = ("fair", "fair", "fcfs_swap", "priority")


@dataclasses.dataclass(frozen=True)
class Request:
    """What a schedule may contain."""

    tokens: list[int]
    params: SamplingParams


@dataclasses.dataclass(frozen=True)
class Scale:
    """How large things are for a model."""

    page_bytes: int
    pool_tokens: tuple[int, int]  # least and most
    lent_pages: tuple[int, int]
    host_pages: tuple[int, ...]
    requests: int  # of a schedule
    arrivals: int  # steps within which they come
    aborts: int
    delays_us: tuple[int, ...] = (0, 300, 2000)


class Catalogue:
    """Requests and their answers, found when first asked for."""

    def __init__(self, requests: Sequence[Request], roomy: Engine) -> None:
        """`roomy` has a pool that holds everything."""
        self.requests, self._roomy = requests, roomy
        self._answers: dict[int, list[list[int]]] = {}

    def answers(self, chosen: Sequence[int]) -> dict[str, list[list[int]]]:
        """The tokens of each sample of the chosen requests."""
        missing = [index for index in chosen if index not in self._answers]
        for index in missing:
            request = self.requests[index]
            self._roomy.add_request(f"r{index}", request.tokens, request.params)
        last = {}
        while self._roomy.has_unfinished():
            last |= {output.request_id: output for output in self._roomy.step()}
        for index in missing:
            self._answers[index] = _tokens(last[f"r{index}"])
        assert not missing or self._roomy.stats()["preemptions"] == 0
        return {f"r{index}": self._answers[index] for index in chosen}


def _tokens(output: Any) -> list[list[int]]:
    return [list(sample.token_ids) for sample in output.outputs]


class Schedule:
    """What happens when, and to whom."""

    def __init__(
        self, seed: int, scale: Scale, catalogue: Sequence[Request], coordinator: str = ""
    ) -> None:
        """`catalogue`: requests there are to choose from. `coordinator`: the socket of one, for
        several lenders; without it there is always one."""
        self.seed, self.scale, self.catalogue = seed, scale, catalogue
        rng = self.rng = random.Random(seed)
        # In turns, so that a few seeds have them all.
        lenders = LENDERS if coordinator else LENDERS[:-1]
        self.lender, self.coordinator = lenders[seed % len(lenders)], coordinator
        self.breaks = BREAKS[(seed + 2 * (seed // len(lenders))) % len(BREAKS)]
        self.chosen = rng.sample(range(len(catalogue)), scale.requests)
        self.arrivals = sorted(rng.randrange(scale.arrivals) for _ in self.chosen)
        aborted = rng.sample(self.chosen, scale.aborts)
        self.aborts = {f"r{index}": rng.randrange(2 * scale.arrivals) for index in aborted}
        self.users = [rng.choice("ab") for _ in self.chosen]
        self.priorities = [rng.randrange(3) for _ in self.chosen]
        self.lent = rng.randint(*scale.lent_pages) * scale.page_bytes
        self.delay_us = rng.choice(scale.delays_us)
        self.free_copies = rng.random() < 0.5
        pages_change = self.breaks in ("pages in stores change", "both")
        host = rng.choice(scale.host_pages)
        if self.lender == "none":
            host = max(scale.host_pages)
        self.settings: dict[str, Any] = {
            "policy": rng.choice(POLICIES), "slice_steps": rng.choice([None, 2, 4, 16]),
            "kv_cache_tokens": rng.randint(*scale.pool_tokens) // 16 * 16,
            "verify_pages": pages_change or rng.random() < 0.3,
            "prefix_caching": rng.random() < 0.7, "host_kv_memory": host * scale.page_bytes,
            # Most change places as often as they can; some hardly, or are short of room to.
            "switch_share": (1.0, 1.0, 0.15, 1e-3)[seed // 8 % 4],
        }
        self._when = [rng.randrange(10, scale.arrivals + 30) for _ in range(3)]
        self._changes = set(rng.sample(range(200), 12)) if pages_change else set()
        self._fails_at = self._when[2] if self.breaks in ("a step fails", "both") else -1

    @contextlib.contextmanager
    def a_lender(self) -> Iterator[tuple[str, dict[int, Callable[[], object]]]]:
        """Where it listens, and what it does at which step."""
        first, second, _ = self._when
        if self.lender == "none":
            yield "", {}
        elif self.lender == "several":
            with self._several(first, second) as events:
                yield self.coordinator, events
        elif self.lender == "is killed":
            path = new_name()
            with processes.lender(path, str(self.lent)) as process:
                yield path, {first: lambda: process.signal(signal.SIGKILL)}
                process.signal(signal.SIGKILL)
        else:
            with lending(self.lent) as lender:
                fewer = self.rng.randrange(4) * self.scale.page_bytes
                events: dict[int, Callable[[], object]] = {}
                if self.lender != "steady":
                    events[first] = lambda: lender.lender.resize(fewer)
                if self.lender == "changes its mind":
                    events[first + 1 + second // 8] = lambda: lender.lender.resize(self.lent)
                yield lender.path, events

    @contextlib.contextmanager
    def _several(self, first: int, second: int) -> Iterator[dict[int, Callable[[], object]]]:
        """One lends, wants some of it back, and lends it again; one comes later, and leaves with
        what it has lent."""
        rng, page = self.rng, self.scale.page_bytes
        cap = rng.choice([0, 0, 400 * page])
        with contextlib.ExitStack() as stack:
            arenas = [stack.enter_context(Arena.create(self.lent)) for _ in range(2)]
            stays, leaves = (
                stack.enter_context(Client(self.coordinator, name=name)) for name in "sl"
            )
            lending = stays.lend(arenas[0], cap=cap)
            fewer = rng.randrange(1 + self.lent // page) * page

            def lend_again() -> None:
                lending.reclaim(self.lent)
                for start, end in lending.take_returned():
                    lending.lend(start, end - start)

            events: dict[int, Callable[[], object]] = {
                first: lambda: lending.reclaim(fewer, 5.0),
                first + 1 + second // 8: lend_again,
                second // 2: lambda: leaves.lend(arenas[1]),
                second + 9: leaves.close,
            }
            yield events

    def run(self, make: Callable[..., Engine]) -> tuple[dict[str, list[list[int]]], dict]:
        """Runs it on `make(**settings)`.

        Returns:
          Answers of those that were not aborted, and statistics at the end.
        """
        copy_queue.set_delay(self.seed, self.delay_us)
        try:
            with self.a_lender() as (path, events), make(peer=path, **self.settings) as engine:
                if self.free_copies:  # slow ones of a tiny model are mostly found too dear
                    engine._scheduler.costs.swap = lambda tokens, unsaved: 0.0
                return self._drive(engine, events)
        finally:
            copy_queue.set_delay(0, 0)

    def _drive(
        self, engine: Engine, events: dict[int, Callable[[], object]]
    ) -> tuple[dict[str, list[list[int]]], dict]:
        last: dict[str, Any] = {}
        step = sent = 0
        while sent < len(self.chosen) or engine.has_unfinished():
            while sent < len(self.chosen) and self.arrivals[sent] <= step:
                request = self.catalogue[self.chosen[sent]]
                engine.add_request(
                    f"r{self.chosen[sent]}", request.tokens, request.params,
                    user=self.users[sent], priority=self.priorities[sent],
                )
                sent += 1
            for name, when in self.aborts.items():
                if when == step:
                    engine.abort(name)
            if step in events:
                events[step]()
            if step in self._changes:
                self._change_a_page(engine)
            if step == self._fails_at:
                fail_once(engine)
            last |= {output.request_id: output for output in engine.step()}
            step += 1
            assert step < 20_000, "no progress"
        assert all(output.error is None for output in last.values())
        stats = engine.stats()
        return {n: _tokens(output) for n, output in last.items() if n not in self.aborts}, stats

    def _change_a_page(self, engine: Engine) -> None:
        """A byte of what a store holds becomes another."""
        residency = engine._scheduler.residency
        held = [] if residency is None else [
            (store, slot) for store in residency.tiers if not store.lost for slot in store.live()
        ]
        if held:
            store, slot = self.rng.choice(held)
            part = store if store.name == "host" else self.rng.choice(store.parts)
            memory = part.arena if store.name == "host" else part.lease
            at = slot.id * part.slot_bytes + self.rng.randrange(part.slot_bytes)
            memory.write(at, bytes([memory.read(at, 1)[0] ^ 1]))


def fail_once(engine: Engine) -> None:
    """The next step that is dispatched fails on the device."""
    runner = engine._runner
    dispatch = runner.dispatch

    def failing(plan: Any) -> Any:
        runner.dispatch = dispatch
        raise jax.errors.JaxRuntimeError("device lost")

    runner.dispatch = failing


def check(
    schedule: Schedule, answers: dict[str, list[list[int]]], stats: dict[str, Any],
    wanted: dict[str, list[list[int]]],
) -> None:
    """Everything not aborted has said what it says alone, and nothing is held in any tier."""
    assert set(answers) == set(wanted) - set(schedule.aborts)
    different = {name for name, tokens in answers.items() if tokens != wanted[name]}
    assert not different, f"other answers: {sorted(different)}"
    assert stats["pages"]["in_use"] == 0
    assert stats["running"] == stats["waiting"] == stats["swapped"] == 0
    assert stats["pool_resets"] <= (schedule._fails_at >= 0)
    paging = stats["paging"]
    if paging is not None:
        assert paging["outstanding"] == 0
        assert [store["in_use"] for store in paging["stores"]] == [0] * len(paging["stores"])
        assert schedule._changes or "MISMATCH" not in paging["moves_failed"]


def tally(schedule: Schedule, stats: dict[str, Any]) -> collections.Counter[str]:
    """What a schedule had in it, to see that many have it all."""
    paging = stats["paging"] or collections.defaultdict(int, moves_failed={}, stores=[])
    seen = collections.Counter({
        "pages came back": paging["bytes_in"] > 0, "revived": paging["tokens_revived"] > 0,
        "recomputed": stats["recomputed_tokens"] > 0, "pool reset": stats["pool_resets"] > 0,
        "changed pages noticed": "MISMATCH" in paging["moves_failed"],
        "moved down": paging["relocated"] > 0, "aborted": bool(schedule.aborts),
        "lender lost": any(store["lost"] for store in paging["stores"]),
        "two tiers": len(paging["stores"]) == 2, schedule.settings["policy"]: True,
    })
    return +seen
