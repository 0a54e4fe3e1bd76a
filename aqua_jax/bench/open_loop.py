"""Sends requests when they are due, whatever the engine's state, and notes what comes. No jax.

Latencies count from when a request was due, not from when a busy loop came round to sending it:
otherwise a slow engine would hide its own queue (coordinated omission).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any, Protocol

from aqua_jax.bench.traces import TraceRequest
from aqua_jax.config import SamplingParams

SAMPLE_EVERY_S = 0.02


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
      error: why it failed; None: it didn't.
    """

    request: TraceRequest
    due: float
    tokens: list[float] = dataclasses.field(default_factory=list)
    error: str | None = None


@dataclasses.dataclass(frozen=True)
class Sample:
    """The engine at one time.

    Attributes:
      time_s: seconds after the run's start.
      waiting: requests that are due and have no token yet.
      live: requests that are due and not finished.
      pages_in_use: of the KV pool.
    """

    time_s: float
    waiting: int
    live: int
    pages_in_use: int


@dataclasses.dataclass
class Run:
    """One run: every request in order of arrival, and samples of the engine."""

    served: list[Served]
    samples: list[Sample]
    pages_total: int


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
    sent = started = finished = 0
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
                user=one.user, weight=one.weight, arrival=start + served[sent].due,
            )
            sent += 1
        if not engine.has_unfinished():
            clock.sleep(served[sent].due - now)
            continue
        outputs = engine.step()
        now = clock.now() - start
        for output in outputs:
            known = by_id[output.request_id]
            fresh = len(output.outputs[0].token_ids) - len(known.tokens)
            started += fresh > 0 and not known.tokens
            known.tokens += [now] * fresh
            if output.finished:
                finished += 1
                known.error = output.error
                started += not known.tokens  # it no longer waits
        if not samples or now - samples[-1].time_s >= SAMPLE_EVERY_S or finished == len(served):
            in_use = engine.stats()["pages"]["in_use"]
            samples.append(Sample(now, sent - started, sent - finished, in_use))
    return Run(served, samples, engine.stats()["pages"]["total"])
