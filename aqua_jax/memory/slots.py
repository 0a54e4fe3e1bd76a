"""Slots of one size, for pages of keys and values that live off the device: the bookkeeping.

The life of a slot: `allocate` (holds nothing yet), copy, `fill` (now it holds so many tokens),
`check` before and after each copy out of it, `free`. Handles carry generations, as those of the
page pool do. `memory.stores` has the memory that slots lie in.

All methods belong to one thread. Only the flags of a lease change under its feet, and they only
ever turn content into misses: memory stays mapped until the store is closed.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from aqua_jax.closing import Closing
from aqua_jax.errors import ConfigError, StaleHandleError, StoreError
from aqua_jax.memory.lease import Bell, Lease
from aqua_jax.memory.pace import JointPace, Pace


class StoreSlot(NamedTuple):
    """A slot and the generation in which it was handed out."""

    id: int
    generation: int


@dataclasses.dataclass
class StoreCounters:
    """What a store has done so far, in slots.

    Attributes:
      allocated: handed out.
      freed: came back because nobody referred to them any more.
      refused: asked for and not there.
      dropped: content lost: given back to the lender while in use, or in use when it died.
      peak: most in use at once.
    """

    allocated: int = 0
    freed: int = 0
    refused: int = 0
    dropped: int = 0
    peak: int = 0


class Store(Protocol):
    """What the pager needs of a tier. Sizes in bytes; `capacity` and counts in slots."""

    name: str
    slot_bytes: int
    counters: StoreCounters
    pace: Pace | JointPace | None

    @property
    def capacity(self) -> int:
        """Slots there are now, free or in use."""

    @property
    def free_slots(self) -> int:
        """Slots that `allocate` can hand out."""

    @property
    def in_use(self) -> int:
        """Slots handed out."""

    @property
    def lost(self) -> bool:
        """Whether everything in it has become a miss."""

    @property
    def wanted_slots(self) -> int:
        """Slots that the owner of the memory wants back now."""

    def allocate(self, count: int) -> list[StoreSlot] | None:
        """Hands out `count` slots, all or nothing; None when there aren't so many."""

    def retain(self, slot: StoreSlot) -> None:
        """Adds a reference; each is dropped by a `free`."""

    def free(self, slot: StoreSlot) -> None:
        """Drops a reference; with the last one the slot is free."""

    def fill(self, slot: StoreSlot, valid_tokens: int) -> None:
        """Notes that a copy has ended and how many tokens the slot holds now."""

    def valid_tokens(self, slot: StoreSlot) -> int:
        """Tokens the slot holds; 0 until it is filled."""

    def holds(self, slot: StoreSlot) -> bool:
        """Whether the handle is good and its content readable; never raises for stale ones."""

    def check(self, slot: StoreSlot) -> None:
        """Raises StaleHandleError unless the handle is good and the store not lost."""

    def offset(self, slot: StoreSlot) -> int:
        """Where the slot starts, from the start of the memory."""

    def address(self, slot: StoreSlot) -> int:
        """Where the slot starts in this process."""

    @property
    def base(self) -> int:
        """Where slot 0 starts in this process; the others follow without gaps."""


