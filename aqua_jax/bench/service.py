"""Figures of an open-loop run: latencies, throughput, goodput, fairness between users. No jax."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from aqua_jax.bench.latency import percentile
from aqua_jax.bench.open_loop import Run, Sample, Served


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
    """Prompt and output tokens each user got within (begin, end].

    A prompt counts when its first token comes. Weights of requests divide their user's share, so
    they don't count here.
    """
    service: dict[str, float] = {}
    for one in served:
        tokens = sum(begin < at <= end for at in one.tokens)
        if one.tokens and begin < one.tokens[0] <= end:
            tokens += one.request.prompt
        user = one.request.user
        service[user] = service.get(user, 0.0) + tokens
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


def windowed_jain(served: Sequence[Served], window_s: float) -> list[float]:
    """Jain's index of the users' service in each of the windows of `window_s` that lie one after
    the other in the time in which all have work; empty when none fits."""
    whole = contended(served)
    if whole is None or window_s <= 0:
        return []
    begin, end = whole
    count = int((end - begin) / window_s)
    starts = [begin + index * window_s for index in range(count)]
    return [
        jain(list(service_by_user(served, start, start + window_s).values())) for start in starts
    ]


def run_metrics(run: Run, *, ttft_slo_s: float, tbt_slo_s: float) -> dict[str, float]:
    """What users felt.

    Args:
      run: at least one request got a token.
      ttft_slo_s, tbt_slo_s: a request is good when its first token came within the one and its
        mean time between tokens is within the other.

    Returns:
      ttft_*_s from when the request was due; tbt_*_ms over all gaps of all requests (max: the
      worst), if there are any; output_tok_s; goodput_req_s: good requests a second; waiting_mean
      (over time) and waiting_max: requests without a token; resident_mean: sequences in the steps;
      failed. Where the engine states a bound: bound_steps, the largest while the load ran, and what
      `_bounds` says. With several users that compete, jain_index of their service and
      jain_window_s, the time it was taken over; where windows of 20 bounds fit into that time,
      jain_worst, the least of theirs, and jain_windows, how many.

    Raises:
      RuntimeError: no request got a token.
    """
    answered = [one for one in run.served if one.tokens]
    if not answered:
        raise RuntimeError(f"no request got a token: {run.served[0].error}")
    first = [one.tokens[0] - one.due for one in answered]
    every = [gaps(one) for one in answered]
    flat = [gap for own in every for gap in own]
    total = max(one.tokens[-1] for one in answered)
    tokens = sum(len(one.tokens) for one in answered)
    good = sum(
        one.error is None and ttft <= ttft_slo_s and sum(own) <= tbt_slo_s * max(len(own), 1)
        for one, ttft, own in zip(answered, first, every, strict=True)
    )
    metrics: dict[str, float] = {
        "ttft_p50_s": percentile(first, 50), "ttft_p99_s": percentile(first, 99),
    }
    if flat:
        metrics |= {
            "tbt_p50_ms": percentile(flat, 50) * 1e3, "tbt_p99_ms": percentile(flat, 99) * 1e3,
            "tbt_max_ms": max(flat) * 1e3,
        }
    metrics |= {
        "output_tok_s": tokens / max(total, 1e-9),
        "goodput_req_s": good / max(total, 1e-9), "tokens": tokens, "total_s": total,
        "waiting_mean": _time_mean(run, "waiting"),
        "waiting_max": max(at.waiting for at in run.samples),
        "resident_mean": resident_mean(run),
        "failed": sum(one.error is not None for one in run.served),
    }
    metrics |= _bounds(run)
    window = contended(run.served)
    if window is not None:
        metrics["jain_index"] = jain(list(service_by_user(run.served, *window).values()))
        metrics["jain_window_s"] = window[1] - window[0]
        step_s = total / max((one.steps[-1] for one in answered if one.steps), default=1)
        windows = windowed_jain(run.served, 20 * metrics.get("bound_steps", 0.0) * step_s)
        if windows:
            metrics |= {"jain_worst": min(windows), "jain_windows": len(windows)}
    return metrics


def _bounds(run: Run) -> dict[str, float]:
    """Waits in steps, beside the bound that the engine states.

    Returns:
      wait_max_steps: the longest from a request's arrival to its first token or between two of its
      tokens; bound_steps: the largest bound stated; bound_violations: waits longer than that.
    """
    waits = [
        later - earlier
        for one in run.served
        for earlier, later in itertools.pairwise([one.sent_step, *one.steps])
    ]
    if not waits:
        return {}
    found: dict[str, float] = {"wait_max_steps": max(waits)}
    bounds = [at.bound_steps for at in run.samples if at.bound_steps is not None]
    if bounds and max(bounds) < math.inf:
        found["bound_steps"] = max(bounds)
        found["bound_violations"] = sum(wait > max(bounds) for wait in waits)
    return found


def resident_mean(run: Run) -> float:
    """Sequences in the steps, in the mean over time."""
    return _time_mean(run, "running")


def _time_mean(run: Run, name: str) -> float:
    """A field of the samples in the mean over time, each holding since the one before."""
    area = before = 0.0
    for sample in run.samples:
        area += getattr(sample, name) * (sample.time_s - before)
        before = sample.time_s
    return area / before if before else 0.0


def timeline(run: Run, points: int = 200) -> dict[str, list[float]]:
    """At most about `points` samples as columns; see `columns`."""
    every = max(1, -(-len(run.samples) // points))
    return columns(run, run.samples[::every])


def columns(run: Run, samples: Sequence[Sample]) -> dict[str, list[float]]:
    """Samples as columns: time_s, waiting, live, running, pages_in_use, and where there are stores
    bytes_out, bytes_in, and the pages in use of each as NAME_pages."""
    names = ["waiting", "live", "running", "pages_in_use"]
    if run.stores_total:
        names += ["bytes_out", "bytes_in"]
    found: dict[str, list[float]] = {"time_s": [round(one.time_s, 4) for one in samples]}
    found |= {name: [getattr(one, name) for one in samples] for name in names}
    for store in run.stores_total:
        found[f"{store}_pages"] = [one.stores.get(store, 0) for one in samples]
    return found
