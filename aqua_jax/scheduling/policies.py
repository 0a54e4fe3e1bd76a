"""Policies: the order in which sequences are served, and who gives way.

The scheduler knows pages, slots and budgets; a policy knows only order. What is still to come
plugs in here:

- *fair*: `push` and `head` over a two-level queue (users by vruntime, then requests by vruntime);
  `running_order` by vruntime; `on_service` adds weighted service to request and user. Waiting
  requests receive no service, so sorted keys stay valid while they are queued, and a user's key
  is updated in one place. Time slices end by one more question at the top of `Scheduler.plan`
  (whose slice is over?) answered with the same `_preempt`.
- *priority*: other keys, with ageing as `arrival - boost * priority`.
- *swapping*: `Scheduler._preempt` is the only place where a sequence loses its pages; a cost model
  chooses there between recompute and a store, and the plan carries the moves beside `copies`.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from typing import Protocol

from sortedcontainers import SortedKeyList

from aqua_jax.scheduling.sequence import Sequence

_BY_ARRIVAL = operator.attrgetter("arrival", "seq_id")


class Policy(Protocol):
    """Who is served first. Holds the waiting queue; the scheduler holds everything else."""

    def push(self, sequence: Sequence) -> None:
        """Puts a sequence into the waiting queue: new, forked, or preempted."""

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out of the waiting queue, admitted or ended."""

    def head(self, now: float) -> Sequence | None:
        """The waiting sequence to admit next. While it doesn't fit, nobody overtakes it."""

    def __len__(self) -> int:
        """Sequences in the waiting queue."""

    def running_order(self, running: Iterable[Sequence], now: float) -> list[Sequence]:
        """Running sequences, first served first."""

    def victim(self, candidates: Iterator[Sequence]) -> Sequence:
        """Who gives up its pages. Candidates come last served first and end with the one in need;
        sequences already in the step are not among them."""

    def on_service(
        self, sequence: Sequence, *, tokens: int = 0, seconds: float = 0.0, moved_bytes: int = 0
    ) -> None:
        """Service a sequence received: the scheduler reports tokens, the engine the rest."""

    def on_finish(self, sequence: Sequence) -> None:
        """The sequence ended; it is in no queue any more."""


class FirstComeFirstServed:
    """By arrival, ties by `seq_id`; the latest arrival gives way. Preempted sequences keep their
    place. O(log n) to push and remove, O(1) for the head."""

    def __init__(self) -> None:
        self._waiting = SortedKeyList(key=_BY_ARRIVAL)

    def push(self, sequence: Sequence) -> None:
        """Queues by arrival."""
        self._waiting.add(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Unqueues; ValueError if it isn't queued."""
        self._waiting.remove(sequence)

    def head(self, now: float) -> Sequence | None:
        """The earliest arrival."""
        return self._waiting[0] if self._waiting else None

    def __len__(self) -> int:
        return len(self._waiting)

    def running_order(self, running: Iterable[Sequence], now: float) -> list[Sequence]:
        """By arrival. They were admitted almost in this order, so the sort is nearly linear."""
        return sorted(running, key=_BY_ARRIVAL)

    def victim(self, candidates: Iterator[Sequence]) -> Sequence:
        """The latest arrival, be it the one in need itself."""
        return next(candidates)

    def on_service(
        self, sequence: Sequence, *, tokens: int = 0, seconds: float = 0.0, moved_bytes: int = 0
    ) -> None:
        """Service doesn't change the order of arrival."""

    def on_finish(self, sequence: Sequence) -> None:
        """Nothing is kept about a sequence."""


POLICIES: dict[str, type[FirstComeFirstServed]] = {"fcfs": FirstComeFirstServed}
