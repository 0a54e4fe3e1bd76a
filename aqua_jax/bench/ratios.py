"""Ratios of runs made in turn on one machine, with intervals. No jax.

A machine's speed drifts by more than what is compared, so each ratio is of two runs of the same
repeat, and what counts is the median over repeats. Its interval comes from order statistics (the
sign test turned around), which assume nothing about how the noise is distributed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

Interval = dict[str, float]  # {"median", "low", "high", "n", "coverage"}
_COVERAGE = 0.95


def interval(values: Sequence[float]) -> Interval:
    """The median and an interval that covers the true one.

    Args:
      values: at least one.

    Returns:
      low and high are the narrowest pair of order statistics that covers the median with 95%
      probability, or the extremes where there are too few values; coverage says what it is.
    """
    ordered = sorted(values)
    count = len(ordered)
    place, coverage = 0, 1.0 - 2.0 * 0.5**count
    outside = 0.5**count
    for index in range(1, (count + 1) // 2):
        outside += math.comb(count, index) * 0.5**count
        if 1.0 - 2.0 * outside < _COVERAGE:
            break
        place, coverage = index, 1.0 - 2.0 * outside
    return {
        "median": _digits(statistics.median(ordered)), "low": _digits(ordered[place]),
        "high": _digits(ordered[count - 1 - place]), "n": count, "coverage": round(coverage, 4),
    }


def _digits(value: float) -> float:
    return float(f"{value:.5g}")


def ratios(
    measured: Mapping[str, Sequence[Mapping[str, float]]], baseline: str | None,
) -> dict[str, dict[str, Interval]]:
    """How runs compare.

    Args:
      measured: by name, metrics of each repeat; "floor" and "ideal" are compared against.
      baseline: the name that others are compared with; None: no such comparison.

    Returns:
      By name, where there is something to compare with:
        ttft_p99_gain: the baseline's TTFT p99 over its own (2: twice as early);
        output_tok_s_share: its output tokens/s over the baseline's;
        ttft_p99_over_floor: its TTFT p99 over the floor's (1: nothing to gain any more);
        output_tok_s_of_ideal: its output tokens/s over the ideal's;
        for the baseline, ttft_ceiling: its own over the floor's, which nobody can gain more than.
    """
    pairs = {
        "ttft_p99_gain": (baseline, "ttft_p99_s", True),
        "output_tok_s_share": (baseline, "output_tok_s", False),
        "ttft_p99_over_floor": ("floor", "ttft_p99_s", False),
        "output_tok_s_of_ideal": ("ideal", "output_tok_s", False),
    }
    found: dict[str, dict[str, Interval]] = {}
    for name, runs in measured.items():
        if name in ("floor", "ideal"):
            continue
        own: dict[str, Interval] = {}
        for label, (other, metric, inverse) in pairs.items():
            if other is None or other == name or other not in measured:
                continue
            quotients = [
                (theirs[metric] / ours[metric]) if inverse else (ours[metric] / theirs[metric])
                for ours, theirs in zip(runs, measured[other], strict=True)
                if ours[metric] > 0 and theirs[metric] > 0
            ]
            if quotients:
                is_ceiling = label == "ttft_p99_over_floor" and name == baseline
                own["ttft_ceiling" if is_ceiling else label] = interval(quotients)
        if own:
            found[name] = own
    return found


def lines(found: Mapping[str, Mapping[str, Interval]]) -> list[str]:
    """The ratios for people."""
    shown = []
    for name, own in found.items():
        for label, one in own.items():
            shown.append(
                f"  {name:<12}{label:<24}{one['median']:>9.4g}  [{one['low']:.4g} - "
                f"{one['high']:.4g}] of {one['n']:.0f} pairs, {one['coverage'] * 100:.3g}%"
            )
    return shown
