"""Slots: the rows of per-sequence state that live on the device (last tokens, penalty counts)."""

from __future__ import annotations

import heapq

from aqua_jax.errors import StaleHandleError


class Slots:
    """Hands out `count` slots, lowest first so that the rows in use stay together.

    A slot's epoch rises each time it is handed out. Results of a step carry (slot, epoch), so that
    one that arrives after the slot has changed hands is told apart (`current`).
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(range(count))  # a heap
        self._epochs = [0] * count
        self._held = [False] * count

    @property
    def available(self) -> int:
        """Slots nobody holds."""
        return len(self._free)

    def acquire(self) -> tuple[int, int] | None:
        """A slot and its epoch, or None when all are held."""
        if not self._free:
            return None
        slot = heapq.heappop(self._free)
        self._epochs[slot] += 1
        self._held[slot] = True
        return slot, self._epochs[slot]

    def current(self, slot: int, epoch: int) -> bool:
        """Whether the holder of that epoch still holds the slot."""
        return 0 <= slot < self.count and self._held[slot] and self._epochs[slot] == epoch

    def release(self, slot: int, epoch: int) -> None:
        """Gives a slot back; raises StaleHandleError if that epoch has passed."""
        if not self.current(slot, epoch):
            raise StaleHandleError(f"slot {slot} is no longer held in epoch {epoch}")
        self._held[slot] = False
        heapq.heappush(self._free, slot)
