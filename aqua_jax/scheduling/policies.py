"""Policies: the order in which sequences are served, and who gives way.

The scheduler knows pages, slots and budgets; a policy knows only order. `fcfs` and `priority` are
here, `fair` has its own file. Whether what gives way is copied to a store or recomputed is no
matter of policy: `fcfs_swap` is `fcfs` with stores below the pool.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from sortedcontainers import SortedKeyList

from aqua_jax.errors import ConfigError
from aqua_jax.paging.pages import PagePool
from aqua_jax.scheduling.bounds import WaitingBound
from aqua_jax.scheduling.cost import Costs
from aqua_jax.scheduling.fair import Fair
from aqua_jax.scheduling.guard import Budget, Guard
from aqua_jax.scheduling.limits import SchedulerConfig
from aqua_jax.scheduling.sequence import Sequence, Standing

_WRITE_BEHIND = 1  # sequences of the worst rank whose pages are copied ahead: most never go


class Policy(Protocol):
    """Who is served first. Holds the waiting queue; the scheduler holds everything else."""

    timeless: bool  # service, costs and time change nothing: not the order, nor who gives way

    def bind(
        self, costs: Costs, price: Callable[[Sequence], float],
        keeps: Callable[[], bool] | None, guard: Guard,
    ) -> None:
        """Called once, by the scheduler: what things cost; what it costs the others when a running
        sequence gives way, in decode tokens; whether there is room now for its pages in a store
        (None: there are no stores); and how much of that may be spent."""

    def push(self, sequence: Sequence) -> None:
        """Puts a sequence into the waiting queue: new, forked, or preempted."""

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out of the waiting queue, admitted or ended."""

    def head(self, now: float) -> Sequence | None:
        """The waiting sequence to admit next. While it doesn't fit, nobody overtakes it."""

    def __len__(self) -> int:
        """Sequences in the waiting queue."""

    @property
    def growth_steps(self) -> float:
        """Decode steps of a slice, for which everyone admitted must find pages, whatever the
        scheduler's own `growth_tokens`; 0: there are no slices."""

    def begin(self, now: float, running: int) -> None:
        """A plan begins, with so many sequences running."""

    def admitted(self, sequence: Sequence) -> None:
        """A sequence has left the queue with a slot and pages."""

    def yielding(self, head: Sequence, running: Iterable[Sequence]) -> Iterable[Sequence]:
        """Running sequences that may be made to give way to the head of the queue where it does
        not fit, first to go first, as many as the guard affords. Read before anything changes,
        perhaps only its beginning."""

    def running_order(self, running: Iterable[Sequence], now: float) -> list[Sequence]:
        """Running sequences, first served first."""

    def victim(self, candidates: Iterator[Sequence]) -> Sequence:
        """Who gives up its pages. Candidates come last served first and end with the one in need;
        sequences already in the step are not among them."""

    def leaving_next(self, running: Iterable[Sequence]) -> list[Sequence]:
        """Running sequences that are likely to give way soon, the likeliest first."""

    def on_service(self, sequence: Sequence, *, tokens: int = 0, price: float = 0.0) -> None:
        """Service a sequence received: tokens of a step, and the price of the copies that its
        coming and going asks for, in decode tokens."""

    def on_finish(self, sequence: Sequence) -> None:
        """The sequence ended; it is in no queue any more."""

    def waiting_bound(
        self, limits: SchedulerConfig, pool: PagePool, run_ahead: int = 1,
        dearest: Callable[[int, int], float] | None = None,
    ) -> WaitingBound | None:
        """The longest wait of a runnable sequence under the present load, where there is one."""

    def standing(self, sequence: Sequence) -> Standing | None:
        """Where a sequence stands; None: no account of it is kept."""


