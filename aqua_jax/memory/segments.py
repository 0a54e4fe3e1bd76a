"""The memory of a tier, in segments: what contents lie in, and how it grows and shrinks.

Everything here belongs to whoever holds the lock of `contents.Contents`, but `grow`, which may wait
for the system or for a lender and is called without it.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from typing import Any, Protocol

from aqua_jax.errors import ConfigError, StoreError
from aqua_jax.memory.arena import PAGE, Arena, round_up
from aqua_jax.memory.extents import Extent, Extents
from aqua_jax.memory.lease import Bell, Lease
from aqua_jax.memory.policies import TierView
from aqua_jax.memory.throttle import Throttle

# A tier grows by at least so much: mapping and faulting in are paid once for many contents.
STEP = 16 << 20


def growth(need: int, held: int, step: int) -> int:
    """Bytes to grow by when `need` are needed: by halves, so that segments stay few."""
    return round_up(max(need, step, held // 2))


class Segment:
    """Memory of one tier in one piece.

    Attributes:
      tier: the tier's name.
      address: where it starts in this process.
      extents: which of it is in use.
      owners: by offset, whose extent that is; in no order.
      pins: copies under way in it; its memory stays mapped while there are any.
      retired: it belongs to no tier any more and is closed with the last pin.
      idle_since: when it was found empty; None: it isn't, or was used since.
      throttle: what copies to and from it have to keep to; None: nothing.
    """

    def __init__(self, tier: str, address: int, size: int) -> None:
        self.tier, self.address = tier, address
        self.extents = Extents(size)
        self.owners: dict[int, Any] = {}
        self.pins = 0
        self.retired = False
        self.idle_since: float | None = None
        self.throttle: Throttle | None = None

    @property
    def ready(self) -> bool:
        """Whether a copy to or from it may begin now."""
        return self.throttle is None or self.throttle.ready

    @property
    def alive(self) -> bool:
        """Whether what lies in it can be trusted."""
        return not self.retired

    @property
    def wanted(self) -> int:
        """Bytes that the memory's owner wants back now."""
        return 0

    def watch(self, bell: Bell) -> None:
        """Rings this bell when the memory's owner wants something, or is gone."""

    def unpin(self) -> None:
        """Ends a copy."""
        self.pins -= 1
        if self.retired and not self.pins:
            self.close()

    def retire(self) -> None:
        """Takes the memory out of use: nothing that lay in it is there any more."""
        self.retired = True
        if not self.pins:
            self.close()

    def close(self) -> None:
        """Lets the memory go; may be repeated."""


class HostSegment(Segment):
    """Memory of this process; owns the arena."""

    def __init__(self, arena: Arena, closed: Callable[[int], None]) -> None:
        """
        Args:
          arena: the memory.
          closed: told once how many bytes are free again.
        """
        super().__init__("host", arena.address, arena.size)
        self._arena, self._on_close = arena, closed

    def close(self) -> None:
        """Frees the memory."""
        if not self._arena.closed:
            self._arena.close()
            self._on_close(self._arena.size)


class LeaseSegment(Segment):
    """Borrowed memory; owns the lease, nothing of which has been given back yet."""

    def __init__(self, lease: Lease) -> None:
        super().__init__("peer", lease.address, lease.size)
        self.lease, self.leases = lease, (lease,)

    @property
    def alive(self) -> bool:
        """Whether what lies in it can be trusted."""
        return self.lease.alive and not self.retired

    @property
    def wanted(self) -> int:
        """Bytes that the lender wants back now."""
        return self.lease.wanted_back

    def watch(self, bell: Bell) -> None:
        """Rings this bell when the lender wants something, or is gone."""
        self.lease.ring(bell)

    def give_back(self, most: int) -> int:
        """Gives free pages back to the lender, about `most` bytes, from the end.

        Returns:
          Bytes given back.
        """
        given = 0
        while given < most and (taken := self.extents.take_pages(most - given)) is not None:
            self.lease.give_back(taken[0], taken[1] - taken[0])
            given += taken[1] - taken[0]
        return given

    def close(self) -> None:
        """Gives everything back."""
        self.lease.close()


