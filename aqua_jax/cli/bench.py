"""`aqua-jax bench`: speed on this machine."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any, get_args, get_type_hints

from aqua_jax.cli import flags as common
from aqua_jax.cli.flagset import FlagSet, UsageError
from aqua_jax.config import SWAPPING, EngineConfig

# As in `aqua_jax.bench.workloads`, `traces` and `arrivals`; help imports none of them.
OFFLINE = ("single", "prefill", "batch", "burst")
TRACE_FORMATS = ("auto", "azure", "mooncake", "jsonl")
ARRIVALS = ("burst", "poisson", "gamma")
# Any of these makes the burst a load over time.
_LOAD_FLAGS = (
    "arrivals", "request_rate", "burstiness", "users", "policies", "slices", "with_floor",
    "with_ideal", "goodput_ttft_ms", "goodput_tbt_ms", "plots",
)
# Which kinds of run a flag means something to: the offline workloads by name, "load" for a burst
# over time, "trace".
_MEANT_FOR: dict[str, tuple[str, ...]] = {
    "num_requests": ("batch", "burst", "load", "trace"),
    "prompt_tokens": (*OFFLINE, "load"),
    "output_tokens": ("single", "batch", "burst", "load"),
    "trace": ("trace",), "trace_format": ("trace",), "rate": ("trace",),
    "max_trace_tokens": ("trace",),
    "arrivals": ("load",), "request_rate": ("load",), "burstiness": ("load",),
    "users": ("load",),
    **dict.fromkeys(
        (
            "policies", "slices", "with_floor", "with_ideal", "goodput_ttft_ms", "goodput_tbt_ms",
            "plots",
        ),
        ("load", "trace"),
    ),
}
_KINDS = {"load": "burst", "trace": "trace"}  # kind of run -> its --workload


def define(flags: FlagSet) -> None:
    """Defines the command's flags."""
    common.define_model_flags(flags)
    with flags.group("Workload"):
        flags.string(
            "workload", "single,prefill,batch,burst", "single: one stream (128 tokens in, 128 "
            "out). prefill: one prompt of 1024 to its first token. batch: 64 requests at once (128 "
            "in, 128 out). burst: 64 at once (256 in, 256 out) over a KV pool for 8 of them. "
            "Several with commas. Alone: trace, what --trace recorded.", "NAMES",
        )
        flags.integer(
            "num_requests", None, "Requests of batch and burst; of a trace the first so many.", 1
        )
        flags.integer("prompt_tokens", None, "Tokens of each prompt.", 1)
        flags.integer("output_tokens", None, "Tokens generated for each (not prefill).", 1)
        flags.integer("reps", 3, "Measurements of each; medians and ranges are reported.", 1)
        flags.switch("json", False, "Print one line of JSON instead of a table.")
    with flags.group("Load over time (trace; burst with any of these)"):
        flags.string(
            "trace", None, "Recorded requests: Azure's LLM inference CSV, Mooncake's JSONL, or our "
            "own, lines of {\"arrival_s\", \"prompt_tokens\", \"output_tokens\"}. A line of any "
            "may have user, weight and priority.", "FILE",
        )
        flags.choice("trace_format", "auto", TRACE_FORMATS, "Format of --trace.")
        flags.number("rate", 1.0, "Requests of the trace come so many times faster.", 1e-6, 1e6)
        flags.integer(
            "max_trace_tokens", None, "Cut longer requests of a trace, prompt and output together; "
            "default: to the model's length.", 2,
        )
        flags.choice(
            "arrivals", "burst", ARRIVALS, "How the burst's requests come: at once, or at random "
            "with exponential or gamma gaps.",
        )
        flags.number("request_rate", 1.0, "Requests a second of poisson and gamma.", 1e-6, 1e6)
        flags.number(
            "burstiness", 1.0, "Shape of gamma gaps: below 1 bunched, 1 poisson, above 1 even.",
            1e-3, 1e3,
        )
        flags.integer("users", 1, "Users the burst's requests are dealt to in turn.", 1)
        flags.string(
            "policies", None, "Run the same load under each of these policies, in a fresh engine, "
            "instead of --policy.", "NAMES",
        )
        flags.string(
            "slices", None, "Run it under fair with each of these numbers of decode steps a turn "
            "as well; with --plots their frontier is drawn.", "N,N",
        )
        flags.switch(
            "with_floor", False, "Run the same arrivals with one token each and a pool for all: no "
            "first token can come earlier.",
        )
        flags.switch(
            "with_ideal", False, "Run it with a pool for all and as many sequences at a time as "
            "the constrained run had in the mean: no throughput can be expected above that.",
        )
        flags.number(
            "goodput_ttft_ms", 1000.0, "Longest wait for a first token that is good.", 0.0, 1e9
        )
        flags.number(
            "goodput_tbt_ms", 100.0, "Longest mean time between tokens that is good.", 0.0, 1e9
        )
        flags.string(
            "plots", None, "Draw the first run of each into this folder, with the numbers as JSON. "
            "Needs matplotlib.", "DIR",
        )
    common.define_engine_flags(flags)


