"""A copy queue that takes its time, over real stores on memory that nobody touches.

Contents are kept beside: (store, slot, offset) -> what a device's page holds there. A copy happens
at once, at any moment between the head of its step and its report; before the moment its source
must not change, and after it its target must not be read too early. Both would show as wrong KV.
"""

from __future__ import annotations

import random
from typing import Any

from aqua_jax.coordinator.intervals import Intervals
from aqua_jax.memory.arena import round_up
from aqua_jax.memory.pace import Pace
from aqua_jax.memory.split import SplitStore
from aqua_jax.memory.stores import HostStore, PeerStore
from aqua_jax.paging.moves import Move, Shift, Store
from aqua_jax.paging.residency import Residency

SLOT_BYTES = 4096


class FakeLease:
    """What `PeerStore` needs of a lease, and a lender's moods."""

    def __init__(self, slots: int, slot_bytes: int = SLOT_BYTES) -> None:
        self.size = round_up(slots * slot_bytes)
        self.held = Intervals([(0, self.size)])
        self.alive = True
        self.keep = self.size
        self.closed = False
        self.address = 0
        self.deadline: float | None = None

    @property
    def wanted_back(self) -> int:
        return max(0, self.held.total - self.keep)

    def give_back(self, offset: int, size: int) -> None:
        self.held.remove(offset, offset + size)

    def close(self) -> None:
        self.closed = True
        self.alive = False


def peer_store(slots: int, page_tokens: int, pace: Pace | None = None) -> PeerStore:
    """Memory of a lender that isn't there."""
    lease: Any = FakeLease(slots)
    return PeerStore(lease, SLOT_BYTES, page_tokens, pace=pace)


def split_store(slots: int, page_tokens: int, pace: Pace | None = None) -> SplitStore:
    """Memory of two lenders that aren't there, with half of each slot."""
    half = SLOT_BYTES // 2
    leases: list[Any] = [FakeLease(slots, half), FakeLease(slots + 3, half)]
    parts = [PeerStore(lease, half, page_tokens, pace=pace) for lease in leases]
    return SplitStore(parts, (0, 1), page_tokens)


def host_store(slots: int, page_tokens: int) -> HostStore:
    """Own memory."""
    return HostStore(slots * SLOT_BYTES, SLOT_BYTES, page_tokens)


class FakeCopies:
    """Carries moves out and reports them, in any order, some of them as failed."""

    def __init__(
        self, residency: Residency, pool: dict[tuple[int, int], int], rng: random.Random, *,
        failures: float = 0.0, slowness: float = 0.5,
    ) -> None:
        """
        Args:
          residency: told of each move's end.
          pool: contents by (page id, offset); shared with the device.
          rng: decides what happens when.
          failures: share of moves that don't arrive.
          slowness: chance of each move, at each look, to go on waiting.
        """
        self._residency, self._pool, self._rng = residency, pool, rng
        self._failures, self._slowness = failures, slowness
        self._contents: dict[tuple[Store, int, int], int] = {}
        self._waiting: list[Move] = []
        self._copied: list[Move] = []
        self._shifts: list[Shift] = []

    def __len__(self) -> int:
        return len(self._waiting) + len(self._copied) + len(self._shifts)

    def hand_over(self, moves: tuple[Move, ...]) -> None:
        """The head of a step has run."""
        self._waiting += moves

    def work(self) -> None:
        """Time passes: some copies are made."""
        self._rng.shuffle(self._waiting)
        while self._waiting and self._rng.random() > self._slowness:
            move = self._waiting.pop()
            self._copy(move)
            self._copied.append(move)
        self._rng.shuffle(self._shifts)
        while self._shifts and self._rng.random() > self._slowness:
            self._shift(self._shifts.pop())

    def report(self) -> None:
        """A step boundary: some of the copies that were made are known to have ended."""
        self._rng.shuffle(self._copied)
        while self._copied and self._rng.random() > self._slowness:
            move = self._copied.pop()
            ok = self._rng.random() >= self._failures
            if not ok:
                self._spoil(move)
            if move.inward:
                ok = ok and move.store.holds(move.slot)
            self._residency.finished(move, ok, None)

    def respond(self) -> None:
        """A step boundary: lenders may want something."""
        climb = 0 if self._residency.outstanding else self._rng.choice([0, 3])
        self._residency.respond(self._shifts.append, climb)

    def lose_everything(self) -> None:
        """A step failed; copies under way have been waited for."""
        self._waiting.clear()
        self._copied.clear()

    def _copy(self, move: Move) -> None:
        for offset in range(move.start, move.start + move.count):
            inside, outside = (move.page.id, offset), (move.store, move.slot.id, offset)
            if move.inward:
                # What a lost or reused slot holds is anything.
                self._pool[inside] = self._contents.get(outside, -1)
            else:
                self._contents[outside] = self._pool[inside]

    def _spoil(self, move: Move) -> None:
        for offset in range(move.start, move.start + move.count):
            if move.inward:
                self._pool[move.page.id, offset] = -2
            else:
                self._contents[move.store, move.slot.id, offset] = -3

    def _shift(self, shift: Shift) -> None:
        """From slot to slot; nobody else may have either of them."""
        assert shift.source.lost or shift.source.spans(shift.slot)
        assert shift.target.lost or shift.target.spans(shift.place)
        for store, slot, offset in list(self._contents):
            if (store, slot) == (shift.source, shift.slot.id):
                here = self._contents[store, slot, offset]
                self._contents[shift.target, shift.place.id, offset] = here
        shift.done = True
