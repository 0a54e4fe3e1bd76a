"""Ranges of any size in one piece of memory: handed out, taken back, given away in whole pages."""

from __future__ import annotations

from typing import NamedTuple

from aqua_jax.coordinator.intervals import Intervals
from aqua_jax.errors import StaleHandleError, StoreError
from aqua_jax.memory.arena import PAGE, round_up

# A cache line, and what XLA asks of memory that it takes over without a copy.
ALIGN = 64


def align(size: int) -> int:
    """`size` as a whole number of ALIGN bytes."""
    return -(-size // ALIGN) * ALIGN


class Extent(NamedTuple):
    """A range in use: where it starts, its bytes, and a number that no other extent ever has."""

    offset: int
    size: int
    generation: int


class Extents:
    """The bookkeeping of a memory of `size` bytes; lowest fit first, so that the end stays empty.

    Every byte is free, in use, or gone (`take_pages`: it belongs to somebody else again).
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._free = Intervals([(0, size // ALIGN * ALIGN)]) if size >= ALIGN else Intervals()
        self._used: dict[int, Extent] = {}
        self._generation = 0
        self.used = 0

    @property
    def free(self) -> int:
        """Bytes that are neither in use nor gone."""
        return self._free.total

    @property
    def longest(self) -> int:
        """Bytes of the largest extent that `allocate` can hand out."""
        return self._free.longest

    def __len__(self) -> int:
        return len(self._used)

    def allocate(self, size: int) -> Extent | None:
        """Hands out at least `size` >= 1 bytes, aligned to ALIGN.

        Returns:
          None when no free range is so long.

        Raises:
          StoreError: size below 1.
        """
        if size < 1:
            raise StoreError(f"cannot allocate {size} bytes")
        size = align(size)
        start = self._free.take(size)
        if start is None:
            return None
        self._generation += 1
        extent = self._used[start] = Extent(start, size, self._generation)
        self.used += size
        return extent

    def holds(self, extent: Extent) -> bool:
        """Whether it is in use, and not an earlier one at the same place."""
        return self._used.get(extent.offset) == extent

    def release(self, extent: Extent) -> None:
        """Takes an extent back.

        Raises:
          StaleHandleError: it isn't in use any more; nothing changes.
        """
        if not self.holds(extent):
            raise StaleHandleError(f"{extent} has been released")
        del self._used[extent.offset]
        self.used -= extent.size
        self._free.add(extent.offset, extent.offset + extent.size)

    def take_pages(self, most: int) -> tuple[int, int] | None:
        """Takes the system's whole pages out of the highest free range for good.

        Args:
          most: bytes; rounded up to whole pages.

        Returns:
          [start, end) that is gone; None when no free range has a whole page.
        """
        most = round_up(most)
        for low, high in reversed(list(self._free)):
            start, end = round_up(low), high // PAGE * PAGE
            if most and start < end:
                start = max(start, end - most)
                self._free.remove(start, end)
                return start, end
        return None
