"""How long a plan repeats itself, and those repetitions without the work of planning anew.

Most steps of a loaded engine are the same decodes, each one token further: no prompt, nobody who
comes, goes or gives way. Two things end that: an event (an arrival, an end, a move that has ended),
which whoever drives the scheduler knows of, and a decision. `holds` says how long no decision can
come from pages or length stops. Turns, admissions and moves depend on measured costs as well, so
`Coast` asks for them before each step; but since the step before is known not to have freed a page,
whoever didn't fit then doesn't fit now, and none of the rest is looked at again.

A coasted step leaves everything as `Scheduler.plan` would have left it: page tables, counters, the
policy's accounts, which cached page goes first (`tests/simulation/test_skipping.py`). It is for
whoever has no use for the plans themselves: the simulator.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from collections.abc import Sequence as Sequence_
from typing import Protocol

from aqua_jax.paging.moves import Move
from aqua_jax.paging.pages import PagePool
from aqua_jax.paging.residency import Residency
from aqua_jax.scheduling.guard import Guard
from aqua_jax.scheduling.holdings import Holdings
from aqua_jax.scheduling.limits import SchedulerConfig, SchedulerCounters
from aqua_jax.scheduling.plan import Draft, Plan
from aqua_jax.scheduling.policies import Policy
from aqua_jax.scheduling.room import AHEAD_STEPS, Room
from aqua_jax.scheduling.sequence import Sequence
from aqua_jax.scheduling.slots import Slots


class Scheduler(Protocol):
    """What is looked at of a scheduler, and kept up while it coasts."""

    config: SchedulerConfig
    counters: SchedulerCounters
    policy: Policy
    pool: PagePool
    residency: Residency | None
    holdings: Holdings
    room: Room
    slots: Slots
    guard: Guard


def holds(scheduler: Scheduler, plan: Plan, running: Collection[Sequence]) -> int:
    """For how many further steps the decodes of a plan just made go on as they are, as far as
    pages and length stops are concerned, if nothing arrives and nobody gives way. 0 unless the
    plan is decodes alone, of all `running` sequences whose pages have arrived. O(running).
    """
    chunks = plan.chunks
    if not chunks or plan.copies or plan.num_tokens != len(chunks) or scheduler.pool.draining:
        return 0
    decoding = [chunk.sequence for chunk in chunks]
    steps = min(one.max_total_tokens - one.total_len for one in decoding)
    if steps <= 0 or not all(chunk.sample for chunk in chunks):
        return 0
    if len(running) != len(decoding):
        among = set(decoding)
        others = (one for one in running if one not in among)
        if any(one.complete or scheduler.holdings.ready(one) for one in others):
            return 0
    return _until_short(scheduler, decoding, steps)


def _until_short(scheduler: Scheduler, decoding: Sequence_[Sequence], steps: int) -> int:
    """How many of the next steps there are pages for, without anybody having to go."""
    pool = scheduler.pool
    ahead = 0 if scheduler.residency is None else AHEAD_STEPS  # as `Scheduler` makes room
    if len(decoding) * ((steps + ahead) // pool.page_tokens + 1) <= pool.available:
        return steps
    least, most = 0, steps  # bisect: what they need only grows
    while least < most:
        middle = (least + most + 1) // 2
        if _needed(decoding, middle - 1 + ahead, pool.page_tokens) <= pool.available:
            least = middle
        else:
            most = middle - 1
    return least


def _needed(decoding: Sequence_[Sequence], further: int, page_tokens: int) -> int:
    """Pages that so many tokens more than those known ask for, beyond the pages held."""
    return sum(
        max(0, -(-min(one.total_len + further, one.max_total_tokens - 1) // page_tokens)
            - len(one.pages))
        for one in decoding
    )


class Coast:
    """The steps after a plan, as long as they repeat it.

    Between two steps its user may accept tokens (`accept`) and report moves that have ended, as
    between two plans. After anything else that happens to the scheduler it must be thrown away.

    Attributes:
      order: the sequences of the last step, in the order of its chunks.
      moves: of the last step, to be handed over with it.
    """

    def __init__(
        self, scheduler: Scheduler, plan: Plan, running: Collection[Sequence],
        head: Callable[[float], Sequence | None],
        commit: Callable[[Draft, float], Plan | None],
    ) -> None:
        """
        Args:
          scheduler: that coasts.
          plan: just made.
          running: the scheduler's.
          head: of the queue, if it could be admitted as far as its tokens are concerned.
          commit: the last stage of planning.
        """
        self._scheduler, self._running = scheduler, running
        self._next, self._commit = head, commit
        self._left = plan.holds
        self.order = [chunk.sequence for chunk in plan.chunks]
        self.moves: tuple[Move, ...] = ()
        among = set(self.order)
        self._decoding = among
        self._arriving = [one for one in running if one not in among]
        self._timeless = scheduler.policy.timeless
        self._ordered = False
        self._head: Sequence | None = None  # known not to fit, with
        self._available = -1  # so many pages and
        self._room = (0.0, False, False)  # slices so long, and admissions so bold or careful

    def step(self, now: float) -> bool:
        """Plans one more step like the last one; False: the next plan may be another, and none was
        made."""
        scheduler, policy = self._scheduler, self._scheduler.policy
        if self._left <= 0:
            return False
        ready = scheduler.holdings.ready
        if any(ready(one) for one in self._arriving):
            return False
        scheduler.room.begin()
        policy.begin(now, len(self._running))
        if scheduler.residency is not None:
            scheduler.residency.cancel_unwanted()
        head = self._next(now)
        if head is None:
            self._head = None
        elif not self._blocked(head):
            return False
        if not self._ordered:
            self._sort(now)
            self._ordered = self._timeless
        elif not self._timeless and len(policy):
            self._sort(now)
        self._left -= 1
        self._grow(now)
        available = scheduler.pool.available
        if scheduler.residency is not None:
            moving = self._commit(Draft(scheduler.config.max_step_tokens), now)
            self.moves = () if moving is None else moving.moves
            scheduler.counters.plans -= moving is not None
        self._available = scheduler.pool.available
        self._serve()
        if self._available < available:  # pages are fetched ahead for who comes next
            self._left = _until_short(scheduler, self.order, self._left)
        return True

    def accept(self, first: int) -> None:
        """The tokens of the oldest step in flight have come: `first` and those that follow
        it, which nobody had before."""
        size, register = self._scheduler.pool.page_tokens, self._scheduler.holdings.register
        for token, sequence in enumerate(self.order, first):
            tokens = sequence.tokens
            tokens.append(token)
            sequence.num_inflight -= 1
            if len(tokens) % size == 0:
                register(sequence)

    def _blocked(self, head: Sequence) -> bool:
        """Whether the head of the queue gets no place, neither a free one nor another's."""
        scheduler = self._scheduler
        policy, pool, room = scheduler.policy, scheduler.pool, scheduler.room
        given = policy.growth_steps, room.bold, room.careful
        known = (
            head is self._head and pool.available <= self._available and given == self._room
        )
        if not known:
            if scheduler.slots.available:
                found = scheduler.holdings.find(head)
                growth = room.growth(self._running) + room.growth((head,))
                demand = scheduler.holdings.demand(head, found) + room.headroom(head, growth)
                if demand <= pool.available:
                    return False
            self._head, self._room = head, given
        if known and self._timeless:
            return True
        return next(iter(policy.yielding(head, self._running)), None) is None

    def _sort(self, now: float) -> None:
        running = self._scheduler.policy.running_order(self._running, now)
        self.order = [one for one in running if one in self._decoding]

    def _grow(self, now: float) -> None:
        pool = self._scheduler.pool
        size = pool.page_tokens
        short = [one for one in self.order if one.num_computed >= len(one.pages) * size]
        if len(short) > 1 and not self._timeless and not len(self._scheduler.policy):
            self._sort(now)
            short = sorted(short, key=self.order.index)
        for one in short:
            if not self._scheduler.holdings.extend(one, one.num_computed + 1):
                raise AssertionError(f"{one}: pages changed while coasting")

    def _serve(self) -> None:
        scheduler = self._scheduler
        size, register = scheduler.pool.page_tokens, scheduler.holdings.register
        serve = None if self._timeless else scheduler.policy.on_service
        for sequence in self.order:
            sequence.num_computed += 1
            sequence.num_inflight += 1
            if sequence.num_computed % size == 0:
                register(sequence)
            if serve is not None:
                serve(sequence, tokens=1)
        scheduler.guard.earn(0, len(self.order))
        scheduler.counters.plans += 1
        scheduler.counters.tokens += len(self.order)
