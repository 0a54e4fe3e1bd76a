"""`aqua-jax simulate`: the scheduler that serves, on machines we don't have."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools
import json
import math
import os
import sys
from typing import TYPE_CHECKING, Any

from aqua_jax.cli.flagset import FlagSet, UsageError
from aqua_jax.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from aqua_jax.bench.traces import TraceRequest
    from aqua_jax.models.config import ModelConfig
    from aqua_jax.simulation.machines import System

# As in `aqua_jax.bench.traces`, `simulation.loads`; help imports neither.
TRACE_FORMATS = ("auto", "azure", "mooncake", "jsonl")
WORKLOADS = ("burst", "poisson", "gamma", "trace")
LENGTHS = ("fixed", "sharegpt", "trace")


def define(flags: FlagSet) -> None:
    """Defines the command's flags."""
    with flags.group("Machine and model"):
        flags.string(
            "machine", "h100-nvlink", "a100-40x2-nvlink, a100-40x2-pcie, a100-80-nvlink, "
            "a100-80-pcie, h100-nvlink, h100-pcie (from data sheets: every figure is modelled), or "
            "a JSON file: of the same kind, or what `aqua-jax profile --engine` wrote.", "NAME",
        )
        flags.string(
            "model", "34b", "7b, 34b, 70b (Llama 2, CodeLlama) or a Hugging Face directory; not "
            "used with a profile, which has its own.", "NAME",
        )
        flags.integer("page_tokens", 16, "Tokens of one page; not used with a profile.", 1, 1024)
        flags.integer("kv_cache_tokens", None, "A pool of so many tokens instead.", 1)
        flags.string(
            "link_gb_s", None, "Bytes per second of every link, in 1e9, instead of the machine's; "
            "several are simulated one after another.", "X,X,...",
        )
    with flags.group("Load"):
        flags.choice(
            "workload", "poisson", WORKLOADS, "All at once; at random with exponential or gamma "
            "gaps; as recorded in --trace.",
        )
        flags.choice(
            "lengths", "sharegpt", LENGTHS, "--prompt_tokens and --output_tokens; lognormal like "
            "ShareGPT's; drawn from --trace.",
        )
        flags.integer("num_requests", 200, "Requests; of a recorded trace the first so many.", 1)
        flags.integer("prompt_tokens", 256, "Tokens of each prompt, with --lengths=fixed.", 1)
        flags.integer("output_tokens", 256, "Tokens generated for each.", 1)
        flags.string(
            "request_rate", None, "Requests a second of poisson and gamma (default: 1); several "
            "are simulated one after another.", "X,X,...",
        )
        flags.number("burstiness", 1.0, "Shape of gamma gaps: below 1 bunched.", 1e-3, 1e3)
        flags.integer("num_users", 1, "Users the requests are dealt to in turn.", 1)
        flags.string("trace", None, "As for `aqua-jax bench`.", "FILE")
        flags.choice("trace_format", "auto", TRACE_FORMATS, "Format of --trace.")
        flags.number("rate", 1.0, "A recorded trace comes so many times faster.", 1e-6, 1e6)
        flags.integer("seed", 0, "Of lengths and times.", 0)
        flags.integer(
            "seeds", 1, "So many seeds, from --seed on: every figure is its median over them.", 1,
            1000,
        )
    with flags.group("Scheduling"):
        flags.string(
            "policies", "fcfs,fair", "What is compared: POLICY[@STORE[+STORE]][/STEPS] with "
            "commas. POLICY: fcfs, fcfs_swap, fair, priority; vllm (fcfs that leaves no room to "
            "grow), vtc, aqua_reference. STORE: a store of the machine, or none; default: all for "
            "fair, fcfs_swap, priority and aqua_reference, none for the others. STEPS: of a "
            "slice.", "NAMES",
        )
        flags.string(
            "slices", None, "Every policy with slices once for each of these numbers of steps; 0: "
            "no slices.", "N,N,...",
        )
        flags.string(
            "bars", None, "A policy of --policies: also show, at every TTFT p99 and longest gap "
            "that it and another policy can both keep, what the cheapest setting of either moves.",
            "POLICY",
        )
        flags.integer("max_num_seqs", 256, "Most sequences in one step.", 1)
        flags.integer("max_step_tokens", 2048, "Most tokens in one step.", 1)
        flags.integer("max_model_len", 16384, "Longest prompt and answer; longer ones are cut.", 2)
        flags.switch("prefix_caching", True, "As for `aqua-jax bench`.")
        flags.string(
            "tbt_slo_ms", None, "Longest gap between two tokens that fair with automatic slices "
            "aims at; 0, the default: as short as it goes. Several are simulated one after "
            "another.", "X,X,...",
        )
        flags.weights(
            "user_weights", "Shares of users under fair and vtc, such as user-0=2,user-1=0.5 "
            "(--num_users are called so; a trace names its own); users not named weigh 1.",
        )
    with flags.group("Output"):
        flags.number("goodput_ttft_ms", 1000.0, "As for `aqua-jax bench`.", 0.0, 1e9)
        flags.number("goodput_tbt_ms", 100.0, "As for `aqua-jax bench`.", 0.0, 1e9)
        flags.string(
            "plots", None, "Draw into this folder, with the numbers as JSON. Needs matplotlib.",
            "DIR",
        )
        flags.switch("json", False, "Print one line of JSON instead of tables.")


