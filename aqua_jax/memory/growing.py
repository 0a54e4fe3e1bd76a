"""Memory of this process that is taken from the system as it is needed, ahead of need.

Neither a start nor a step should wait for gigabytes to be faulted in, or pinned for a GPU: a thread
of its own takes them, a piece at a time.
"""

from __future__ import annotations

import math
import threading

from aqua_jax.errors import ArenaError, ConfigError
from aqua_jax.memory.arena import PAGE, Arena, round_up
from aqua_jax.memory.pinning import Pins

GROWTH = 64 << 20  # bytes that are taken at a time, at least


class GrowingMemory:
    """A range of addresses, filled with memory from its start.

    Attributes:
      arena: the range.
      present: bytes from the start that are there, and ready for copies.
      exhausted: why there will be no more; empty: there may be.
    """

    def __init__(
        self, size: int, unit: int, *, huge_pages: bool = False, grows: bool = False,
        pins: Pins | None = None,
    ) -> None:
        """
        Args:
          size: bytes in the end.
          unit: bytes that are copied at once: no piece ends within one.
          huge_pages: advise them for the memory.
          grows: begin with little; False: take everything now.
          pins: readies each piece for a device's copies; None: nothing to do.

        Raises:
          ConfigError: the memory isn't there.
        """
        self._pins, self._unit, self._least = pins, PAGE, unit
        if pins is not None:  # each piece is pinned by itself, in whole pages of the system
            self._unit = math.lcm(PAGE, unit)
        self._growth = max(GROWTH, unit)
        self._pinned: list[tuple[int, int]] = []  # addresses and sizes
        self._thread: threading.Thread | None = None
        self.exhausted = ""
        first = -(-self._growth // self._unit) * self._unit
        self.present = min(size, first) if grows else size
        self.arena = Arena.anonymous(size, huge_pages=huge_pages, present=self.present)
        try:
            self._pin(0, min(round_up(self.present), self.arena.size))
        except ArenaError as error:
            self.arena.close()
            raise ConfigError("bytes", size, f"what a GPU can copy ({error})") from error

    def tend(self, unused: int) -> bool:
        """Begins to take more if less than a growth is unused. Never waits.

        Args:
          unused: bytes of what is present that nobody has.

        Returns:
          Whether what was begun has ended since the last time: look at `present`, `exhausted`.
        """
        if self._thread is not None:
            if self._thread.is_alive():
                return False
            self._thread.join()
            self._thread = None
            return True
        if unused < self._growth and not self.exhausted and self.present < self.arena.size:
            self._thread = threading.Thread(target=self._grow, name="aqua-store", daemon=True)
            self._thread.start()
        return False

    def _grow(self) -> None:
        start = self.present // PAGE * PAGE
        wanted = -(-(self.present + self._growth) // self._unit) * self._unit
        end = min(wanted, self.arena.size)
        try:
            self.arena.populate(start, end - start)
            self._pin(start, end - start)
        except ArenaError as error:
            self.exhausted = str(error)
        else:
            self.present = end
            if self._pins is not None:  # a GPU fills memory faster than it can be pinned
                self._growth = max(self._growth, end // 4)

    def _pin(self, offset: int, size: int) -> None:
        if self._pins is not None:
            piece = (self.arena.address + offset, size)
            self._pins.pin(*piece)
            self._pinned.append(piece)

    def close(self) -> None:
        """Frees everything; no copy may be under way. May be repeated."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        while self._pins is not None and self._pinned:
            self._pins.unpin(*self._pinned.pop())
        self.arena.close()
