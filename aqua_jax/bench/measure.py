"""Runs workloads on engines built for them and collects one report."""

from __future__ import annotations

import dataclasses
import gc
import logging
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

from aqua_jax.bench import workloads
from aqua_jax.bench.latency import fold
from aqua_jax.bench.memory import peak_rss, reset_peak
from aqua_jax.bench.variants import own_timeline
from aqua_jax.bench.workloads import Sizes
from aqua_jax.config import EngineConfig
from aqua_jax.errors import ConfigError

_log = logging.getLogger(__name__)

# Counters that explain a figure; the rest of stats() stays out of the report.
COUNTERS = (
    "steps", "preemptions", "recomputed_tokens", "discarded_tokens", "host_share", "host_s",
    "wait_s", "compiles", "compiles_after_warmup",
)


def measure(
    config: EngineConfig, sizes: dict[str, Sizes], repeats: int,
    make_engine: Callable[[EngineConfig], Any], *, own_pool: bool,
) -> dict[str, Any]:
    """Runs every workload `repeats` times.

    The offline workloads share an engine; the burst gets its own, with a KV pool for
    `BURST_RESIDENT` whole sequences.

    Args:
      config: of the engines.
      sizes: by workload, in the order to run.
      repeats: measurements of each.
      make_engine: builds an engine.
      own_pool: False: the offline engine's pool holds everything at once, as other engines' do
        by default; True: it is as `config` says.

    Returns:
      Per workload {metric: {"median", "min", "max", "n"}}; for each engine seconds until it was
      ready, its counters and the peak of resident memory (prefix `burst_` for the burst's).

    Raises:
      ConfigError: a workload doesn't fit the model or the pool.
    """
    report: dict[str, Any] = {}
    offline = {name: one for name, one in sizes.items() if name != "burst"}
    if offline:
        tokens = None if own_pool else workloads.pool_tokens(
            list(offline.values()), config.page_tokens
        )
        chosen = config if tokens is None else dataclasses.replace(config, kv_cache_tokens=tokens)
        _run(chosen, offline, repeats, make_engine, report, "")
    if "burst" in sizes:
        one = sizes["burst"]
        tokens = workloads.burst_pool_tokens(one, config.page_tokens)
        chosen = dataclasses.replace(config, kv_cache_tokens=tokens, max_model_len=None)
        if offline:
            reset_peak()
            chosen = own_timeline(chosen, "burst")
        _run(chosen, {"burst": one}, repeats, make_engine, report, "burst_")
        report["burst"]["kv_cache_tokens"] = chosen.kv_cache_tokens
    return report


def _run(
    config: EngineConfig, sizes: dict[str, Sizes], repeats: int,
    make_engine: Callable[[EngineConfig], Any], report: dict[str, Any], prefix: str,
) -> None:
    started = time.perf_counter()
    engine = make_engine(config)
    report[f"{prefix}startup_s"] = float(f"{time.perf_counter() - started:.5g}")
    try:
        vocab = engine.model_config.vocab_size
        for name, one in sizes.items():
            if one.sequence > engine.max_model_len:
                raise ConfigError(
                    "prompt_tokens", one.prompt,
                    f"with output_tokens {one.output} at most {engine.max_model_len} ({name})",
                )
        workloads.warm_up(engine, vocab, min(one.sequence for one in sizes.values()))
        measured: dict[str, list[dict[str, float]]] = {name: [] for name in sizes}
        for repeat in range(repeats):
            for name, one in sizes.items():
                measured[name].append(workloads.RUNNERS[name](engine, one, repeat, vocab))
                _log.info("%s %d/%d: %s", name, repeat + 1, repeats, _short(measured[name][-1]))
        report.update({name: fold(values) for name, values in measured.items()})
        stats = engine.stats()
        report[f"{prefix}stats"] = {name: stats[name] for name in COUNTERS if name in stats}
        report[f"{prefix}implementations"] = stats.get("implementations", {})
        report[f"{prefix}peak_rss"] = peak_rss()
    finally:
        engine.close()
        del engine
        gc.collect()


def _short(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in list(metrics.items())[:3])


def describe(config: EngineConfig) -> dict[str, Any]:
    """What was measured on: versions, model, threads."""
    import jax

    import aqua_jax

    return {
        "engine": "aqua_jax", "version": aqua_jax.__version__, "jax": jax.__version__,
        "model": os.path.basename(config.model.rstrip("/")), "dtype": config.dtype,
        "threads": int(os.environ.get("AQUA_THREADS") or len(os.sched_getaffinity(0))),
        "platform": jax.default_backend(),
    }


def table(report: dict[str, Any], names: Sequence[str]) -> str:
    """The report for people: every metric's median and range, then what explains them."""
    lines = []
    for name in names:
        lines.append(name)
        for metric, value in report[name].items():
            if isinstance(value, dict):
                shown = f"{value['median']:>10.5g}  [{value['min']:.5g} - {value['max']:.5g}]"
                lines.append(f"  {metric:<20}{shown}  of {value['n']}")
            else:
                lines.append(f"  {metric:<20}{value:>10}")
    for prefix, title in (("", "offline engine"), ("burst_", "burst engine")):
        if f"{prefix}stats" in report:
            lines.append(title)
            lines.append(f"  {'ready after s':<20}{report[f'{prefix}startup_s']:>10.4g}")
            peak = report[f"{prefix}peak_rss"]["sum_mib"]
            lines.append(f"  {'peak RSS MiB':<20}{peak:>10}")
            for counter, value in report[f"{prefix}stats"].items():
                lines.append(f"  {counter:<20}{value:>10.4g}")
    return "\n".join(lines)