_RANDOM = ("poisson", "gamma")
# Flags that mean something only with some values of another one.
_MEANT_FOR = {
    "request_rate": ("workload", _RANDOM), "burstiness": ("workload", ("gamma",)),
    "rate": ("workload", ("trace",)), "num_users": ("workload", ("burst", *_RANDOM)),
    "lengths": ("workload", ("burst", *_RANDOM)),
    "prompt_tokens": ("lengths", ("fixed",)), "output_tokens": ("lengths", ("fixed",)),
}


def _check(flags: FlagSet) -> None:
    """Refuses what would do nothing."""
    for name, (other, values) in _MEANT_FOR.items():
        if flags.given(name) and getattr(flags, other) not in values:
            raise UsageError(f"flag --{name} needs --{other}={' or '.join(values)}")
    wants_trace = flags.workload == "trace" or flags.lengths == "trace"
    if wants_trace != (flags.trace is not None) or flags.given("trace_format") > wants_trace:
        raise UsageError("flag --trace=FILE goes with --workload=trace or --lengths=trace")


def run(flags: FlagSet) -> int:
    """Simulates and prints.

    Returns:
      0.
    """
    try:
        with _few_collections():
            return _run(flags)
    except ConfigError as error:
        raise UsageError(str(error)) from None


@contextlib.contextmanager
def _few_collections() -> Iterator[None]:
    """Seldom looks for cycles: there are next to none, and looking took a tenth of the time."""
    before = gc.get_threshold()
    gc.set_threshold(100_000, 50, 100)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _run(flags: FlagSet) -> int:
    from aqua_jax.bench import plots
    from aqua_jax.simulation import bars, report, setups
    from aqua_jax.simulation import plots as sweeps

    _check(flags)
    folder = None
    if flags.plots is not None:
        plots.require_matplotlib()
        folder = plots.prepare_folder(flags.plots)
    system = _system(flags)
    contestants = setups.expand(flags.policies.split(","), _integers(flags, "slices"))
    if flags.given("tbt_slo_ms") and not any(
        one.policy == "fair" and one.slice_steps is None for one in contestants
    ):
        raise UsageError("flag --tbt_slo_ms is for fair with automatic slices")
    if flags.user_weights and not any(one.policy in setups.WEIGHING for one in contestants):
        raise UsageError(f"flag --user_weights is for {' and '.join(setups.WEIGHING)}")
    policies = {one.policy for one in contestants}
    if flags.bars is not None and (flags.bars not in policies or len(policies) < 2):
        raise UsageError(
            f"flag --bars={flags.bars}: allowed: a policy of --policies, beside others"
        )
    if flags.bars is not None and flags.json:
        raise UsageError("flag --bars is for tables, not for --json")
    limits = setups.Limits(
        flags.max_num_seqs, flags.max_step_tokens, flags.max_model_len,
        prefix_caching=flags.prefix_caching, user_weights=flags.user_weights,
    )
    points: dict[str, dict[str, dict[str, float]]] = {}
    outcomes: dict[str, Any] = {}
    longest = min(limits.max_model_len, system.num_pages * system.page_tokens)
    loads = [_load(flags, longest, flags.seed + number) for number in range(flags.seeds)]
    links: list[float | None] = [*_numbers(flags, "link_gb_s")] or [None]
    slos = _numbers(flags, "tbt_slo_ms", zero=True) or [0.0]
    for rate in _numbers(flags, "request_rate") or [1.0]:
        several = [load(rate) for load in loads]
        for link, slo in itertools.product(links, slos):
            here = system if link is None else system.with_rate(link * 1e9)
            aimed = dataclasses.replace(limits, tbt_slo_s=slo / 1e3)
            name = _point(flags, rate, link, slo if len(slos) > 1 else None)
            runs = [
                report.compare(
                    contestants, here, aimed, requests, flags.goodput_ttft_ms / 1e3,
                    flags.goodput_tbt_ms / 1e3,
                ) for requests in several
            ]
            points[name], outcomes = report.medians([figures for figures, _ in runs]), runs[0][1]
            print(f"simulated: {name}", file=sys.stderr)
    title = (
        f"{system.name}, {flags.model if system.figures == 'modelled' else 'the recorded model'}, "
        f"pool of {system.num_pages} pages of {system.page_tokens} tokens, {flags.num_requests} "
        f"requests; {system.figures} figures"
    )
    several_seeds = f", medians of {flags.seeds} seeds" if flags.seeds > 1 else ""
    if folder is not None:
        if len(points) == 1:
            shown = {name: outcome.run for name, outcome in outcomes.items()}
            of_one = (
                f", seed {flags.seed}; frontier.png at medians of {flags.seeds} seeds"
                if several_seeds else ""
            )
            files = plots.save_plots(shown, folder, title + of_one, next(iter(points.values())))
        else:
            files = [sweeps.save_sweep(points, folder, title + several_seeds)]
        print(*files, sep="\n", file=sys.stderr)
    title += several_seeds
    if flags.json:
        print(json.dumps(
            {"title": title, "figures": system.figures, "machine": flags.machine,
             "model": flags.model, "num_pages": system.num_pages, "points": points},
            allow_nan=False,
        ), flush=True)
    elif len(points) == 1:
        print(report.table(next(iter(points.values())), title), flush=True)
    else:
        print(report.sweep_table(points, title), flush=True)
    if flags.bars is not None:
        for name, results in points.items():
            print(bars.table(results, flags.bars, f"At equal bars, {name}:"), flush=True)
    return 0


