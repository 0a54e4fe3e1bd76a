"""What Prometheus sees: the engine's counters as they are, and latencies as the server sees them.

The step loop counts for itself whether or not anybody asks; a scrape turns one snapshot of
`Engine.stats()` into samples. Histograms are filled on the event loop, two bisections a state.
"""

from __future__ import annotations

import bisect
import itertools
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from aqua_jax.engine.outputs import RequestOutput

_FIRST_TOKEN_S = (
    0.001, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
    40.0, 80.0, 160.0, 640.0,
)
_GAP_S = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5,
    5.0, 10.0,
)
_TICK_S = 1.0 / os.sysconf("SC_CLK_TCK")


class Histogram:
    """Counts of values by upper bound. For one thread alone."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum: float = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """`times` values of `value`."""
        self.counts[bisect.bisect_left(self.bounds, value)] += times
        self.sum += value * times

    def family(self, name: str, text: str) -> HistogramMetricFamily:
        """As Prometheus wants it: cumulative."""
        names = (*map(str, self.bounds), "+Inf")
        totals = itertools.accumulate(self.counts)
        buckets = [(name, float(total)) for name, total in zip(names, totals, strict=True)]
        return HistogramMetricFamily(name, text, buckets=buckets, sum_value=self.sum)


class Watch:
    """The latencies of one request as its states pass."""

    __slots__ = ("_latencies", "_seen_at", "_streamed", "_tokens")

    def __init__(self, latencies: Latencies, streamed: bool) -> None:
        self._latencies, self._streamed = latencies, streamed
        self._tokens, self._seen_at = 0, 0.0

    def saw(self, output: RequestOutput) -> None:
        """A newer state has come; several tokens at once share the time since the last."""
        tokens = max(len(sample.token_ids) for sample in output.outputs)
        metrics, latencies = output.metrics, self._latencies
        if tokens > self._tokens:
            now, new = time.monotonic(), tokens - self._tokens
            if not self._tokens and metrics.first_token_time is not None:
                latencies.first_token.observe(metrics.first_token_time - metrics.arrival_time)
                self._seen_at = metrics.first_token_time
                new -= 1
            if self._streamed and new:
                latencies.gap.observe(max(0.0, now - self._seen_at) / new, new)
            self._tokens, self._seen_at = tokens, now
        if output.finished:
            if metrics.first_token_time is not None:
                latencies.on_end(
                    output.request_id, metrics.first_token_time - metrics.arrival_time
                )
            if metrics.e2e_s is not None:
                latencies.whole.observe(metrics.e2e_s)
            if metrics.tpot_s is not None:
                latencies.per_token.observe(metrics.tpot_s)
            latencies.ended.update(str(sample.finish_reason) for sample in output.outputs)


class Latencies:
    """Histograms over requests.

    Args:
      on_end: called with id and time to first token of a request that has ended.
    """

    def __init__(self, on_end: Callable[[str, float], None] = lambda name, ttft_s: None) -> None:
        self.on_end = on_end
        self.first_token = Histogram(_FIRST_TOKEN_S)
        self.gap = Histogram(_GAP_S)
        self.per_token = Histogram(_GAP_S)
        self.whole = Histogram(_FIRST_TOKEN_S)
        self.ended: Counter[str] = Counter()

    def watch(self, streamed: bool) -> Watch:
        """For one request; `streamed`: every state passes, not the last alone."""
        return Watch(self, streamed)

    def families(self) -> Iterator[Metric]:
        """For a collector."""
        yield self.first_token.family(
            "aqua_time_to_first_token_seconds", "From a request's arrival to its first token."
        )
        yield self.gap.family(
            "aqua_inter_token_seconds", "Between two tokens of streamed answers, as they arrive "
            "at the event loop."
        )
        yield self.per_token.family(
            "aqua_time_per_output_token_seconds", "Mean time of a request's tokens after the first."
        )
        yield self.whole.family("aqua_request_seconds", "From a request's arrival to its end.")
        ended = CounterMetricFamily(
            "aqua_samples_ended", "Samples that have ended, by finish reason.", labels=["reason"]
        )
        for reason, count in sorted(self.ended.items()):
            ended.add_metric([reason], count)
        yield ended


def thread_seconds() -> dict[str, float]:
    """Processor time of this process's live threads, by name without numbers (Linux)."""
    names = {thread.native_id: thread.name for thread in threading.enumerate()}
    found: dict[str, float] = {}
    for task in os.listdir("/proc/self/task"):
        try:
            with open(f"/proc/self/task/{task}/stat", encoding="utf-8") as file:
                head, _, tail = file.read().rpartition(")")
        except OSError:
            continue  # it has just ended
        name = names.get(int(task)) or head.partition("(")[2]
        numbers = tail.split()
        seconds = (int(numbers[11]) + int(numbers[12])) * _TICK_S
        name = re.sub(r"[-_/]?\d+$", "", name) or name
        found[name] = found.get(name, 0.0) + seconds
    return found


