"""Contents of any size over tiers: bytes in, bytes out, and moves when memory is wanted back.

A content is a run of bytes in chunks; each chunk lies in one piece of a tier, or in two when a
policy mirrors. Copies run without the lock: who copies pins the content, which then isn't moved,
and the segments, which then stay mapped. No jax here; `tensor.py` gives arrays to it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence

from aqua_jax.errors import ContentLostError, StaleHandleError, StoreFullError
from aqua_jax.memory import copies, segments
from aqua_jax.memory.copies import Span
from aqua_jax.memory.lease import Bell
from aqua_jax.memory.loan import capped
from aqua_jax.memory.peers import PeerTier
from aqua_jax.memory.policies import Policy, TierView
from aqua_jax.memory.segments import LeaseSegment, Piece, Segment, Tier
from aqua_jax.memory.throttle import Throttle

# Empty memory is kept for so long: what was freed is often offloaded again soon, and taking memory
# costs as much as some copies.
IDLE_S = 5.0
CHUNK = 16 << 20  # what moves at once, and so the most that moves beyond what was asked


@dataclasses.dataclass
class Counters:
    """What has been done so far; bytes, but for `late` and `lost`.

    Attributes:
      written, read: copied in and out.
      demoted, climbed: moved down (or sideways) and up.
      given_back: to lenders because they asked.
      dropped: given up because the policy says so.
      late: times that a lender's wish could not be met for want of another place.
      lost: contents that can't be read any more.
    """

    written: int = 0
    read: int = 0
    demoted: int = 0
    climbed: int = 0
    given_back: int = 0
    dropped: int = 0
    late: int = 0
    lost: int = 0


@dataclasses.dataclass(eq=False)
class Content:
    """A run of `size` bytes.

    Attributes:
      size: bytes.
      chunk: bytes of each chunk but the last.
      places: for each chunk the pieces that hold it, best tier first; none: it is lost.
      pins: copies under way.
      moving: a chunk of it is being moved.
      freed: its owner has let go of it.
      lost: at least one chunk can't be read any more.
    """

    size: int
    chunk: int
    places: list[list[Piece]] = dataclasses.field(default_factory=list)
    pins: int = 0
    moving: bool = False
    freed: bool = False
    lost: bool = False

    def span(self, index: int) -> tuple[int, int]:
        """Offset and bytes of a chunk."""
        offset = index * self.chunk
        return offset, min(self.chunk, self.size - offset)


class Contents:
    """Contents over tiers, placed by a policy. For all threads.

    `responder.Responder` moves what lies here. For it, and with `changed` held, are all methods
    below "For the responder".

    Attributes:
      tiers: by name, best first.
      peers: the one that borrows, if any.
      policy: who decides.
      counters: what has been done.
      changed: the lock over everything, and told when copies end.
      below: contents that may have chunks which the policy would move up.
      bell: rings when `respond` may have something to do, the passing of time aside.
      climb_due: there may be room for them.
      tidy_at: when `tidy` has something to do.
      orphans: contents whose owners are gone, not let go of yet.
      closed: whether `close` has been called.
    """

    def __init__(
        self, tiers: Sequence[Tier], policy: Policy, *, chunk_bytes: int = CHUNK,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
          tiers: best first; owned.
          policy: who decides.
          chunk_bytes: what moves at once; whole multiples of extents.ALIGN.
          clock: in seconds.
        """
        self.tiers: dict[str, Tier] = {tier.name: tier for tier in tiers}
        found = [tier for tier in tiers if isinstance(tier, PeerTier)]
        self.peers = found[0] if found else None
        self.policy, self.clock = policy, clock
        self.counters = Counters()
        self.changed = threading.Condition()
        self.below: dict[Content, None] = {}
        self.bell = Bell()
        self.climb_due = False
        self.tidy_at = math.inf
        self.orphans: deque[Content] = deque()
        self.closed = False
        self._throttles: dict[tuple[int, str, int], Throttle] = {}
        self._chunk = chunk_bytes
        self._lowest = tiers[-1].name if tiers else ""

    # Life of a content.

    def create(self, size: int) -> Content:
        """Room for `size` >= 0 bytes, in the tiers that the policy says.

        May wait for the system, and for a lender that is asked for a lease.

        Raises:
          StoreFullError: none of them has room. Nothing is kept then.
          StaleHandleError: closed.
        """
        with self.changed:
            self._check_open()
            self.bury()
            names = tuple(self.policy.place(size, self.look()))
            mirror = self.policy.mirror
        content = Content(size, self._chunk)
        try:
            for offset in range(0, size, self._chunk):
                count = min(self._chunk, size - offset)
                places: list[Piece] = []
                content.places.append(places)
                places.append(self._find(names, count, size - offset))
                if mirror in self.tiers and places[0].segment.tier != mirror:
                    places.append(self._find((mirror,), count, size - offset))
        except BaseException:
            with self.changed:
                self.release(content)
            raise
        with self.changed:
            for index, places in enumerate(content.places):
                # A lender that died meanwhile may have been noticed already.
                places[:] = [piece for piece in places if not piece.segment.retired]
                content.lost = content.lost or not places
                for piece in places:
                    piece.segment.owners[piece.extent.offset] = (content, index)
                self.note(content, index)
        return content

    def _find(self, names: Sequence[str], size: int, need: int) -> Piece:
        """A piece of `size` bytes in the first tier that has one; grows it for `need`."""
        for name in names:
            tier = self.tiers.get(name)
            if tier is None:
                continue
            with self.changed:
                self.adopt_arrivals()
                piece = segments.allocate(tier, size)
            if piece is None:
                fresh = tier.grow(need)
                if fresh is None and tier.limit is not None:
                    # Empty segments that are too small may stand in the way of a larger one.
                    with self.changed:
                        dropped = self.tidy(at_once=tier)
                    fresh = tier.grow(need) if dropped else None
                with self.changed:
                    if self.closed and fresh is not None:
                        fresh.close()
                    self._check_open()
                    if fresh is not None:
                        self._adopt(tier, fresh)
                    self.adopt_arrivals()
                    # Also when nothing came: another thread may have been given it.
                    piece = segments.allocate(tier, size)
            if piece is not None:
                return piece
        known = ", ".join(
            f"{name} {tier.free} free" for name, tier in self.views().items()
        )
        raise StoreFullError(
            f"no room for {size} bytes in {' or '.join(names) or 'any tier'}; there is: {known}"
        )

    def free(self, content: Content) -> None:
        """Lets go of a content; what a copy still uses goes when that has ended.

        Raises:
          StaleHandleError: it is free already, or closed.
        """
        with self.changed:
            self._check_open()
            if content.freed:
                raise StaleHandleError("the content has been freed")
            self._let_go(content)

    def abandon(self, content: Content) -> None:
        """As `free`, from a finalizer: takes no lock, done by the next call; may be repeated."""
        self.orphans.append(content)
        self.bell.rung = True

    # Copies.

    @contextlib.contextmanager
    def _pinned(self, content: Content) -> Iterator[list[tuple[Piece, ...]]]:
        """The pieces of a content, which stay where they are meanwhile."""
        with self.changed:
            while content.moving:
                self.changed.wait()
            self._check_open()
            if content.freed:
                raise StaleHandleError("the content has been freed")
            places = [tuple(pieces) for pieces in content.places]
            pinned = {piece.segment for pieces in places for piece in pieces}
            content.pins += 1
            for segment in pinned:
                segment.pins += 1
        try:
            yield places
        finally:
            with self.changed:
                content.pins -= 1
                for segment in pinned:
                    segment.unpin()
                if content.freed and not content.pins and not content.moving:
                    self.release(content)
                if self.closed:
                    self.changed.notify_all()

    def write(self, content: Content, spans: Sequence[Span]) -> None:
        """Fills a content from memory of this process.

        Args:
          content: a new one.
          spans: what goes where, sorted by offset, apart; bytes between them stay as they are.

        Raises:
          ContentLostError: a lender died meanwhile.
          StaleHandleError: freed, or closed.
        """
        with self._pinned(content) as places:
            for index, pieces in enumerate(places):
                offset, size = content.span(index)
                for piece in pieces:
                    if piece.segment.throttle is not None:
                        piece.segment.throttle.wait(copies.common(offset, size, spans))
                    copies.gather(piece.address, offset, size, spans)
                if not any(piece.good for piece in pieces):
                    raise ContentLostError("the lender died while the content was copied to it")
            with self.changed:
                self.counters.written += content.size

    def read(self, content: Content, spans: Sequence[Span]) -> None:
        """Copies parts of a content to memory of this process.

        Args:
          content: a written one.
          spans: what goes where, sorted by offset, apart.

        Raises:
          ContentLostError: it isn't there any more; what was copied so far means nothing.
          StaleHandleError: freed, or closed.
        """
        with self._pinned(content) as places:
            for index, pieces in enumerate(places):
                offset, size = content.span(index)
                for piece in pieces:
                    if not piece.good:
                        continue
                    if piece.segment.throttle is not None:
                        piece.segment.throttle.wait(copies.common(offset, size, spans))
                    copies.scatter(piece.address, offset, size, spans)
                    if piece.good:  # after the copy: was it the content that was copied?
                        break
                else:
                    raise ContentLostError(
                        f"{size} bytes at {offset} of a content of {content.size} are lost: their "
                        f"lender died or took the memory back, and the policy keeps no copy"
                    )
            with self.changed:
                self.counters.read += sum(span.size for span in spans)

    # What there is.

    def views(self) -> Mapping[str, TierView]:
        """The tiers as they are now, best first."""
        with self.changed:
            self.bury()
            return self.look()

    def where(self, content: Content) -> dict[str, int]:
        """Bytes of a content by tier; a mirrored chunk counts in both."""
        found: dict[str, int] = {}
        with self.changed:
            for index, places in enumerate(content.places):
                for piece in places:
                    if piece.good:
                        tier = piece.segment.tier
                        found[tier] = found.get(tier, 0) + content.span(index)[1]
        return found

    def readable(self, content: Content) -> bool:
        """Whether every chunk is somewhere."""
        with self.changed:
            return not content.freed and all(
                any(piece.good for piece in places) for places in content.places
            )

    def _check_open(self) -> None:
        if self.closed:
            raise StaleHandleError("the Aqua is closed")

    def close(self) -> None:
        """Lets everything go, used or not, after the copies under way. May be repeated."""
        with self.changed:
            if self.closed:
                return
            self.closed = True
            held = [segment for tier in self.tiers.values() for segment in tier.segments]
            while any(segment.pins for segment in held):
                self.changed.wait()
            for tier in self.tiers.values():
                for segment in tier.segments:
                    self.drop(tier, segment)
        for tier in self.tiers.values():
            tier.close()

    # For the responder.

    def look(self) -> Mapping[str, TierView]:
        """The tiers as policies see them."""
        return {name: segments.view(tier) for name, tier in self.tiers.items()}

    def bury(self) -> None:
        """Lets go of the orphans."""
        while self.orphans:
            content = self.orphans.popleft()
            if not content.freed:
                self._let_go(content)

    def _let_go(self, content: Content) -> None:
        content.freed = True
        if not content.pins and not content.moving:
            self.release(content)

    def release(self, content: Content) -> None:
        """Gives up all the pieces of a content that is freed and not being copied."""
        self.below.pop(content, None)
        for places in content.places:
            for piece in places:
                self.release_piece(piece)
            places.clear()
        self.tidy()
        self.bell.rung = True  # `tidy_at` may have changed
        if self.peers is not None and not self.below:
            self.peers.wish(0)

    def tidy(self, at_once: Tier | None = None) -> bool:
        """Lets go of segments that have been empty for IDLE_S; whether there were any.

        Args:
          at_once: the tier whose empty segments go however long they have been so.
        """
        now, dropped = self.clock(), False
        self.tidy_at = math.inf
        for tier in self.tiers.values():
            for segment in tier.segments:
                if len(segment.extents) or segment.pins:
                    continue
                if segment.idle_since is None:
                    segment.idle_since = now
                if now - segment.idle_since >= IDLE_S or tier is at_once:
                    self.drop(tier, segment)
                    dropped = True
                else:
                    self.tidy_at = min(self.tidy_at, segment.idle_since + IDLE_S)
        return dropped

    def release_piece(self, piece: Piece) -> None:
        """Gives up a piece, unless its segment is gone."""
        segment = piece.segment
        if not segment.retired and segment.extents.holds(piece.extent):
            segment.extents.release(piece.extent)
            segment.owners.pop(piece.extent.offset, None)
            if self.below and segment.tier != self._lowest:
                self._climb()

    def drop(self, tier: Tier, segment: Segment) -> None:
        """Takes a segment out of its tier; it is closed after the copies in it."""
        tier.segments = tuple(s for s in tier.segments if s is not segment)
        segment.retire()

    def adopt_arrivals(self) -> None:
        """Takes in what was borrowed in the background."""
        while self.peers is not None and self.peers.arrivals:
            self._adopt(self.peers, self.peers.arrivals.popleft())
            self._climb()

    def _adopt(self, tier: Tier, segment: Segment) -> None:
        segments.adopt(tier, segment)
        segment.watch(self.bell)
        key = capped(segment.lease) if isinstance(segment, LeaseSegment) else None
        if key is not None:
            segment.throttle = self._throttles.setdefault(key, Throttle(key[-1]))

    def _climb(self) -> None:
        """There may be room further up."""
        self.climb_due = self.bell.rung = True

    def elsewhere(self, content: Content, index: int, segment: Segment) -> bool:
        """Whether a chunk can be read without a segment."""
        return any(piece.good and piece.segment is not segment for piece in content.places[index])

    def without(self, content: Content, index: int, segment: Segment) -> bool:
        """Gives up a chunk's piece in a segment; whether it is still somewhere."""
        for piece in content.places[index]:
            if piece.segment is segment:
                self.release_piece(piece)
        places = [piece for piece in content.places[index] if piece.segment is not segment]
        content.places[index] = places
        if places:
            self.note(content, index)  # its mirror is what is left
        else:
            self.counters.lost += not content.lost
            content.lost = True
        return bool(places)

    def better(self, content: Content, index: int) -> list[str]:
        """Tiers that the policy prefers to where a chunk lies, best first."""
        places = content.places[index]
        if not places:
            return []
        _, size = content.span(index)
        names = self.policy.climb(size, places[0].segment.tier, self.look())
        return [name for name in names if name in self.tiers]

    def note(self, content: Content, index: int) -> None:
        """Remembers a chunk that the policy would move up."""
        if content not in self.below and self.better(content, index):
            self.below[content] = None
            self._climb()
