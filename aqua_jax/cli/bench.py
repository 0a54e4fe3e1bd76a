"""`aqua-jax bench`: speed on this machine."""

from __future__ import annotations

import json
from typing import Any

from aqua_jax.cli import flags as common
from aqua_jax.cli.flagset import FlagSet, UsageError
from aqua_jax.config import EngineConfig


def define(flags: FlagSet) -> None:
    """Defines the command's flags."""
    common.define_model_flags(flags)
    with flags.group("Workload"):
        flags.string(
            "workload", "single,prefill,batch,burst", "single: one stream (128 tokens in, 128 "
            "out). prefill: one prompt of 1024 to its first token. batch: 64 requests at once (128 "
            "in, 128 out). burst: 64 at once (256 in, 256 out) over a KV pool for 8 of them. "
            "Several with commas.", "NAMES",
        )
        flags.integer("num_requests", None, "Requests of batch and burst.", 1)
        flags.integer("prompt_tokens", None, "Tokens of each prompt.", 1)
        flags.integer("output_tokens", None, "Tokens generated for each (not prefill).", 1)
        flags.integer("reps", 3, "Measurements of each; medians and ranges are reported.", 1)
        flags.switch("json", False, "Print one line of JSON instead of a table.")
    common.define_engine_flags(flags)


def run(flags: FlagSet) -> int:
    """Measures and prints.

    Returns:
      0.
    """
    config = common.engine_config(flags)
    from aqua_jax.bench import workloads

    names = [name.strip() for name in flags.workload.split(",")]
    for name in names:
        if name not in workloads.WORKLOADS:
            allowed = ", ".join(workloads.WORKLOADS)
            raise UsageError(f"flag --workload={flags.workload}: allowed: {allowed}")
    sizes = {
        name: workloads.sizes_of(
            name, flags.num_requests, flags.prompt_tokens, flags.output_tokens
        )
        for name in names
    }

    from aqua_jax.bench.measure import describe, measure, table

    def make_engine(config: EngineConfig) -> Any:
        # Imported here so that the first engine's start includes importing jax, 0.8 s of it.
        from aqua_jax.engine.engine import Engine
        from aqua_jax.progress import counting_bar

        return Engine(config, progress=counting_bar("compiling", "program"))

    own_pool = flags.given("kv_cache_memory") or flags.given("kv_cache_tokens")
    report = measure(config, sizes, flags.reps, make_engine, own_pool=own_pool)
    if flags.json:
        print(json.dumps({**describe(config), **report}, allow_nan=False), flush=True)
    else:
        print(table(report, names), flush=True)
    return 0
