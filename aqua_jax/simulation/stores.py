"""A tier below the pool with slots and no memory: what planning sees of a store, simulated."""

from __future__ import annotations

import heapq
from typing import NamedTuple

from aqua_jax.errors import ConfigError, StaleHandleError
from aqua_jax.paging.moves import Pace, StoreSlot


class SlotHandle(NamedTuple):
    """A slot and the generation in which it was handed out."""

    id: int
    generation: int


class SlotStore:
    """`capacity` slots of `slot_bytes`; satisfies `aqua_jax.paging.moves.Store`."""

    def __init__(self, name: str, capacity: int, slot_bytes: int) -> None:
        if capacity < 1 or slot_bytes < 1:
            raise ConfigError("capacity", capacity, "at least one slot of at least one byte")
        self.name, self.slot_bytes = name, slot_bytes
        self.pace: Pace | None = None
        self.growing = False
        self._capacity = capacity
        self._generations = [0] * capacity
        self._references = [0] * capacity
        self._tokens = [0] * capacity
        self._free = list(range(capacity))

    @property
    def capacity(self) -> int:
        """Slots there are, free or in use."""
        return self._capacity

    @property
    def free_slots(self) -> int:
        """Slots that `allocate` can hand out."""
        return len(self._free)

    @property
    def in_use(self) -> int:
        """Slots handed out."""
        return self._capacity - len(self._free)

    @property
    def lost(self) -> bool:
        """Never."""
        return False

    @property
    def wanted_slots(self) -> int:
        """None: nobody wants the memory back."""
        return 0

    def allocate(self, count: int) -> list[SlotHandle] | None:
        """Hands out `count` slots, all or nothing; None when there aren't so many."""
        if count > len(self._free):
            return None
        taken = []
        for _ in range(count):
            index = heapq.heappop(self._free)
            self._references[index], self._tokens[index] = 1, 0
            self._generations[index] += 1
            taken.append(SlotHandle(index, self._generations[index]))
        return taken

    def retain(self, slot: StoreSlot) -> None:
        """Adds a reference."""
        self._references[self._index(slot)] += 1

    def free(self, slot: StoreSlot) -> None:
        """Drops a reference; with the last one the slot is free."""
        index = self._index(slot)
        self._references[index] -= 1
        if self._references[index] == 0:
            heapq.heappush(self._free, index)

    def fill(self, slot: StoreSlot, valid_tokens: int) -> None:
        """Notes how many tokens the slot holds now."""
        self._tokens[self._index(slot)] = valid_tokens

    def holds(self, slot: StoreSlot) -> bool:
        """Whether the handle is good and its content readable."""
        return self._good(slot) and self._tokens[slot.id] > 0

    def _good(self, slot: StoreSlot) -> bool:
        return self._generations[slot.id] == slot.generation and self._references[slot.id] > 0

    def _index(self, slot: StoreSlot) -> int:
        if not self._good(slot):
            raise StaleHandleError(f"{slot} of store {self.name} has been freed")
        return slot.id
