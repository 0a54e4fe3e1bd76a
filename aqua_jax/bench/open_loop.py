"""Sends requests when they are due, whatever the engine's state, and notes what comes. No jax.

Latencies count from when a request was due, not from when a busy loop came round to sending it:
otherwise a slow engine would hide its own queue (coordinated omission).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from aqua_jax.bench import counters
from aqua_jax.bench.counters import stores
from aqua_jax.bench.traces import TraceRequest
from aqua_jax.config import SamplingParams

SAMPLE_EVERY_S = 0.02
# The same as a share of the run so far: a look takes 0.2-0.4 ms of the engine's thread, 1-2% of a
# step, and most under policies that state a bound.
SAMPLE_SHARE = 1 / 200


class Clock(Protocol):
    """Time as the loop sees it."""

    def now(self) -> float:
        """Seconds; the engine's clock, `time.monotonic()`, or a test's."""
        ...

    def sleep(self, seconds: float) -> None:
        """Returns after so long."""


class SystemClock:
    """The machine's clock."""

    def now(self) -> float:
        """Seconds of `time.monotonic()`."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Sleeps."""
        time.sleep(seconds)


@dataclasses.dataclass
class Served:
    """What became of one request.

    Attributes:
      request: what was asked.
      due: seconds after the run's start.
      tokens: when each token arrived, seconds after the run's start.
      steps: in which of the run's steps that was, from 1 on.
      sent_step: steps made before the engine knew of it.
      error: why it failed; None: it didn't.
    """

    request: TraceRequest
    due: float
    tokens: list[float] = dataclasses.field(default_factory=list)
    steps: list[int] = dataclasses.field(default_factory=list)
    sent_step: int = 0
    error: str | None = None


@dataclasses.dataclass(frozen=True)
class Sample:
    """The engine at one time.

    Attributes:
      time_s: seconds after the run's start.
      waiting: requests that are due and have no token yet.
      live: requests that are due and not finished.
      pages_in_use: of the KV pool.
      running: sequences that hold a place in the steps.
      stores: pages in use by tier below the pool.
      bytes_out, bytes_in: moved from the pool to stores and back, since the run's start.
      bound_steps: steps that a runnable sequence waits at most; None: no bound.
    """

    time_s: float
    waiting: int
    live: int
    pages_in_use: int
    running: int = 0
    stores: Mapping[str, int] = dataclasses.field(default_factory=dict)
    bytes_out: int = 0
    bytes_in: int = 0
    bound_steps: float | None = None


@dataclasses.dataclass
class Run:
    """One run: every request in order of arrival, samples of the engine, what its counters say.

    Attributes:
      served: by arrival.
      samples: now and then (`sample_due`), and at the end.
      pages_total: of the KV pool.
      stores_total: pages by tier below the pool.
      counters: what the engine's counters rose by; see `counters.difference`.
    """

    served: list[Served]
    samples: list[Sample]
    pages_total: int
    stores_total: Mapping[str, int] = dataclasses.field(default_factory=dict)
    counters: Mapping[str, float] = dataclasses.field(default_factory=dict)


def serve(
    engine: Any, requests: Sequence[TraceRequest], prompts: Sequence[Sequence[int]], clock: Clock
) -> Run:
    """Runs a load to its end.

    Between requests an idle engine costs nothing: the loop sleeps until the next one is due.

    Args:
      engine: idle; `add_request`, `step`, `has_unfinished` and `stats` are used.
      requests: by arrival.
      prompts: token ids of each.
      clock: the engine's.

    Returns:
      What was seen. A request that failed has its error and the tokens before it.

    Raises:
      RequestError: the engine refused a request.
    """
    served = [Served(request, request.arrival_s) for request in requests]
    by_id = {f"bench-{index}": one for index, one in enumerate(served)}
    names = list(by_id)
    samples: list[Sample] = []
    sent = started = finished = steps = 0
    before = engine.stats()
    start = clock.now()
    while sent < len(served) or engine.has_unfinished():
        now = clock.now() - start
        while sent < len(served) and served[sent].due <= now:
            one = served[sent].request
            engine.add_request(
                names[sent], list(prompts[sent]),
                SamplingParams(
                    temperature=0.0, max_tokens=one.output, ignore_eos=True, detokenize=False
                ),
                priority=one.priority, user=one.user, weight=one.weight,
                arrival=start + served[sent].due,
            )
            served[sent].sent_step = steps
            sent += 1
        if not engine.has_unfinished():
            clock.sleep(served[sent].due - now)
            continue
        outputs = engine.step()
        steps += 1
        now = clock.now() - start
        for output in outputs:
            known = by_id[output.request_id]
            fresh = len(output.outputs[0].token_ids) - len(known.tokens)
            started += fresh > 0 and not known.tokens
            known.tokens += [now] * fresh
            known.steps += [steps] * fresh
            if output.finished:
                finished += 1
                known.error = output.error
                started += not known.tokens  # it no longer waits
        if sample_due(samples, now) or finished == len(served):
            samples.append(_sample(engine.stats(), before, now, sent - started, sent - finished))
    after = engine.stats()
    totals = {name: one["capacity"] for name, one in stores(after).items()}
    return Run(
        served, samples, after["pages"]["total"], totals, counters.difference(before, after)
    )


def sample_due(samples: Sequence[Sample], now: float) -> bool:
    """Whether to look at the engine again, `now` seconds after the run's start."""
    return not samples or now - samples[-1].time_s >= max(SAMPLE_EVERY_S, SAMPLE_SHARE * now)


def _sample(
    stats: Mapping[str, Any], before: Mapping[str, Any], now: float, waiting: int, live: int
) -> Sample:
    moved = counters.difference(before, stats)
    return Sample(
        now, waiting, live, stats["pages"]["in_use"], stats.get("running", live - waiting),
        {name: one["in_use"] for name, one in stores(stats).items()},
        int(moved.get("bytes_out", 0)), int(moved.get("bytes_in", 0)),
        stats.get("waiting_bound_steps"),
    )
