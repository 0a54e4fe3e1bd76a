"""An engine that lends: KV memory that it doesn't need now goes to others, and comes back.

The pool's pages lie in two places: the *reserve*, XLA's array, which is never lent, and behind it
`memory.lendable`, which is lent extent by extent (`ops.spaces` lets a page id name either). Every
request fits into the reserve alone, so nobody's end depends on a borrower.

Everything is decided here, on the engine's thread, at step boundaries: an `Informer` says how many
extents are left over; those are emptied (`WithdrawablePool`, `scheduling.relocation`), the last
ones first, and handed to a `memory.producer.Producer`, whose thread talks to the coordinator. When
need grows, extents that are being emptied stay, and of those that are lent as many as are needed
are wanted back; pages come back to the allocator as they are given back. If need falls before all
of an extent is back, the part that is ours is emptied and lent again. Nothing here waits, and
between decisions a step boundary costs a look at a flag and at the clock.

An extent is handed over only when the steps that were dispatched before its last page was left have
ended: one of them may still write there.
"""

from __future__ import annotations

import dataclasses
import enum
import time
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from aqua_jax.engine.request import Request, Sample
from aqua_jax.memory.informer import Informer, InformerConfig, Load
from aqua_jax.paging.withdrawal import WithdrawablePool
from aqua_jax.scheduling.sequence import Status

# Seconds between two decisions; with requests that have just come, at least.
_PERIOD_S, _URGENT_S = 0.25, 0.02
# An extent that sequences haven't left by then is needed more than it seemed.
_EMPTYING_S = 5.0


class Lends(Protocol):
    """What is needed of a `memory.producer.Producer`."""

    news: bool
    lost: int
    longest_s: float

    @property
    def connected(self) -> bool:
        """Whether anything can be lent now."""

    def lend(self, extent: int, first: int = 0, last: int | None = None) -> None:
        """Lends an extent, or pages first to last - 1 of it."""

    def keep(self, count: int) -> None:
        """Lends at most so many."""

    def take_returned(self) -> list[tuple[int, int, int]]:
        """(extent, first, last) of its pages that have come back."""


class _State(enum.Enum):
    OURS = 0
    EMPTYING = 1  # what is ours of it is withdrawn; sequences may still be there
    EMPTY = 2  # nobody's; a dispatched step may still write there
    LENT = 3  # the producer's, or on its way back; perhaps not all of it any more


@dataclasses.dataclass
class LendingCounters:
    """Totals since the start.

    Attributes:
      extents_lent: handed over to be lent.
      parts_lent: runs of pages of extents that were handed over again before all had come back.
      extents_back: that have come back entirely.
      pages_back: pages that have come back.
      kept: extents that were being emptied and weren't lent after all.
    """

    extents_lent: int = 0
    parts_lent: int = 0
    extents_back: int = 0
    pages_back: int = 0
    kept: int = 0