def _point(flags: FlagSet, rate: float, link: float | None, slo: float | None) -> str:
    parts = [f"{rate:g}/s"] if flags.workload in _RANDOM else [flags.workload]
    parts += [] if link is None else [f"{link:g} GB/s"]
    return ", ".join(parts + ([] if slo is None else [f"{slo:g} ms"]))


def _system(flags: FlagSet) -> System:
    from aqua_jax.simulation import machines

    model = None
    if not machines.is_fitted(flags.machine):
        model = _model(flags.model)
    elif flags.given("model") or flags.given("page_tokens"):
        raise UsageError(
            f"flags --model and --page_tokens: {flags.machine} is a profile, which has its own"
        )
    system = machines.build_system(flags.machine, model, flags.page_tokens)
    if flags.kv_cache_tokens is not None:
        pages = flags.kv_cache_tokens // system.page_tokens
        if pages < 1:
            raise UsageError(f"flag --kv_cache_tokens={flags.kv_cache_tokens}: less than a page")
        system = dataclasses.replace(system, num_pages=pages)
    return system


def _model(name: str) -> ModelConfig:
    from aqua_jax.simulation.models import model_named

    if not os.path.isdir(name):
        return model_named(name)
    from aqua_jax.models.huggingface import config_from_hf

    try:
        with open(os.path.join(name, "config.json"), encoding="utf-8") as file:
            return config_from_hf(json.load(file))
    except (OSError, ValueError) as error:
        raise UsageError(f"flag --model={name}: {error}") from None


def _integers(flags: FlagSet, name: str) -> list[int]:
    text = getattr(flags, name)
    if text is None:
        return []
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise UsageError(f"flag --{name}={text}: allowed: integers >= 0 with commas")
    return [int(part) for part in parts]


def _numbers(flags: FlagSet, name: str, zero: bool = False) -> list[float]:
    text = getattr(flags, name)
    if text is None:
        return []
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    low = ">= 0" if zero else "> 0"
    if not values or not all(0.0 < value < math.inf or (zero and value == 0) for value in values):
        raise UsageError(f"flag --{name}={text}: allowed: numbers {low} with commas")
    if len(set(values)) < len(values):
        raise UsageError(f"flag --{name}={text}: allowed: each once")
    return values


def _load(flags: FlagSet, longest: int, seed: int) -> Callable[[float], list[TraceRequest]]:
    """From a request rate to requests."""
    from aqua_jax.bench import traces
    from aqua_jax.simulation import loads

    if flags.workload == "trace":
        if flags.seeds > 1:
            raise UsageError("flag --seeds: a recorded trace has no lengths or times to draw")
        recorded = traces.read_trace(
            flags.trace, flags.trace_format, rate=flags.rate, limit=flags.num_requests
        )
        requests, _ = traces.fit(recorded, longest)
        return lambda rate: requests
    if flags.lengths == "trace":
        known = traces.read_trace(flags.trace, flags.trace_format)
        lengths = loads.draw_lengths(known, flags.num_requests, seed)
    elif flags.lengths == "sharegpt":
        lengths = loads.sharegpt_like(flags.num_requests, seed)
    else:
        lengths = [(flags.prompt_tokens, flags.output_tokens)] * flags.num_requests

    def load(rate: float) -> list[TraceRequest]:
        timed = loads.timed(
            lengths, flags.workload, rate, flags.burstiness, flags.num_users, seed
        )
        return traces.fit(timed, longest)[0]

    return load
