"""Places where pages of keys and values live off the device: slots over memory with an address.

A store is bookkeeping (`memory.slots`) and memory; who copies what is the pager's business.
"""

from __future__ import annotations

import heapq
import logging
import time

from aqua_jax.closing import Closing
from aqua_jax.errors import StoreError
from aqua_jax.memory.arena import PAGE, round_up
from aqua_jax.memory.growing import GrowingMemory
from aqua_jax.memory.lease import Lease
from aqua_jax.memory.pace import Pace
from aqua_jax.memory.pinning import Pins
from aqua_jax.memory.slots import LentSlots, Slots

_log = logging.getLogger(__name__)

_PRESSED_S = 0.5  # before a lender's deadline


class HostStore(Slots, Closing):
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


class PeerStore(LentSlots):
    """Pages in memory that another process lends: one lease."""

    pace: Pace | None

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
        super().__init__(name, lease.held.total, slot_bytes, page_tokens, (lease,))
        if lease.held.total != lease.size:
            raise StoreError("the lease has been given back in part")
        self.lease, self.pace = lease, pace
        self._trim(self._capacity)  # what is left after the last slot

    @property
    def parts(self) -> tuple[PeerStore, ...]:
        """The stores whose leases hold its slots: itself."""
        return (self,)

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

    def close(self) -> None:
        """Gives everything back; every handle is stale. No copy may be under way. Repeatable."""
        super().close()
        self.lease.close()