# Key of Engine.stats() -> (name, is it a total, what it is).
_PLAIN = {
    "running": ("aqua_sequences_running", False, "Sequences that hold a slot."),
    "waiting": ("aqua_sequences_waiting", False, "Sequences in the queue, preempted ones too."),
    "swapped": ("aqua_sequences_swapped", False, "Preempted sequences whose pages are kept."),
    "waiting_bound_steps": (
        "aqua_waiting_bound_steps", False,
        "Steps that nobody who could run waits longer than, under the present load.",
    ),
    "turn_budget": (
        "aqua_turn_budget", False,
        "Decode tokens' time that others' turns may cost now (--switch_share); below 0: overdrawn.",
    ),
    "shortage_budget": (
        "aqua_shortage_budget", False,
        "Decode tokens' time that running short of pages may cost now; below 0: overdrawn.",
    ),
    "live_requests": ("aqua_requests_live", False, "Requests accepted and not ended."),
    "requests_added": ("aqua_requests", True, "Requests accepted."),
    "requests_finished": ("aqua_requests_finished", True, "Requests ended, however."),
    "requests_aborted": ("aqua_requests_aborted", True, "Requests ended by their client."),
    "requests_failed": ("aqua_requests_failed", True, "Requests ended by an error of ours."),
    "steps": ("aqua_steps", True, "Steps run."),
    "prompt_tokens": ("aqua_prompt_tokens", True, "Prompt tokens computed."),
    "output_tokens": ("aqua_output_tokens", True, "Tokens generated."),
    "cached_tokens": ("aqua_cached_tokens", True, "Prompt tokens found in the prefix cache."),
    "preemptions": ("aqua_preemptions", True, "Sequences that gave way to others."),
    "recomputed_tokens": ("aqua_recomputed_tokens", True, "Tokens computed again."),
    "pool_resets": ("aqua_pool_resets", True, "Device failures that cost the page pool."),
    "host_s": ("aqua_host_seconds", True, "Time of the step loop on the host."),
    "wait_s": ("aqua_device_wait_seconds", True, "Time that loop waited for the device."),
}


def engine_families(stats: Mapping[str, Any]) -> Iterator[Metric]:
    """What `Engine.stats()` says, as far as it says it."""
    for key, (name, total, text) in _PLAIN.items():
        if isinstance(stats.get(key), (int, float)):
            kind = CounterMetricFamily if total else GaugeMetricFamily
            yield kind(name, text, value=stats[key])
    paging = stats.get("paging") or {}
    pages = GaugeMetricFamily(
        "aqua_pages", "KV pages by where they are and what for.", labels=["tier", "state"]
    )
    pool = stats.get("pages", {})
    for state in ("in_use", "cached", "free"):
        pages.add_metric(["pool", state], pool.get(state, 0))
    for state in ("lent", "wanted_back", "emptying") if stats.get("lending") else ():
        pages.add_metric(["pool", state], stats["lending"][state])
    for store in paging.get("stores", ()):
        for state in ("in_use", "free"):
            pages.add_metric([store["name"], state], store.get(state, 0))
    yield pages
    # Of the host tier more than what is used and free: it takes memory as it fills.
    most = GaugeMetricFamily(
        "aqua_pages_capacity", "KV pages that a tier may come to hold.", labels=["tier"]
    )
    most.add_metric(["pool"], pool.get("total", 0))
    for store in paging.get("stores", ()):
        most.add_metric([store["name"]], store.get("capacity", 0))
    yield most
    moved = CounterMetricFamily(
        "aqua_paged_bytes", "Bytes moved between the pool and stores.", labels=["direction"]
    )
    for direction in ("out", "in"):
        moved.add_metric([direction], paging.get(f"bytes_{direction}", 0))
    yield moved
    yield from _lender_families(paging)
    others = GaugeMetricFamily(
        "aqua_engine_stat", "Every number of Engine.stats(), by its path.", labels=["key"]
    )
    for path, number in _leaves(stats, ""):
        others.add_metric([path], number)
    yield others


def _lender_families(paging: Mapping[str, Any]) -> Iterator[Metric]:
    """Whose memory pages are in, by lender, and what has moved there and back."""
    pages = GaugeMetricFamily(
        "aqua_lender_pages", "Pages of lenders' memory.", labels=["lender", "state"]
    )
    moved = CounterMetricFamily(
        "aqua_lender_bytes", "Bytes moved to lenders' memory and back.",
        labels=["lender", "direction"],
    )
    memory = GaugeMetricFamily(
        "aqua_lender_memory", "1 for each lender there is: kind of memory, how it is shared.",
        labels=["lender", "kind", "shared_by"],
    )
    for store in paging.get("stores", ()):
        for lender in store.get("lenders", ()):
            for state in ("in_use", "capacity", "wanted"):
                pages.add_metric([lender["lender"], state], lender[state])
            for direction in ("out", "in"):
                moved.add_metric([lender["lender"], direction], lender[f"bytes_{direction}"])
            if lender.get("kind"):
                memory.add_metric([lender["lender"], lender["kind"], lender["shared_by"]], 1)
    yield memory
    yield pages
    yield moved


def _leaves(value: Any, path: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, (int, float)):
        yield path, float(value)
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else str(key))


class Collector:
    """Everything for one scrape, from a snapshot that is taken before.

    Attributes:
      stats: of the engine; set it, then collect.
    """

    def __init__(self, latencies: Latencies) -> None:
        self.stats: Mapping[str, Any] = {}
        self.live = 0  # requests inside the server
        self.refused = 0  # for want of room
        self._latencies = latencies

    def collect(self) -> Iterator[Metric]:
        """Called by the registry."""
        yield from engine_families(self.stats)
        yield from self._latencies.families()
        yield GaugeMetricFamily("aqua_http_live", "Requests inside the server.", value=self.live)
        yield CounterMetricFamily(
            "aqua_http_refused", "Requests refused because the queue was full.", value=self.refused
        )
        threads = CounterMetricFamily(
            "aqua_thread_cpu_seconds", "Processor time of live threads.", labels=["thread"]
        )
        for name, seconds in sorted(thread_seconds().items()):
            threads.add_metric([name], seconds)
        yield threads