def run(flags: FlagSet) -> int:
    """Measures and prints.

    Returns:
      0.
    """
    names = _workloads(flags)
    policies = _policies(flags)
    chosen = [*policies, *(["fair"] * bool(flags.slices))]
    # What is checked together with the policy must fit one of those that run: fair, if it does, for
    # it alone weighs users.
    fitting = next((one for one in ("fair", *SWAPPING) if one in chosen), chosen[0])
    for name in ("slice_steps", "tbt_slo_ms"):
        if flags.slices and flags.given(name) and "fair" not in policies:
            raise UsageError(
                f"flag --{name} means nothing to the runs of --slices={flags.slices}; add fair to "
                "--policies"
            )
    config = common.engine_config(flags, chosen, policy=fitting)
    if names == ["load"] or names == ["trace"]:
        return _run_load(flags, config, policies, names[0])

    from aqua_jax.bench import workloads
    from aqua_jax.bench.measure import describe, measure, table

    sizes = {
        name: workloads.sizes_of(
            name, flags.num_requests, flags.prompt_tokens, flags.output_tokens
        )
        for name in names
    }
    own_pool = flags.given("kv_cache_memory") or flags.given("kv_cache_tokens")
    report = measure(config, sizes, flags.reps, _make_engine, own_pool=own_pool)
    if flags.json:
        print(json.dumps({**describe(config), **report}, allow_nan=False), flush=True)
    else:
        print(table(report, names), flush=True)
    return 0


def _workloads(flags: FlagSet) -> list[str]:
    """What is run: offline workloads, or ["load"], or ["trace"]; flags that fit none are errors."""
    names = [name.strip() for name in flags.workload.split(",")]
    allowed = (*OFFLINE, "trace")
    if not set(names) <= set(allowed) or len(set(names)) < len(names):
        raise UsageError(
            f"flag --workload={flags.workload}: allowed, each once: {', '.join(allowed)}"
        )
    if "trace" in names:
        if len(names) > 1:
            raise UsageError(f"flag --workload={flags.workload}: trace runs alone")
        if flags.trace is None:
            raise UsageError("flag --workload=trace needs --trace=FILE")
        kinds = ["trace"]
    elif names == ["burst"] and any(flags.given(name) for name in _LOAD_FLAGS):
        kinds = ["load"]
    else:
        kinds = names
    for name, meant in _MEANT_FOR.items():
        if flags.given(name) and not set(kinds) & set(meant):
            fitting = dict.fromkeys(_KINDS.get(kind, kind) for kind in meant)
            raise UsageError(
                f"flag --{name} means nothing to --workload={flags.workload}; it is for "
                + ", ".join(fitting)
            )
    if kinds == ["load"]:
        if flags.given("request_rate") and flags.arrivals == "burst":
            raise UsageError("flag --request_rate needs --arrivals=poisson or gamma")
        if flags.given("burstiness") and flags.arrivals != "gamma":
            raise UsageError("flag --burstiness needs --arrivals=gamma")
    return kinds


def _run_load(flags: FlagSet, config: EngineConfig, policies: list[str], kind: str) -> int:
    """A trace, or a burst spread over time, under one policy or several."""
    from aqua_jax.bench import arrivals, plots, serving, traces, variants, workloads
    from aqua_jax.bench.measure import describe

    chosen = variants.of_policies(policies, _slices(flags))
    folder = None
    if flags.plots is not None:
        plots.require_matplotlib()
        folder = plots.prepare_folder(flags.plots)
    if not flags.given("warmup"):
        # A program compiled in the middle of a load would be measured as the policy's doing.
        config = dataclasses.replace(config, warmup="full")
    if kind == "trace":
        requests = traces.read_trace(
            flags.trace, flags.trace_format, rate=flags.rate, limit=flags.num_requests
        )
        most = flags.max_trace_tokens or sys.maxsize
    else:
        sizes = workloads.sizes_of(
            "burst", flags.num_requests, flags.prompt_tokens, flags.output_tokens
        )
        times = arrivals.arrival_times(
            flags.arrivals, sizes.requests, flags.request_rate, flags.burstiness, flags.seed
        )
        requests, most = arrivals.synthetic(sizes, times, flags.users), None
        if not (flags.given("kv_cache_memory") or flags.given("kv_cache_tokens")):
            config = dataclasses.replace(
                config, kv_cache_tokens=workloads.burst_pool_tokens(sizes, config.page_tokens)
            )
    load = serving.Load(requests, most, flags.goodput_ttft_ms / 1e3, flags.goodput_tbt_ms / 1e3)
    report, runs = serving.compare(
        config, chosen, load, flags.reps, _make_engine, with_floor=flags.with_floor,
        with_ideal=flags.with_ideal,
    )
    about = describe(config)
    workload = _KINDS[kind]
    if folder is not None:
        title = f"{about['model']} {about['dtype']}, {workload} of {len(requests)} requests"
        files = plots.save_plots(runs, folder, title, serving.medians(report))
        print(*files, sep="\n", file=sys.stderr)
    if flags.json:
        shown = {**about, "workload": workload, **report}
        print(json.dumps(shown, allow_nan=False), flush=True)
    else:
        print(serving.table(report), flush=True)
    return 0


def _policies(flags: FlagSet) -> list[str]:
    if flags.policies is None:
        return [flags.policy]
    names = [name.strip() for name in flags.policies.split(",")]
    known = get_args(get_type_hints(EngineConfig)["policy"])
    if len(set(names)) < len(names) or not set(names) <= set(known):
        allowed = ", ".join(known)
        raise UsageError(f"flag --policies={flags.policies}: allowed, each once: {allowed}")
    return names


def _slices(flags: FlagSet) -> list[int]:
    if flags.slices is None:
        return []
    try:
        found = [int(number) for number in flags.slices.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1 or len(set(found)) < len(found):
        raise UsageError(
            f"flag --slices={flags.slices}: allowed: integers >= 1 with commas, each once"
        )
    return found


def _make_engine(config: EngineConfig) -> Any:
    # Imported here so that the first engine's start includes importing jax, 0.8 s of it.
    from aqua_jax.engine.engine import Engine
    from aqua_jax.progress import counting_bar

    return Engine(config, progress=counting_bar("compiling", "program"))
