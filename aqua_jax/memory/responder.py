"""What happens to contents at step boundaries: back to the lender, down a tier, up again.

Only this code moves what lies somewhere. It copies without the lock, a chunk at a time, and looks
after each copy whether what was copied still counted.
"""

from __future__ import annotations

import math
import threading

from aqua_jax.memory import copies, segments
from aqua_jax.memory.contents import Content, Contents
from aqua_jax.memory.policies import NONE
from aqua_jax.memory.segments import LeaseSegment, Piece, Segment

CLIMB = 64 << 20  # bytes that climb in one `respond`: some milliseconds
HOLD_S = 1.0  # after giving memory back, nothing climbs for so long


class Responder:
    """Moves what lenders want back, and lets chunks climb where the policy sees room."""

    def __init__(
        self, contents: Contents, *, climb_bytes: int = CLIMB, hold_s: float = HOLD_S
    ) -> None:
        """
        Args:
          contents: whose chunks to move.
          climb_bytes: most bytes that climb in one `respond`, but one chunk in any case.
          hold_s: seconds that nothing climbs after memory was given back.
        """
        self._contents = contents
        self._climb_bytes, self._hold_s = climb_bytes, hold_s
        self._busy = threading.Lock()  # one `respond` at a time
        self._climb_after = float("-inf")
        self._due_at = math.inf  # when something is to be done though no bell has rung
        # What lies here has been borrowed in the background.
        self._arrivals = () if contents.peers is None else contents.peers.arrivals

    def asked(self) -> bool:
        """Whether `respond` may have something to do: two flags and the clock, whatever there is;
        takes no lock and waits for nobody."""
        contents = self._contents
        return contents.bell.rung or bool(self._arrivals) or contents.clock() >= self._due_at

    def respond(self) -> int:
        """Does what is due: gives back what lenders want, notices their deaths, lets chunks climb.

        Returns:
          Bytes moved; 0 when nothing was due, or another thread is at it.
        """
        if not self.asked() or not self._busy.acquire(blocking=False):
            return 0
        contents, moved, again = self._contents, 0, True
        contents.bell.rung = False  # before looking: what comes in between is seen next time
        try:
            with contents.changed:
                if contents.closed:
                    again = False
                    return 0
                contents.bury()
                contents.adopt_arrivals()
                self._reap()
                contents.tidy()
            again = False
            if contents.peers is not None:
                for segment in contents.peers.segments:
                    assert isinstance(segment, LeaseSegment)
                    moved += self._satisfy(segment)
                    again |= segment.alive and segment.wanted > 0
            if contents.climb_due and contents.clock() >= self._climb_after:
                moved += self._climb()
            climb_at = self._climb_after if contents.climb_due else math.inf
            self._due_at = min(contents.tidy_at, climb_at)
            return moved
        except BaseException:
            again = True
            raise
        finally:
            if again:
                contents.bell.rung = True
            self._busy.release()

    def close(self) -> None:
        """Closes the contents, after a `respond` under way."""
        with self._busy:
            self._contents.close()

    def _reap(self) -> None:
        """Takes dead segments out, and counts what is lost with them."""
        for tier in self._contents.tiers.values():
            for segment in tier.segments:
                if not segment.alive:
                    for content, index in list(segment.owners.values()):
                        self._contents.without(content, index, segment)
                    self._contents.drop(tier, segment)

    # Down.

    def _satisfy(self, segment: LeaseSegment) -> int:
        """Gives back what the segment's lender wants, the highest chunks first; bytes moved."""
        contents, moved = self._contents, 0
        if not segment.alive or not segment.wanted:
            return 0
        self._climb_after = contents.clock() + self._hold_s
        with contents.changed:
            self._give_back(segment)
            victims = sorted(segment.owners, reverse=True)
        for offset in victims:
            if not segment.alive or not segment.wanted:
                break
            with contents.changed:
                victim = self._victim(segment, offset)
                if victim is None:
                    continue
                content, index, source = victim
                target = None
                if not contents.elsewhere(content, index, segment):
                    if not segment.ready:
                        break  # no step waits for what its lender's cap allows
                    target, drop = self._refuge(content, index, segment)
                    if target is None and not drop:
                        contents.counters.late += 1
                        break
                if target is None:
                    if not contents.without(content, index, segment):
                        contents.counters.dropped += content.span(index)[1]
                    self._give_back(segment)
                    continue
                self._begin(content, source, target)
            if self._move(content, index, source, target, keep=False):
                moved += content.span(index)[1]
                contents.counters.demoted += content.span(index)[1]
            with contents.changed:
                self._give_back(segment)
        with contents.changed:
            if contents.peers is not None and not segment.lease.held.total:
                contents.drop(contents.peers, segment)
        return moved

    def _give_back(self, segment: LeaseSegment) -> None:
        if segment.alive and segment.wanted:
            self._contents.counters.given_back += segment.give_back(segment.wanted)

    def _victim(self, segment: Segment, offset: int) -> tuple[Content, int, Piece] | None:
        """What lies there, unless it is being copied just now: then next time."""
        owner = segment.owners.get(offset)
        if owner is None:
            return None
        content, index = owner
        if content.pins or content.moving or content.freed:
            return None
        for piece in content.places[index]:
            if piece.segment is segment:
                return content, index, piece
        return None

    def _refuge(
        self, content: Content, index: int, segment: Segment
    ) -> tuple[Piece | None, bool]:
        """Another place for a chunk; without one, whether to drop it."""
        contents = self._contents
        _, size = content.span(index)
        for name in contents.policy.demote(size, segment.tier, contents.look()):
            if name == NONE:
                return None, True
            tier = contents.tiers.get(name)
            if tier is None:
                continue
            piece = segments.allocate(tier, size, avoid=segment)
            # Never asks a lender here: a step is waiting.
            if piece is None and tier is not contents.peers:
                fresh = tier.grow(size)
                if fresh is not None:
                    segments.adopt(tier, fresh)
                    piece = segments.allocate(tier, size)
            if piece is not None:
                return piece, False
        return None, False

    # Copies.

    def _begin(self, content: Content, source: Piece, target: Piece) -> None:
        content.moving = True
        source.segment.pins += 1
        target.segment.pins += 1

    def _move(
        self, content: Content, index: int, source: Piece, target: Piece, *, keep: bool
    ) -> bool:
        """Copies a chunk after `_begin`; whether it lies there now. `keep`: the source stays."""
        contents = self._contents
        copied = False
        for end in (source, target):
            if end.segment.throttle is not None:
                end.segment.throttle.begin(content.span(index)[1])
        try:
            copies.copy(target.address, source.address, content.span(index)[1])
            copied = True
        finally:
            with contents.changed:
                content.moving = False
                # After the copy: was it the content that was copied, and does it still count?
                moved = copied and source.good and target.good and not content.freed
                if moved:
                    target.segment.owners[target.extent.offset] = (content, index)
                    content.places[index].insert(0, target)
                    if not keep:
                        contents.without(content, index, source.segment)
                    contents.note(content, index)
                else:
                    contents.release_piece(target)
                source.segment.unpin()
                target.segment.unpin()
                if content.freed and not content.pins:
                    contents.release(content)
                contents.changed.notify_all()
        return moved

    # Up.

    def _climb(self) -> int:
        """Moves chunks up where there is room, `climb_bytes` at most; bytes moved."""
        contents = self._contents
        moved = short = 0
        with contents.changed:
            candidates = list(contents.below)
            contents.climb_due = False
        for content in candidates:
            stays = False
            for index in range(len(content.places)):
                with contents.changed:
                    if content.freed or content.lost:
                        break
                    _, size = content.span(index)
                    source = content.places[index][0]
                    names = contents.better(content, index)
                    if not names:
                        continue
                    stays = True
                    if content.pins or content.moving:
                        contents.climb_due = True
                        continue
                    target = None
                    for name in names:
                        target = target or segments.allocate(contents.tiers[name], size)
                    if target is None:
                        short += size
                        continue
                    if not (source.segment.ready and target.segment.ready):
                        contents.release_piece(target)
                        contents.climb_due = True
                        return moved
                    if moved and moved + size > self._climb_bytes:
                        contents.release_piece(target)
                        contents.climb_due = True
                        return moved
                    self._begin(content, source, target)
                keep = contents.policy.mirror == source.segment.tier
                if self._move(content, index, source, target, keep=keep):
                    moved += size
                    contents.counters.climbed += size
                    stays = bool(contents.better(content, index))
            if not stays:
                with contents.changed:
                    contents.below.pop(content, None)
        if contents.peers is not None:
            contents.peers.wish(short)
        return moved
