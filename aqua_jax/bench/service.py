"""Figures of an open-loop run: latencies, throughput, goodput, fairness between users. No jax."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

from aqua_jax.bench.latency import percentile
from aqua_jax.bench.open_loop import Run, Served


def gaps(one: Served) -> list[float]:
    """Seconds between neighbouring tokens of a request."""
    return [later - earlier for earlier, later in itertools.pairwise(one.tokens)]


def jain(values: Sequence[float]) -> float:
    """Jain's fairness index: 1 when all are equal, 1/n when one has everything.

    R. Jain, D. Chiu, W. Hawe, "A Quantitative Measure of Fairness and Discrimination", 1984.
    """
    squares = math.fsum(value * value for value in values)
    return math.fsum(values) ** 2 / (len(values) * squares) if squares else 1.0


def service_by_user(
    served: Sequence[Served], begin: float = 0.0, end: float = float("inf")
) -> dict[str, float]:
    """Prompt and output tokens each user got within (begin, end], over the request's weight.

    A prompt counts when its first token comes.
    """
    service: dict[str, float] = {}
    for one in served:
        tokens = sum(begin < at <= end for at in one.tokens)
        if one.tokens and begin < one.tokens[0] <= end:
            tokens += one.request.prompt
        user = one.request.user
        service[user] = service.get(user, 0.0) + tokens / one.request.weight
    return service


def contended(served: Sequence[Served]) -> tuple[float, float] | None:
    """The time in which every user has work: from the last newcomer to the first who is done.

    Returns:
      (begin, end) in seconds; None when there is one user, or no such time.
    """
    begin: dict[str, float] = {}
    end: dict[str, float] = {}
    for one in served:
        user = one.request.user
        begin[user] = min(begin.get(user, one.due), one.due)
        end[user] = max(end.get(user, 0.0), one.tokens[-1] if one.tokens else one.due)
    window = max(begin.values()), min(end.values())
    return window if len(begin) > 1 and window[0] < window[1] else None


def run_metrics(run: Run, *, ttft_slo_s: float, tbt_slo_s: float) -> dict[str, float]:
    """What users felt.

    Args:
      run: at least one request got a token.
      ttft_slo_s, tbt_slo_s: a request is good when its first token came within the one and its
        mean time between tokens is within the other.

    Returns:
      ttft_*_s from when the request was due; tbt_*_ms over all gaps of all requests (max: the
      worst); output_tok_s; goodput_req_s: good requests a second; waiting_mean (over time) and
      waiting_max: requests without a token; failed. With several users that compete, jain_index
      of their weighted service and jain_window_s, the time it was taken over.

    Raises:
      RuntimeError: no request got a token.
    """
    answered = [one for one in run.served if one.tokens]
    if not answered:
        raise RuntimeError(f"no request got a token: {run.served[0].error}")
    first = [one.tokens[0] - one.due for one in answered]
    every = [gaps(one) for one in answered]
    flat = [gap for own in every for gap in own] or [0.0]
    total = max(one.tokens[-1] for one in answered)
    tokens = sum(len(one.tokens) for one in answered)
    good = sum(
        one.error is None and ttft <= ttft_slo_s and sum(own) <= tbt_slo_s * max(len(own), 1)
        for one, ttft, own in zip(answered, first, every, strict=True)
    )
    metrics: dict[str, float] = {
        "ttft_p50_s": percentile(first, 50), "ttft_p99_s": percentile(first, 99),
        "tbt_p50_ms": percentile(flat, 50) * 1e3, "tbt_p99_ms": percentile(flat, 99) * 1e3,
        "tbt_max_ms": max(flat) * 1e3, "output_tok_s": tokens / max(total, 1e-9),
        "goodput_req_s": good / max(total, 1e-9), "tokens": tokens, "total_s": total,
        "waiting_mean": _time_mean(run), "waiting_max": max(at.waiting for at in run.samples),
        "failed": sum(one.error is not None for one in run.served),
    }
    window = contended(run.served)
    if window is not None:
        metrics["jain_index"] = jain(list(service_by_user(run.served, *window).values()))
        metrics["jain_window_s"] = window[1] - window[0]
    return metrics


def _time_mean(run: Run) -> float:
    """Waiting requests, each sample holding since the one before."""
    area = before = 0.0
    for sample in run.samples:
        area += sample.waiting * (sample.time_s - before)
        before = sample.time_s
    return area / before if before else 0.0


def timeline(run: Run, points: int = 200) -> Mapping[str, list[float]]:
    """At most about `points` samples as columns: time_s, waiting, live, pages_in_use."""
    every = max(1, -(-len(run.samples) // points))
    kept = run.samples[::every]
    return {
        "time_s": [round(sample.time_s, 4) for sample in kept],
        "waiting": [sample.waiting for sample in kept],
        "live": [sample.live for sample in kept],
        "pages_in_use": [sample.pages_in_use for sample in kept],
    }
