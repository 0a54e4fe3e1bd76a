"""Borrowed memory as its holder sees it: an address, two flags, and a way to give it back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from aqua_jax.closing import Closing
from aqua_jax.coordinator.intervals import Intervals
from aqua_jax.errors import StaleHandleError, StoreError


class LeasedRange(Protocol):
    """What a lease needs of its memory; `memory.arena.Arena` for the host's."""

    @property
    def size(self) -> int:
        """Bytes."""

    @property
    def address(self) -> int:
        """Where it starts, for whoever copies."""

    @property
    def closed(self) -> bool:
        """Whether `close` has been called."""

    def read(self, offset: int, size: int) -> bytes:
        """A copy of `size` bytes."""

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Copies `data` in."""

    def disconnect(self, offset: int, size: int) -> None:
        """What lies there is the lender's again."""

    def close(self) -> None:
        """Unmaps it."""


class Bell:
    """Says that something about one of many leases has changed: one look instead of one at each.

    Attributes:
      rung: set by whoever hears from lenders; whoever answers clears it first, and looks then.
    """

    __slots__ = ("rung",)

    def __init__(self) -> None:
        self.rung = True  # nobody has looked yet


class Lease(Closing):
    """A range of another process's arena, mapped here until it is given back.

    `alive`, `wanted_back` and `deadline` are set by the thread that listens to the lender: reading
    them costs well under a microsecond and never waits. So does `bell.rung`, which goes with each
    change of `alive` and `keep`. Everything else belongs to one thread, the one that copies.

    Offsets are in bytes from the start of the lease.

    Attributes:
      generation: the lender's name for the lease.
      size: bytes granted.
      held: which of them have not been given back.
      alive: whether the lender is there. When it is gone the mapping stays valid, so copies under
        way do no harm, but what was stored counts as lost.
      keep: bytes the lender lets us keep; `size` when it wants nothing back. Set after `deadline`.
      bell: see `ring`.
      deadline: `time.monotonic()` by which it wants the rest; None when it wants nothing.
      lender: the lender's name, if it has one.
      kind: of memory: "host", or a device's that the host can't read.
      way: how it is shared: by descriptors of the memory, or less well (`ops.device_arena`).
    """

    def __init__(
        self, arena: LeasedRange, generation: int, release: Callable[[Lease, int, int], None],
        closed: Callable[[Lease], None] = lambda lease: None, *, kind: str = "host",
        way: str = "descriptors",
    ) -> None:
        """
        Args:
          arena: exactly the range; owned.
          generation: the lender's name for it.
          release: tells the lender, without waiting, that (offset, size) is its own again.
          closed: called once when the lease has ended.
          kind: of memory.
          way: how it is shared.
        """
        self._arena, self._release, self._on_close = arena, release, closed
        self.kind, self.way = kind, way
        self.before_unmap: Callable[[], None] | None = None
        self.bell = Bell()
        self.generation = generation
        self.size = arena.size
        self.held = Intervals([(0, arena.size)])
        self._alive = True
        self._keep = arena.size
        self.deadline: float | None = None
        self.lender = ""

    def ring(self, bell: Bell) -> None:
        """Rings this bell from now on, and once at once: it may have rung before."""
        self.bell = bell
        bell.rung = True

    @property
    def alive(self) -> bool:
        """Whether the lender is there."""
        return self._alive

    @alive.setter
    def alive(self, value: bool) -> None:
        self._alive = value
        self.bell.rung = True

    @property
    def keep(self) -> int:
        """Bytes the lender lets us keep."""
        return self._keep

    @keep.setter
    def keep(self, value: int) -> None:
        self._keep = value
        self.bell.rung = True

    @property
    def wanted_back(self) -> int:
        """Bytes the lender wants back now; 0: nothing."""
        return max(0, self.held.total - self._keep)

    @property
    def address(self) -> int:
        """Where the range starts in this process; constant.

        Raises:
          StaleHandleError: the lease is closed.
        """
        return self._arena.address

    @property
    def closed(self) -> bool:
        """Whether `close` has been called."""
        return self._arena.closed

    def _check(self, offset: int, size: int) -> None:
        if self._arena.closed or not self.held.contains(offset, offset + size):
            raise StaleHandleError(
                f"{size} bytes at {offset} of lease {self.generation} have been given back"
            )

    def read(self, offset: int, size: int) -> bytes:
        """A copy of `size` bytes that are held.

        Raises:
          StaleHandleError: the lender is gone, or they were given back.
        """
        self._check(offset, size)
        data = self._arena.read(offset, size)
        if not self.alive:
            raise StaleHandleError(f"lease {self.generation} is lost: its lender is gone")
        return data

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Copies `data` into bytes that are held.

        Raises:
          StaleHandleError: they were given back.
        """
        self._check(offset, len(data))
        self._arena.write(offset, data)

    def give_back(self, offset: int, size: int) -> None:
        """Gives [offset, offset + size) back; whole pages, all held. Doesn't wait for the lender.

        Copies under way in that range must have ended: what comes later reads zeros and is lost.

        Raises:
          StaleHandleError: the lease is closed.
          StoreError: not all of it is held. Nothing changes.
        """
        if self._arena.closed:
            raise StaleHandleError(f"lease {self.generation} is closed")
        if not self.held.contains(offset, offset + size):
            raise StoreError(f"cannot give back {size} bytes at {offset}: not all held")
        # First out of our hands, then the word: after it the bytes may be somebody else's.
        self._arena.disconnect(offset, size)
        self.held.remove(offset, offset + size)
        self._release(self, offset, size)

    def close(self) -> None:
        """Gives everything back and unmaps it; may be repeated."""
        if self._arena.closed:
            return
        if self.before_unmap is not None:
            self.before_unmap()
            self.before_unmap = None
        ranges = list(self.held)
        for start, end in ranges:
            self.held.remove(start, end)
            self._arena.disconnect(start, end - start)
        self._arena.close()
        for start, end in ranges:
            self._release(self, start, end - start)
        self._alive = False
        self._on_close(self)
