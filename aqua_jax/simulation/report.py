"""Figures of simulated runs, in the words of `bench`, and what moved."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from aqua_jax.bench.open_loop import Served
from aqua_jax.bench.service import gaps, run_metrics, service_by_user
from aqua_jax.bench.traces import TraceRequest
from aqua_jax.errors import ConfigError
from aqua_jax.simulation.machines import System
from aqua_jax.simulation.setups import Limits, Setup, build
from aqua_jax.simulation.simulator import Outcome, Simulator


def simulate(
    setup: Setup, system: System, limits: Limits, requests: Sequence[TraceRequest]
) -> Outcome:
    """One contestant over one load."""
    scheduler, queue = build(setup, system, limits)
    return Simulator(scheduler, system.cost, requests, queue=queue, host_s=system.host_s).run()


def figures(outcome: Outcome, ttft_slo_s: float = 1.0, tbt_slo_s: float = 0.1) -> dict[str, float]:
    """`run_metrics`, and worst_gap_s (the longest pause of any request), worst_gap_p50_s, steps,
    tokens computed, of them recomputed, preemptions, switches, bytes moved, how busy device and
    links were."""
    counters = outcome.counters
    metrics = run_metrics(outcome.run, ttft_slo_s=ttft_slo_s, tbt_slo_s=tbt_slo_s)
    worst = sorted(max(gaps(one), default=0.0) for one in outcome.run.served)
    return {
        **metrics, "worst_gap_s": worst[-1], "worst_gap_p50_s": worst[len(worst) // 2],
        "steps": outcome.steps, "computed_tokens": counters.tokens,
        "recomputed_tokens": counters.recomputed_tokens, "preemptions": counters.preemptions,
        "switches": counters.switches, "bytes_out": outcome.bytes_out,
        "bytes_in": outcome.bytes_in, "link_s": outcome.link_s,
        "device_share": outcome.device_s / max(outcome.end_s, 1e-9),
    }


def shares(outcome: Outcome, user_weights: Mapping[str, float]) -> dict[str, float]:
    """What users with a weight had of the service while all users competed, in tokens of prompts
    and outputs: "share of NAME", from 0 to 1, beside "due to NAME", its weight's part of the
    weights of all.

    All compete from the last newcomer to the moment at which the first user has had half of all it
    asks for; the last long answers, which nobody competes with, would blur the shares.
    """
    served = outcome.run.served
    whole = service_by_user(served)
    begin = max(
        min(one.due for one in served if one.request.user == user) for user in whole
    )
    end = min(_half_served(served, user, whole[user]) for user in whole)
    service = service_by_user(served, begin, end)
    had = max(math.fsum(service.values()), 1.0)
    weights = math.fsum(user_weights.get(user, 1.0) for user in whole)
    found = {}
    for user, weight in user_weights.items():
        found[f"share of {user}"] = service[user] / had
        found[f"due to {user}"] = weight / weights
    return found


def _half_served(served: Sequence[Served], user: str, whole: float) -> float:
    """When a user has had half of its service."""
    events = sorted(
        (at, 1 if number else 1 + one.request.prompt)
        for one in served if one.request.user == user for number, at in enumerate(one.tokens)
    )
    had = 0
    for at, tokens in events:
        had += tokens
        if 2 * had >= whole:
            return at
    return 0.0


def compare(
    setups: Sequence[Setup], system: System, limits: Limits, requests: Sequence[TraceRequest],
    ttft_slo_s: float = 1.0, tbt_slo_s: float = 0.1,
) -> tuple[dict[str, dict[str, float]], dict[str, Outcome]]:
    """Every contestant over one load: (figures by name, outcomes by name). `shares` are among the
    figures where users have weights.

    Raises:
      ConfigError: a weight of a user who asks for nothing, or is alone.
    """
    users = {request.user for request in requests}
    strangers = [user for user in limits.user_weights if user not in users or len(users) == 1]
    if strangers:
        some = ", ".join(sorted(users)[:4]) + (", ..." if len(users) > 4 else "")
        raise ConfigError("user_weights", strangers[0], f"users of a load that has several: {some}")
    shown: dict[str, dict[str, float]] = {}
    outcomes: dict[str, Outcome] = {}
    for setup in setups:
        outcomes[setup.name] = simulate(setup, system, limits, requests)
        shown[setup.name] = {
            **figures(outcomes[setup.name], ttft_slo_s, tbt_slo_s),
            **shares(outcomes[setup.name], limits.user_weights),
        }
    return shown, outcomes


def medians(
    runs: Sequence[dict[str, dict[str, float]]],
) -> dict[str, dict[str, float]]:
    """Of several loads: each figure of each contestant at its median; the contestants of the first.

    A figure that some load has no value for is left out.
    """
    return {
        name: {
            field: statistics.median(run[name][field] for run in runs)
            for field in one if all(field in run[name] for run in runs)
        } for name, one in runs[0].items()
    }


_ROWS: tuple[tuple[str, str, float], ...] = (
    ("ttft_p50_s", "TTFT p50 s", 1), ("ttft_p99_s", "TTFT p99 s", 1),
    ("tbt_p50_ms", "between tokens p50 ms", 1), ("tbt_p99_ms", "between tokens p99 ms", 1),
    ("worst_gap_p50_s", "longest gap, median s", 1), ("worst_gap_s", "longest gap s", 1),
    ("output_tok_s", "output tokens/s", 1), ("goodput_req_s", "goodput requests/s", 1),
    ("jain_index", "Jain index", 1), ("total_s", "whole run s", 1), ("steps", "steps", 1),
    ("preemptions", "preemptions", 1), ("switches", "of them switches", 1),
    ("recomputed_tokens", "recomputed tokens", 1), ("bytes_out", "GB out", 1e9),
    ("bytes_in", "GB in", 1e9), ("device_share", "device busy", 1),
)


def table(results: dict[str, dict[str, float]], title: str) -> str:
    """A column per contestant."""
    width = max(11, *(len(name) + 2 for name in results))
    lines = [title, " " * 24 + "".join(f"{name:>{width}}" for name in results)]
    named = dict.fromkeys(
        field for one in results.values() for field in one
        if field.startswith(("share of ", "due to "))
    )
    for field, label, unit in (*_ROWS, *((field, field, 1.0) for field in named)):
        if not any(field in one for one in results.values()):
            continue
        cells = (one.get(field, math.nan) / unit for one in results.values())
        lines.append(f"  {label:<22}" + "".join(f"{_digits(cell):>{width}}" for cell in cells))
    return "\n".join(lines)


def sweep_table(points: dict[str, dict[str, dict[str, float]]], title: str) -> str:
    """A block per figure, a line per point of the sweep, a column per contestant."""
    names = list(next(iter(points.values())))
    width = max(11, *(len(name) + 2 for name in names))
    lines = [title]
    for field, label, unit in _ROWS:
        if field not in ("ttft_p50_s", "ttft_p99_s", "worst_gap_s", "output_tok_s", "bytes_in"):
            continue
        lines.append(f"  {label:<22}" + "".join(f"{name:>{width}}" for name in names))
        for point, results in points.items():
            cells = (results[name][field] / unit for name in names)
            lines.append(f"  {point:<22}" + "".join(f"{_digits(cell):>{width}}" for cell in cells))
    return "\n".join(lines)


def _digits(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