class Slots:
    """Slots of one size over a range: the bookkeeping that stores share."""

    pace: Pace | JointPace | None = None  # of copies to and from it, if its lender has said so
    growing = False  # it may have room in a moment

    def __init__(self, name: str, memory_bytes: int, slot_bytes: int, page_tokens: int) -> None:
        if slot_bytes < 1 or slot_bytes > memory_bytes:
            raise ConfigError(
                "slot_bytes", slot_bytes, f"1 to {memory_bytes}, what the store has in all"
            )
        if page_tokens < 1:
            raise ConfigError("page_tokens", page_tokens, "at least 1")
        self.name, self.slot_bytes, self.page_tokens = name, slot_bytes, page_tokens
        self.counters = StoreCounters()
        self._capacity = memory_bytes // slot_bytes
        self._generations = [0] * self._capacity
        self._references = [0] * self._capacity
        self._tokens = [0] * self._capacity
        # The lowest goes out first, so that the end, which is given back first, stays empty.
        self._free = list(range(self._capacity))
        self._in_use = 0

    @property
    def capacity(self) -> int:
        """Slots there are now, free or in use."""
        return self._capacity

    @property
    def free_slots(self) -> int:
        """Slots that `allocate` can hand out."""
        return 0 if self.lost else len(self._free)

    @property
    def in_use(self) -> int:
        """Slots handed out."""
        return self._in_use

    @property
    def lost(self) -> bool:
        """Whether everything in it has become a miss."""
        return False

    @property
    def wanted_slots(self) -> int:
        """Slots that the owner of the memory wants back now."""
        return 0

    @property
    def base(self) -> int:
        """Where slot 0 starts in this process; the others follow without gaps."""
        raise StaleHandleError(f"store {self.name} has no memory")

    def allocate(self, count: int) -> list[StoreSlot] | None:
        """Hands out `count` empty slots with one reference each, all or nothing.

        Returns:
          None, and nothing changed, when fewer are free.
        """
        if count < 0:
            raise StoreError(f"cannot allocate {count} slots")
        if count > self.free_slots:
            self.counters.refused += count
            return None
        slots = [self._take() for _ in range(count)]
        self._in_use += count
        self.counters.allocated += count
        self.counters.peak = max(self.counters.peak, self._in_use)
        return slots

    def _take(self) -> StoreSlot:
        index = heapq.heappop(self._free)
        self._references[index], self._tokens[index] = 1, 0
        self._generations[index] += 1
        return StoreSlot(index, self._generations[index])

    def _good(self, slot: StoreSlot) -> bool:
        index, generation = slot
        return (
            0 <= index < self._capacity
            and self._generations[index] == generation
            and self._references[index] > 0
        )

    def _index(self, slot: StoreSlot) -> int:
        if not self._good(slot):
            raise StaleHandleError(f"{slot} of store {self.name} has been freed or given back")
        return slot.id

    def retain(self, slot: StoreSlot) -> None:
        """Adds a reference; each is dropped by a `free`."""
        self._references[self._index(slot)] += 1

    def free(self, slot: StoreSlot) -> None:
        """Drops a reference; with the last one the slot is free.

        Raises:
          StaleHandleError: it is free already, or was given back; nothing changes.
        """
        index = self._index(slot)
        self._references[index] -= 1
        if self._references[index] == 0:
            self._in_use -= 1
            self.counters.freed += 1
            self._vacant(index)

    def _vacant(self, index: int) -> None:
        heapq.heappush(self._free, index)

    def fill(self, slot: StoreSlot, valid_tokens: int) -> None:
        """Notes that a copy has ended and the slot holds `valid_tokens` tokens, at most a page."""
        index = self._index(slot)
        if not 0 <= valid_tokens <= self.page_tokens:
            raise StoreError(f"a page has 0 to {self.page_tokens} tokens, not {valid_tokens}")
        self._tokens[index] = valid_tokens

    def valid_tokens(self, slot: StoreSlot) -> int:
        """Tokens the slot holds; 0 until it is filled."""
        return self._tokens[self._index(slot)]

    def holds(self, slot: StoreSlot) -> bool:
        """Whether the handle is good and its content readable; never raises for stale ones."""
        return self._good(slot) and not self.lost and self._tokens[slot.id] > 0

    def check(self, slot: StoreSlot) -> None:
        """Raises StaleHandleError unless the handle is good and the store not lost.

        After a copy out of a slot this says whether what was copied is the slot's content.
        """
        self._index(slot)
        if self.lost:
            raise StaleHandleError(f"store {self.name} is lost")

    def offset(self, slot: StoreSlot) -> int:
        """Where the slot starts, from the start of the memory; bytes."""
        self.check(slot)
        return slot.id * self.slot_bytes

    def address(self, slot: StoreSlot) -> int:
        """Where the slot starts in this process."""
        return self.base + self.offset(slot)

    def spans(self, slot: StoreSlot) -> list[tuple[int, int]]:
        """Where its bytes lie in this process, in order: (address, bytes)."""
        return [(self.address(slot), self.slot_bytes)]

    def live(self) -> list[StoreSlot]:
        """Every slot in use, lowest first."""
        return [
            StoreSlot(index, self._generations[index])
            for index in range(self._capacity) if self._references[index]
        ]


class LentSlots(Slots, Closing):
    """Slots in memory of others, who may want it back or be gone.

    When memory is wanted (`wanted_slots`), the highest slots go: `retire` says which of them are in
    use, their pages are moved or dropped, `give_back` lets them go. When a lender dies, the store
    is `lost`: no slot is readable, none is handed out, `free` still works.
    """

    def __init__(
        self, name: str, memory_bytes: int, slot_bytes: int, page_tokens: int,
        leases: Sequence[Lease],
    ) -> None:
        super().__init__(name, memory_bytes, slot_bytes, page_tokens)
        self._leases = tuple(leases)  # each has a part of every slot
        self._kept = self._capacity  # slots that are not retired
        self._counted_lost = False

    def _trim(self, capacity: int) -> None:
        """Gives back what `capacity` slots don't need; by whoever has the memory."""

    @property
    def lost(self) -> bool:
        """Whether a lender is gone."""
        for lease in self._leases:  # a look by the planner for each page: no generator
            if not lease.alive:
                break
        else:
            return False
        if not self._counted_lost:
            self._counted_lost = True
            self.counters.dropped += self._in_use
        return True

    def ring(self, bell: Bell) -> None:
        """Rings this bell when a lender wants something or is gone, and once at once."""
        for lease in self._leases:
            lease.ring(bell)

    def retire(self, count: int) -> tuple[StoreSlot, ...]:
        """Stops handing out the `count` highest slots.

        Returns:
          Those of them in use, highest first: move or drop their pages, then `give_back`.
        """
        if not 0 <= count <= self._capacity:
            raise StoreError(f"cannot retire {count} of {self._capacity} slots")
        self._kept = min(self._kept, self._capacity - count)
        self._free = [index for index in self._free if index < self._kept]
        heapq.heapify(self._free)
        return tuple(slot for slot in reversed(self.live()) if slot.id >= self._kept)

    def restore(self) -> None:
        """Takes back what `retire` did and `give_back` hasn't: the lender has changed its mind."""
        for index in range(self._kept, self._capacity):
            if not self._references[index]:
                heapq.heappush(self._free, index)
        self._kept = self._capacity

    def _vacant(self, index: int) -> None:
        if index < self._kept:
            heapq.heappush(self._free, index)

    def give_back(self, count: int) -> tuple[StoreSlot, ...]:
        """Gives the `count` highest slots back to the lender, in use or not. Doesn't wait.

        No copy may be under way in them.

        Returns:
          The slots that were in use, highest first; what they held is gone, handles are stale.
        """
        self.retire(count)
        capacity = self._capacity - count
        gone = tuple(slot for slot in reversed(self.live()) if slot.id >= capacity)
        self._trim(capacity)
        for slot in gone:
            self._references[slot.id] = 0
        self._in_use -= len(gone)
        if not self.lost:
            self.counters.dropped += len(gone)
        self._capacity = capacity
        self._kept = min(self._kept, capacity)
        return gone

    def close(self) -> None:
        """Gives everything back; every handle is stale. No copy may be under way. Repeatable."""
        self._capacity, self._kept, self._in_use, self._free = 0, 0, 0, []
