"""Places where pages of keys and values live off the device: slots over memory with an address.

A store is bookkeeping and memory; who copies what is the pager's business. The life of a slot:
`allocate` (holds nothing yet), copy, `fill` (now it holds so many tokens), `check` before and after
each copy out of it, `free`. Handles carry generations, as those of the page pool do.

All methods belong to one thread. Only the flags of a lease change under its feet, and they only
ever turn content into misses: memory stays mapped until the store is closed.
"""

from __future__ import annotations

import dataclasses
import heapq
import logging
import time
from types import TracebackType
from typing import NamedTuple, Protocol

from aqua_jax.errors import ConfigError, StaleHandleError, StoreError
from aqua_jax.memory.arena import PAGE, round_up
from aqua_jax.memory.growing import GrowingMemory
from aqua_jax.memory.lease import Lease
from aqua_jax.memory.pace import Pace
from aqua_jax.memory.pinning import Pins

_log = logging.getLogger(__name__)

_GROWTH = 64 << 20  # bytes that a growing store takes at a time
_PRESSED_S = 0.5  # before a lender's deadline


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
    pace: Pace | None

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


class _Slots:
    """Slots of one size over a range: the bookkeeping that stores share."""

    pace: Pace | None = None  # of copies to and from it, if its lender has said so
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

    def live(self) -> list[StoreSlot]:
        """Every slot in use, lowest first."""
        return [
            StoreSlot(index, self._generations[index])
            for index in range(self._capacity) if self._references[index]
        ]


class HostStore(_Slots):
    """Pages in memory of this process.

    With `grows` it takes memory from the system as it fills, one step ahead of need, in a thread
    of its own, for neither a start nor a step should wait for that. `capacity` is what it may
    become; when the system has no more, what it is.

    Raises:
      ConfigError: the memory isn't there, or not enough for one slot.
    """

    def __init__(
        self, size: int, slot_bytes: int, page_tokens: int, *, name: str = "host",
        huge_pages: bool = False, grows: bool = False, pins: Pins | None = None,
    ) -> None:
        """
        Args:
          size: bytes of memory.
          slot_bytes: of one page of keys and values.
          page_tokens: tokens of a page.
          name: in messages and metrics.
          huge_pages: advise them for the memory. 1 GiB took 0.13 s with and 0.25 s without, but
            2.8 s when the system had to move others' pages first.
          grows: take the memory only as it is needed.
          pins: readies each piece that is taken for the device's copies; None: nothing to do.
        """
        super().__init__(name, size, slot_bytes, page_tokens)
        self._memory = GrowingMemory(
            size, slot_bytes, huge_pages=huge_pages, grows=grows, pins=pins
        )
        self.arena = self._memory.arena
        self._usable = self._memory.present // slot_bytes  # slots that may be handed out
        self._free = list(range(self._usable))

    @property
    def free_slots(self) -> int:
        """Slots that `allocate` can hand out now; starts to take more memory when few are left."""
        if self._usable < self._capacity:
            self._look_at_growth()
        return len(self._free)

    @property
    def growing(self) -> bool:  # type: ignore[override]
        """Whether the system may have more memory for it."""
        return self._usable < self._capacity

    def _look_at_growth(self) -> None:
        if not self._memory.tend(len(self._free) * self.slot_bytes):
            return
        before, self._usable = self._usable, self._memory.present // self.slot_bytes
        for index in range(before, self._usable):
            heapq.heappush(self._free, index)
        if self._memory.exhausted:
            _log.warning("store %s: no more than %d of %d bytes for it: %s", self.name,
                         self._memory.present, self.arena.size, self._memory.exhausted)
            self._capacity = self._usable

    @property
    def base(self) -> int:
        """Where slot 0 starts in this process; the others follow without gaps."""
        return self.arena.address

    def close(self) -> None:
        """Frees the memory; every handle is stale. No copy may be under way. May be repeated."""
        self._capacity, self._usable, self._in_use, self._free = 0, 0, 0, []
        self._memory.close()

    def __enter__(self) -> HostStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class PeerStore(_Slots):
    """Pages in memory that another process lends.

    When the lender wants memory back (`wanted_slots`), the highest slots go: `retire` says which of
    them are in use, their pages are moved or dropped, `give_back` lets them go. When the lender
    dies, the store is `lost`: no slot is readable, none is handed out, `free` still works.
    """

    def __init__(
        self, lease: Lease, slot_bytes: int, page_tokens: int, *, name: str = "peer",
        pace: Pace | None = None,
    ) -> None:
        """
        Args:
          lease: nothing of it given back yet; owned.
          slot_bytes: of one page of keys and values.
          page_tokens: tokens of a page.
          name: in messages and metrics.
          pace: what its lender lets copies be at most; perhaps of other leases as well.

        Raises:
          ConfigError: the lease is too small for one slot.
        """
        super().__init__(name, lease.held.total, slot_bytes, page_tokens)
        if lease.held.total != lease.size:
            raise StoreError("the lease has been given back in part")
        self.lease, self.pace = lease, pace
        self._kept = self._capacity  # slots that are not retired
        self._counted_lost = False

        self._trim(self._capacity)  # what is left after the last slot

    def _trim(self, capacity: int) -> None:
        """Gives back the whole pages of the system that `capacity` slots don't need."""
        start = round_up(capacity * self.slot_bytes)
        end = self.lease.held.total  # what is held starts at 0: only the end is ever given back
        if start < end and not self.lease.closed:
            self.lease.give_back(start, end - start)

    @property
    def base(self) -> int:
        """Where slot 0 starts in this process; the others follow without gaps."""
        return self.lease.address

    @property
    def lost(self) -> bool:
        """Whether the lender is gone."""
        if self.lease.alive:
            return False
        if not self._counted_lost:
            self._counted_lost = True
            self.counters.dropped += self._in_use
        return True

    @property
    def wanted_slots(self) -> int:
        """Slots that `retire` and `give_back` should let go to do what the lender asks."""
        wanted = self.lease.wanted_back
        return 0 if not wanted or not self.lease.alive else self._capacity - self._keeping(wanted)

    def _keeping(self, wanted: int) -> int:
        """Slots that can stay when `wanted` bytes go: whole pages of the system, from the end."""
        room = max(0, self.lease.held.total - wanted) // PAGE * PAGE
        return min(self._capacity, room // self.slot_bytes)

    @property
    def pressed(self) -> bool:
        """Whether the lender's time for what it wants back is all but over."""
        deadline = self.lease.deadline
        return deadline is not None and time.monotonic() > deadline - _PRESSED_S

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
        self.lease.close()

    def __enter__(self) -> PeerStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