class _Ranked:
    """The order of a key that never changes, ties by `seq_id`. Preempted sequences keep their
    place. O(log n) to push and remove, O(1) for the head."""

    growth_steps = 0.0
    timeless = True

    def __init__(self, key: Callable[[Sequence], tuple[float, int]]) -> None:
        self._key = key
        self._waiting = SortedKeyList(key=key)

    def bind(
        self, costs: Costs, price: Callable[[Sequence], float],
        keeps: Callable[[], bool] | None, guard: Guard,
    ) -> None:
        """Ranks don't depend on costs."""

    def push(self, sequence: Sequence) -> None:
        """Queues by rank."""
        self._waiting.add(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Unqueues; ValueError if it isn't queued."""
        self._waiting.remove(sequence)

    def head(self, now: float) -> Sequence | None:
        """The best rank."""
        return self._waiting[0] if self._waiting else None

    def __len__(self) -> int:
        return len(self._waiting)

    def begin(self, now: float, running: int) -> None:
        """Time doesn't change ranks."""

    def admitted(self, sequence: Sequence) -> None:
        """Nothing is granted."""

    def yielding(self, head: Sequence, running: Iterable[Sequence]) -> Iterable[Sequence]:
        """Nobody: what runs goes on."""
        return []

    def running_order(self, running: Iterable[Sequence], now: float) -> list[Sequence]:
        """By rank. They were admitted almost in this order, so the sort is nearly linear."""
        return sorted(running, key=self._key)

    def victim(self, candidates: Iterator[Sequence]) -> Sequence:
        """The worst rank, be it the one in need itself."""
        return next(candidates)

    def leaving_next(self, running: Iterable[Sequence]) -> list[Sequence]:
        """The worst ranks: they go when pages run short."""
        return sorted(running, key=self._key, reverse=True)[:_WRITE_BEHIND]

    def on_service(self, sequence: Sequence, *, tokens: int = 0, price: float = 0.0) -> None:
        """Service doesn't change ranks."""

    def on_finish(self, sequence: Sequence) -> None:
        """Nothing is kept about a sequence."""

    def waiting_bound(
        self, limits: SchedulerConfig, pool: PagePool, run_ahead: int = 1,
        dearest: Callable[[int, int], float] | None = None,
    ) -> WaitingBound | None:
        """None: others may run for as long as they like."""
        return None

    def standing(self, sequence: Sequence) -> Standing | None:
        """None: its rank is all there is."""
        return None


class FirstComeFirstServed(_Ranked):
    """By arrival, ties by `seq_id`; the latest arrival gives way."""

    def __init__(self) -> None:
        super().__init__(lambda sequence: (sequence.arrival, sequence.seq_id))


class StrictPriority(_Ranked):
    """Lower `priority` first, and it takes the place of higher ones that run.

    Ageing: a sequence that has waited `ageing_s` longer ranks as one level better, so the rank is
    `arrival + ageing_s * priority`, which never changes. Age helps to be admitted, not to take
    running sequences off: only a better level does that, at once as long as the guard bears it.
    Beyond that the better ones wait for the first place that comes free.
    """

    timeless = False  # budgets change who gives way

    def __init__(self, ageing_s: float = 30.0) -> None:
        """`ageing_s`: seconds of waiting that make up for one level.

        Raises:
          ConfigError: it is not a number > 0.
        """
        if not 0.0 < ageing_s < math.inf:
            raise ConfigError("ageing_s", ageing_s, "seconds > 0")
        super().__init__(lambda s: (s.arrival + ageing_s * s.priority, s.seq_id))
        self._price: Callable[[Sequence], float] = lambda sequence: 0.0
        self._budget = Budget(math.inf)

    def bind(
        self, costs: Costs, price: Callable[[Sequence], float],
        keeps: Callable[[], bool] | None, guard: Guard,
    ) -> None:
        """What it costs to take somebody off, and how much of that may be spent."""
        self._price, self._budget = price, guard.turns

    def yielding(self, head: Sequence, running: Iterable[Sequence]) -> Iterator[Sequence]:
        """Those of a worse level and a worse rank, worst first."""
        rank, price = self._key(head), 0.0
        worse = [s for s in running if s.priority > head.priority and self._key(s) > rank]
        for sequence in sorted(worse, key=self._key, reverse=True):
            price += self._price(sequence)
            if not self._budget.bears(price):
                return
            yield sequence


POLICIES: dict[str, Callable[[], Policy]] = {
    "fair": Fair, "fcfs": FirstComeFirstServed, "fcfs_swap": FirstComeFirstServed,
    "priority": StrictPriority,
}