class EngineLender:
    """What one engine lends. Belongs to the engine's thread, `stats` excepted."""

    def __init__(
        self, pool: WithdrawablePool, producer: Lends,
        live: Callable[[], Iterable[tuple[Request, Sample]]], *, reserve: int, hold_s: float,
        horizon_s: float = 1.0, clock: Callable[[], float] = time.monotonic,
        close: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
          pool: whose extents are the producer's.
          producer: lends them.
          live: samples of live requests.
          reserve: pages kept beside what is needed, >= 0.
          hold_s: seconds before less need is believed.
          horizon_s: seconds that it takes to get memory back.
          clock: seconds.
          close: called by `close`: takes back what is lent and lets the memory go.
        """
        self._pool, self._producer = pool, producer
        self._live, self._clock, self._close = live, clock, close
        self._informer = Informer(InformerConfig(
            capacity=pool.num_pages, reserve=min(reserve, pool.num_pages), step=pool.extent_pages,
            hold_s=hold_s, horizon_s=horizon_s,
        ))
        self._states = [_State.OURS] * pool.extents
        self._since = [0.0] * pool.extents  # when it began to be emptied
        self._fence = [0] * pool.extents  # steps that must have ended before it is handed over
        self._away = [0] * pool.extents  # pages that aren't back
        # What of it is being emptied: [first, last) of its pages.
        self._leaving: list[list[tuple[int, int]]] = [[] for _ in self._states]
        self._per_request = 0.0
        self._target = self._kept = 0
        self._next = self._not_before = 0.0
        self._seen = -1  # requests that had come at the last decision
        self.counters = LendingCounters()

    @property
    def busy(self) -> bool:
        """Whether extents are being emptied: a step boundary soon would help."""
        return _State.EMPTYING in self._states or _State.EMPTY in self._states

    def tend(self, dispatched: int, pending: int, arrived: int) -> None:
        """A step boundary.

        Args:
          dispatched: steps so far.
          pending: of these, the last ones, which may not have ended.
          arrived: requests accepted so far.
        """
        if self._producer.news:
            self._take_back()
        now = self._clock()
        if now >= self._next or (arrived != self._seen and self._kept and now >= self._not_before):
            self._not_before, self._next = now + _URGENT_S, now + _PERIOD_S
            self._seen = arrived
            self._decide(now, arrived)
        if self.busy:
            self._hand_over(now, dispatched, dispatched - pending)

    def _decide(self, now: float, arrived: int) -> None:
        pages = [
            self._pool.pages_for(sample.sequence.max_total_tokens) for _, sample in self._live()
            if sample.sequence.status is not Status.FINISHED
        ]
        if pages:
            self._per_request = sum(pages) / len(pages)
        # What all that live may come to need, for a request that has begun can't be put off.
        load = Load(sum(pages), 0, arrived, self._per_request)
        lent = self._informer.decide(now, load) // self._pool.extent_pages
        self._target = min(lent, self._pool.extents)
        self._apply(now)

    def _apply(self, now: float) -> None:
        """Brings what is lent or about to be towards the target."""
        states = self._states
        lent = states.count(_State.LENT)
        going = states.count(_State.EMPTYING) + states.count(_State.EMPTY)
        if self._target != self._kept:
            self._kept = self._target
            self._producer.keep(self._target)
        for extent in range(self._pool.extents):  # those that come first are used the most
            if lent + going <= self._target:
                break
            if states[extent] in (_State.EMPTYING, _State.EMPTY):
                self._stay(extent)
                going -= 1
                lent += states[extent] is _State.LENT
        if not self._producer.connected:
            return
        # Where nothing is wanted back any more, what has come back of an extent goes again: it
        # counts as lent anyway.
        for extent in range(self._pool.extents) if lent + going <= self._target else ():
            if states[extent] is _State.LENT and now >= self._since[extent]:
                self._empty(extent, now)
        for extent in reversed(range(self._pool.extents)):
            if lent + going >= self._target:
                break
            if states[extent] is _State.OURS and now >= self._since[extent]:
                self._empty(extent, now)
                going += 1

    def _empty(self, extent: int, now: float) -> None:
        """Begins to empty what is ours of an extent, if anything is."""
        if self._away[extent] == self._pool.extent_pages:
            return
        pages = self._pool.pages_of(extent)
        ours = [index for index, page in enumerate(pages) if not self._pool.withdrawn(page)]
        runs = self._leaving[extent]
        for index in ours:
            if runs and runs[-1][1] == index:
                runs[-1] = runs[-1][0], index + 1
            else:
                runs.append((index, index + 1))
        self._pool.withdraw(extent)
        self._states[extent], self._since[extent] = _State.EMPTYING, now

    def _stay(self, extent: int) -> None:
        """An extent, or a part of one, that was to be lent isn't."""
        pages, runs = self._pool.pages_of(extent), self._leaving[extent]
        for first, last in runs:
            self._pool.restore(pages[first:last])
        runs.clear()
        self._states[extent] = _State.LENT if self._away[extent] else _State.OURS
        self.counters.kept += 1

    def _hand_over(self, now: float, dispatched: int, taken_in: int) -> None:
        for extent, state in enumerate(self._states):
            if state is _State.EMPTYING and not self._pool.pending(extent):
                self._states[extent], self._fence[extent] = _State.EMPTY, dispatched
            elif state is _State.EMPTYING and now - self._since[extent] > _EMPTYING_S:
                self._stay(extent)
                self._since[extent] = now + _EMPTYING_S  # not at once again
            if self._states[extent] is _State.EMPTY and taken_in >= self._fence[extent]:
                self._states[extent] = _State.LENT
                runs = self._leaving[extent]
                whole = runs == [(0, self._pool.extent_pages)]
                self.counters.extents_lent += whole
                self.counters.parts_lent += 0 if whole else len(runs)
                if not whole:  # what can't be lent comes back at once: not again and again
                    self._since[extent] = now + _EMPTYING_S
                for first, last in runs:
                    self._away[extent] += last - first
                    self._producer.lend(extent, first, last)
                runs.clear()

    def _take_back(self) -> None:
        for extent, first, last in self._producer.take_returned():
            self._pool.restore(self._pool.pages_of(extent)[first:last])
            self._away[extent] -= last - first
            self.counters.pages_back += last - first
            if not self._away[extent] and self._states[extent] is _State.LENT:
                self._states[extent], self._since[extent] = _State.OURS, 0.0
                self.counters.extents_back += 1

    def stats(self) -> dict[str, Any]:
        """Pages that can be lent, that are, and that are wanted back; what has happened."""
        away = sorted(self._away, reverse=True)
        lent = sum(away)
        return {
            "lendable": self._pool.extents * self._pool.extent_pages,
            "extent_pages": self._pool.extent_pages,
            "lent": lent,
            # Wanted are whole extents; of these the ones that have the least left to give.
            "wanted_back": sum(away[self._kept :]),
            "emptying": self._pool.draining,
            "lost": self._producer.lost * self._pool.extent_pages,
            "longest_take_back_s": self._producer.longest_s,
            "connected": self._producer.connected,
            **dataclasses.asdict(self.counters),
        }

    def close(self) -> None:
        """Takes back what it can and ends. Every step has ended, and nobody uses the memory."""
        self._close()
