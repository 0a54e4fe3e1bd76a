"""Runs one load on a fresh engine per policy, everything else equal, and collects one report."""

from __future__ import annotations

import dataclasses
import gc
import logging
from collections.abc import Callable, Sequence
from typing import Any

from aqua_jax.bench import workloads
from aqua_jax.bench.latency import fold
from aqua_jax.bench.measure import COUNTERS
from aqua_jax.bench.memory import peak_rss
from aqua_jax.bench.open_loop import Clock, Run, SystemClock, serve
from aqua_jax.bench.service import run_metrics, timeline
from aqua_jax.bench.traces import TraceRequest, fit, prompt_ids
from aqua_jax.config import EngineConfig
from aqua_jax.errors import ConfigError

_log = logging.getLogger(__name__)
_PROMPT_SEED = 500  # of the first repeat


@dataclasses.dataclass(frozen=True)
class Load:
    """What is sent, and what counts as good.

    Attributes:
      requests: by arrival.
      max_tokens: prompt and output of a request together; longer ones are cut to this or to the
        model's length. None: what is longer than the model allows is an error.
      ttft_slo_s, tbt_slo_s: see `run_metrics`.
    """

    requests: Sequence[TraceRequest]
    max_tokens: int | None
    ttft_slo_s: float
    tbt_slo_s: float


def compare(
    config: EngineConfig, policies: Sequence[str], load: Load, repeats: int,
    make_engine: Callable[[EngineConfig], Any], clock: Clock | None = None,
) -> tuple[dict[str, Any], dict[str, Run]]:
    """Runs the load `repeats` times under each policy.

    Args:
      config: of the engines; its policy is replaced.
      policies: in the order to run.
      load: the same for all, with the same prompts.
      repeats: runs of each, every one with prompts of its own.
      make_engine: builds an engine.
      clock: the engines'; None: the machine's.

    Returns:
      (report, by policy its first run). The report has requests, and in `policies` by name the
      metrics of `run_metrics` as {"median", "min", "max", "n"}, lengths_cut, kv_pages, the
      engine's counters, peak_rss, and the first run's timeline.

    Raises:
      ConfigError: a request doesn't fit the model and may not be cut.
    """
    report: dict[str, Any] = {"requests": len(load.requests), "policies": {}}
    runs: dict[str, Run] = {}
    for policy in policies:
        engine = make_engine(dataclasses.replace(config, policy=policy))
        try:
            report["policies"][policy], runs[policy] = _run_policy(
                engine, policy, load, repeats, clock or SystemClock()
            )
        finally:
            engine.close()
            del engine
            gc.collect()
    return report, runs


def _run_policy(
    engine: Any, policy: str, load: Load, repeats: int, clock: Clock
) -> tuple[dict[str, Any], Run]:
    requests, cut = _fitted(load, engine.max_model_len)
    vocab = engine.model_config.vocab_size
    workloads.warm_up(engine, vocab, engine.max_model_len)
    measured: list[dict[str, float]] = []
    first: Run | None = None
    for repeat in range(repeats):
        prompts = [
            prompt_ids(request, number, _PROMPT_SEED + repeat, vocab)
            for number, request in enumerate(requests)
        ]
        run = serve(engine, requests, prompts, clock)
        first = first or run
        measured.append(
            run_metrics(run, ttft_slo_s=load.ttft_slo_s, tbt_slo_s=load.tbt_slo_s)
        )
        _log.info(
            "%s %d/%d: ttft p99 %.4g s, %.4g output tokens/s", policy, repeat + 1, repeats,
            measured[-1]["ttft_p99_s"], measured[-1]["output_tok_s"],
        )
    assert first is not None
    stats = engine.stats()
    return {
        "metrics": fold(measured), "lengths_cut": cut, "kv_pages": first.pages_total,
        "stats": {name: stats[name] for name in COUNTERS if name in stats},
        "peak_rss": peak_rss(), "timeline": timeline(first),
    }, first


def _fitted(load: Load, model_len: int) -> tuple[list[TraceRequest], int]:
    if load.max_tokens is not None:
        return fit(load.requests, min(load.max_tokens, model_len))
    longest = max(load.requests, key=lambda one: one.prompt + one.output)
    if longest.prompt + longest.output > model_len:
        raise ConfigError(
            "prompt_tokens", longest.prompt,
            f"with output_tokens {longest.output} at most {model_len}",
        )
    return list(load.requests), 0


def table(report: dict[str, Any]) -> str:
    """The report for people: a column of medians per policy."""
    policies = report["policies"]
    lines = [
        f"{report['requests']} requests, medians of the runs",
        f"  {'':<20}" + "".join(f"{name:>12}" for name in policies),
    ]
    metrics = {name: None for one in policies.values() for name in one["metrics"]}
    for metric in metrics:
        cells = ""
        for one in policies.values():
            value = one["metrics"].get(metric)
            cells += f"{'-':>12}" if value is None else f"{value['median']:>12.5g}"
        lines.append(f"  {metric:<20}{cells}")
    for name in ("lengths_cut", "kv_pages"):
        lines.append(f"  {name:<20}" + "".join(f"{one[name]:>12}" for one in policies.values()))
    for name in COUNTERS:
        if all(name in one["stats"] for one in policies.values()):
            cells = "".join(f"{one['stats'][name]:>12.4g}" for one in policies.values())
            lines.append(f"  {name:<20}{cells}")
    return "\n".join(lines)
