"""Runs one load under several policies, everything else equal, and collects one report.

Every run has a fresh engine, and the runs of a repeat follow each other in turn (in the opposite
order every other time), so that what changes on the machine meanwhile meets all of them.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from aqua_jax.bench import counters, ratios, variants, workloads
from aqua_jax.bench.latency import fold
from aqua_jax.bench.memory import peak_rss
from aqua_jax.bench.open_loop import Clock, Run, SystemClock, serve
from aqua_jax.bench.service import resident_mean, run_metrics, timeline
from aqua_jax.bench.traces import TraceRequest, fit, prompt_ids
from aqua_jax.bench.variants import Variant
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


@dataclasses.dataclass
class _Results:
    """What came of one variant."""

    config: EngineConfig
    measured: list[dict[str, float]] = dataclasses.field(default_factory=list)
    first: Run | None = None
    about: dict[str, Any] = dataclasses.field(default_factory=dict)


def compare(
    config: EngineConfig, chosen: Sequence[Variant], load: Load, repeats: int,
    make_engine: Callable[[EngineConfig], Any], clock: Clock | None = None, *,
    with_floor: bool = False, with_ideal: bool = False,
) -> tuple[dict[str, Any], dict[str, Run]]:
    """Runs the load `repeats` times under each variant.

    Args:
      config: of the engines; variants change it.
      chosen: in the order to run.
      load: the same for all, with the same prompts.
      repeats: runs of each, every one with prompts of its own.
      make_engine: builds an engine.
      clock: the engines'; None: the machine's.
      with_floor, with_ideal: run these as well (`variants`), and say how the others compare. The
        ideal has as many sequences as the first variant that shares fairly had in the mean in its
        first run, or the first variant of all if none does.

    Returns:
      (report, by variant its first run). The report has requests, and in `policies` by name the
      metrics of `run_metrics` and `counters.figures` as {"median", "min", "max", "n"}, lengths_cut,
      kv_pages, max_num_seqs, startup_s, peak_rss, and the first run's timeline; in `ratios` what
      `ratios.ratios` says.

    Raises:
      ConfigError: a request doesn't fit the model and may not be cut.
    """
    clock = clock or SystemClock()
    results = {one.name: _Results(one.config(config)) for one in chosen}
    todo = list(chosen)
    subject = next((one for one in chosen if one.name.startswith("fair")), chosen[0])
    for repeat in range(repeats):
        for one in todo if repeat % 2 == 0 else reversed(todo):
            _run(one, results[one.name], load, repeat, repeats, make_engine, clock)
        if repeat == 0:
            extra = []
            requests = _fitted(load, results[subject.name].about["max_model_len"])[0]
            if with_ideal:
                first = results[subject.name].first
                assert first is not None
                extra.append(variants.ideal(requests, config, round(resident_mean(first))))
            if with_floor:
                extra.append(variants.floor(requests, config))
            for one in extra:
                results[one.name] = _Results(one.config(config))
                _run(one, results[one.name], load, repeat, repeats, make_engine, clock)
            todo += extra
    baseline = "fcfs" if "fcfs" in results else None
    report = {
        "requests": len(load.requests),
        "policies": {name: _report(one) for name, one in results.items()},
        "ratios": ratios.ratios({name: one.measured for name, one in results.items()}, baseline),
    }
    return report, {name: one.first for name, one in results.items() if one.first is not None}


def _run(
    variant: Variant, results: _Results, load: Load, repeat: int, repeats: int,
    make_engine: Callable[[EngineConfig], Any], clock: Clock,
) -> None:
    started = clock.now()
    engine = make_engine(variants.own_timeline(results.config, variant.name, str(repeat + 1)))
    startup_s = clock.now() - started
    try:
        requests, cut = _fitted(load, engine.max_model_len)
        if variant.output is not None:
            requests = [dataclasses.replace(one, output=variant.output) for one in requests]
        vocab = engine.model_config.vocab_size
        workloads.warm_up(engine, vocab, engine.max_model_len)
        prompts = [
            prompt_ids(request, number, _PROMPT_SEED + repeat, vocab)
            for number, request in enumerate(requests)
        ]
        run = serve(engine, requests, prompts, clock)
        model_len = engine.max_model_len
    finally:
        engine.close()
        del engine
        gc.collect()
    metrics = run_metrics(run, ttft_slo_s=load.ttft_slo_s, tbt_slo_s=load.tbt_slo_s)
    metrics |= counters.figures(run.counters, metrics["total_s"])
    results.measured.append(metrics)
    if results.first is None:
        results.first = run
        results.about = {
            "lengths_cut": cut, "kv_pages": run.pages_total, "max_model_len": model_len,
            "max_num_seqs": results.config.max_num_seqs, "startup_s": float(f"{startup_s:.5g}"),
            "peak_rss": peak_rss(),
        }
    _log.info(
        "%s %d/%d: ttft p99 %.4g s, %.4g output tokens/s", variant.name, repeat + 1, repeats,
        metrics["ttft_p99_s"], metrics["output_tok_s"],
    )


def _report(results: _Results) -> dict[str, Any]:
    assert results.first is not None
    return {
        "metrics": fold(results.measured), **results.about, "timeline": timeline(results.first),
    }


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


def medians(report: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """By variant the median of each metric over the repeats."""
    return {
        name: {metric: value["median"] for metric, value in one["metrics"].items()}
        for name, one in report["policies"].items()
    }


def table(report: Mapping[str, Any]) -> str:
    """The report for people: a column of medians per variant, then the ratios."""
    policies = report["policies"]
    lines = [
        f"{report['requests']} requests, medians of the runs",
        f"  {'':<22}" + "".join(f"{name:>12}" for name in policies),
    ]
    names = {name: None for one in policies.values() for name in one["metrics"]}
    for metric in names:
        cells = ""
        for one in policies.values():
            value = one["metrics"].get(metric)
            cells += f"{'-':>12}" if value is None else f"{value['median']:>12.5g}"
        lines.append(f"  {metric:<22}{cells}")
    for name in ("lengths_cut", "kv_pages", "max_num_seqs"):
        lines.append(f"  {name:<22}" + "".join(f"{one[name]:>12}" for one in policies.values()))
    if report["ratios"]:
        lines.append("ratios of runs of the same repeat: median, interval of the median")
        lines += ratios.lines(report["ratios"])
    return "\n".join(lines)