@dataclasses.dataclass(frozen=True, eq=False)
class Piece:
    """An extent of a segment."""

    segment: Segment
    extent: Extent

    @property
    def address(self) -> int:
        """Where it starts in this process."""
        return self.segment.address + self.extent.offset

    @property
    def good(self) -> bool:
        """Whether it is still what it was when it was handed out; looked at after each copy."""
        return self.segment.alive and self.segment.extents.holds(self.extent)


class Tier(Protocol):
    """Segments under one name, best-known ways to get more of them.

    Attributes:
      name: what policies call it.
      limit: most bytes; None: what there is.
      segments: replaced, never changed, so that it can be read without a lock.
    """

    name: str
    limit: int | None
    segments: tuple[Segment, ...]

    def grow(self, need: int) -> Segment | None:
        """Gets more memory, for `need` bytes or as much of them as there is; may wait.

        Returns:
          A segment that is in no tier yet; None when there is nothing to be had now.
        """

    def close(self) -> None:
        """Ends what gets more memory; segments are closed by whoever owns the contents."""


def allocate(tier: Tier, size: int, avoid: Segment | None = None) -> Piece | None:
    """`size` bytes in one piece of a tier's segments, none of whose memory is wanted back."""
    for segment in tier.segments:
        if segment is avoid or not segment.alive or segment.wanted:
            continue
        extent = segment.extents.allocate(size)
        if extent is not None:
            segment.idle_since = None
            return Piece(segment, extent)
    return None


def view(tier: Tier) -> TierView:
    """A tier as policies see it."""
    used = free = wanted = 0
    for segment in tier.segments:
        used += segment.extents.used
        wanted += segment.wanted
        free += segment.extents.free if segment.alive and not segment.wanted else 0
    return TierView(used, free, wanted)


class HostTier:
    """Memory of this process, taken from the system as it is needed.

    Raises:
      ConfigError: a limit below 0.
    """

    name = "host"

    def __init__(
        self, limit: int | None = None, *, step: int = STEP, huge_pages: bool = False
    ) -> None:
        """
        Args:
          limit: most bytes, rounded down to whole pages of the system; None: what it has.
          step: least bytes to grow by.
          huge_pages: advise them. Copies are faster then, but taking memory may take seconds when
            the system must move others' pages first.
        """
        if limit is not None and limit < 0:
            raise ConfigError("host_bytes", limit, "0 or more, or None")
        self.limit = limit if limit is None else limit // PAGE * PAGE
        self.segments: tuple[Segment, ...] = ()
        self._lock = threading.Lock()
        self._held, self._step, self._huge_pages = 0, step, huge_pages

    def grow(self, need: int) -> Segment | None:
        """Takes memory from the system, faulted in: 0.25 s for 1 GiB.

        Returns:
          A segment for `need` bytes, or for as much of them as the limit allows; None when the
          limit is reached, or the system has no memory to spare.
        """
        for size in (growth(need, self._held, self._step), round_up(need)):
            with self._lock:
                size = size if self.limit is None else min(size, self.limit - self._held)
                self._held += size
            try:
                arena = Arena.anonymous(size, huge_pages=self._huge_pages)
                return HostSegment(arena, self._closed)
            except ConfigError:  # the limit is reached, or it isn't there now
                self._closed(size)
        return None

    def _closed(self, size: int) -> None:
        with self._lock:
            self._held -= size

    def close(self) -> None:
        """Nothing runs in the background."""


def adopt(tier: Tier, segment: Segment) -> None:
    """Adds what `grow` returned."""
    if segment.tier != tier.name:
        raise StoreError(f"a segment of {segment.tier} in tier {tier.name}")
    tier.segments = (*tier.segments, segment)
