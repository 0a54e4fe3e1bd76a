"""Latency and throughput figures from arrival times of tokens. No jax."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence

Spread = dict[str, float | int]  # {"median", "min", "max", "n"}


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` percent lie, interpolated between neighbours.

    Args:
      values: not empty, in any order.
      share: 0 to 100.

    Raises:
      ValueError: no values, or a share outside 0..100.
    """
    if not values or not 0 <= share <= 100:
        raise ValueError(f"percentile {share} of {len(values)} values")
    ordered = sorted(values)
    place = (len(ordered) - 1) * share / 100
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def spread(values: Sequence[float]) -> Spread:
    """Median, least and greatest of repeated measurements, to five digits, and their number."""
    def digits(value: float) -> float:
        return float(f"{value:.5g}")

    return {
        "median": digits(statistics.median(values)), "min": digits(min(values)),
        "max": digits(max(values)), "n": len(values),
    }


def fold(repeats: Sequence[Mapping[str, float]]) -> dict[str, Spread]:
    """Repeats of the same metrics, each as its spread over the repeats that have it."""
    names = dict.fromkeys(name for repeat in repeats for name in repeat)
    return {
        name: spread([repeat[name] for repeat in repeats if name in repeat]) for name in names
    }


def request_metrics(start: float, arrivals: Sequence[Sequence[float]]) -> dict[str, float]:
    """What users of requests that all came at once have felt.

    Args:
      start: when the requests were sent, seconds.
      arrivals: for each request, when each of its tokens arrived; at least one token each.

    Returns:
      ttft_*_s: time to first token; tbt_*_ms: time between tokens, over all gaps of all requests;
      worst_stall_p50_ms: median over requests of the longest gap; e2e_*_s: whole time;
      output_tok_s, tokens, total_s: of all together.
    """
    first = [times[0] - start for times in arrivals]
    whole = [times[-1] - start for times in arrivals]
    gaps_by_request = [
        [later - earlier for earlier, later in itertools.pairwise(times)]
        for times in arrivals
    ]
    gaps = [gap for gaps in gaps_by_request for gap in gaps] or [0.0]
    longest = [max(gaps, default=0.0) for gaps in gaps_by_request]
    tokens = sum(len(times) for times in arrivals)
    return {
        "ttft_p50_s": percentile(first, 50),
        "ttft_p99_s": percentile(first, 99),
        "tbt_p50_ms": percentile(gaps, 50) * 1e3,
        "tbt_p99_ms": percentile(gaps, 99) * 1e3,
        "tbt_max_ms": max(gaps) * 1e3,
        "worst_stall_p50_ms": percentile(longest, 50) * 1e3,
        "e2e_p50_s": percentile(whole, 50),
        "e2e_p99_s": percentile(whole, 99),
        "output_tok_s": tokens / max(whole),
        "tokens": tokens,
        "total_s": max(whole),
    }
