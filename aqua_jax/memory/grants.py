"""Which bytes of an arena are whose: the lender's bookkeeping, without sockets or memory.

Every byte is in exactly one state, and the totals always add up to the arena:

- *free*: zeroed, may be granted;
- *held*: part of a grant;
- *dirty*: given back, not scrubbed yet;
- *withheld*: not lent (the limit is below the arena's size), its memory returned to the system.

A grant whose owner can't be reached but still exists is *quarantined*: it keeps its bytes until the
owner has exited. A stopped process may wake up in the middle of a copy, and no generation check can
stop that copy.

Generations count grants, are never reused, and so name one.
"""

from __future__ import annotations

import dataclasses

from aqua_jax.coordinator.intervals import Intervals
from aqua_jax.errors import ConfigError, ProtocolError, StaleHandleError
from aqua_jax.memory.arena import PAGE, round_up


@dataclasses.dataclass
class Grant:
    """Bytes one borrower holds.

    Attributes:
      generation: its name.
      owner: whoever `Grants.grant` was told.
      offset: where it was granted; bytes.
      size: bytes granted at first.
      held: what of it has not been given back.
      keep: bytes the owner may keep; `size` when nothing is wanted back.
      quarantined: the owner can't be reached.
    """

    generation: int
    owner: int
    offset: int
    size: int
    held: Intervals
    keep: int
    quarantined: bool = False

    @property
    def wanted(self) -> int:
        """Bytes the owner is asked to give back."""
        return max(0, self.held.total - self.keep)


class Grants:
    """The state of an arena of `size` bytes (whole pages), all of it free at first."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.limit = size
        self.free = Intervals([(0, size)])
        self.dirty = Intervals()
        self.withheld = Intervals()
        self._grants: dict[int, Grant] = {}  # in order of granting
        self._generation = 0

    @property
    def held(self) -> int:
        """Bytes granted and not given back."""
        return sum(grant.held.total for grant in self._grants.values())

    @property
    def wanted(self) -> int:
        """Bytes asked back from their owners."""
        return sum(grant.wanted for grant in self._grants.values())

    def all(self) -> list[Grant]:
        """Every grant, oldest first."""
        return list(self._grants.values())

    def of(self, owner: int) -> list[Grant]:
        """The grants of one owner."""
        return [grant for grant in self._grants.values() if grant.owner == owner]

    def grant(self, owner: int, size: int) -> Grant | None:
        """Hands out `size` bytes in one piece, rounded up to whole pages.

        Returns:
          None when no free range is so long; scrubbing dirty ones may help.
        """
        size = round_up(size)
        start = self.free.take(size)
        if start is None:
            return None
        self._generation += 1
        grant = Grant(
            self._generation, owner, start, size, Intervals([(start, start + size)]), size
        )
        self._grants[grant.generation] = grant
        return grant

    def give_back(self, owner: int, generation: int, offset: int, size: int) -> Grant:
        """Takes back [offset, offset + size) of the arena, all held by one grant of `owner`.

        Raises:
          StaleHandleError: that grant has ended.
          ProtocolError: it is somebody else's or never was, or the range isn't all held. Nothing
            changes.
        """
        grant = self._grants.get(generation)
        if grant is None and 0 < generation <= self._generation:
            raise StaleHandleError(f"generation {generation} has been given back")
        if grant is None or grant.owner != owner:
            raise ProtocolError("generation", generation, "that of a lease of one's own")
        if offset % PAGE or size % PAGE or not grant.held.contains(offset, offset + size):
            raise ProtocolError(
                "offset", offset, f"whole pages that the lease holds, not {size} bytes from there"
            )
        grant.held.remove(offset, offset + size)
        self.dirty.add(offset, offset + size)
        if not grant.held.total:
            del self._grants[generation]
        return grant

    def quarantine(self, owner: int) -> int:
        """Notes that `owner` can't be reached; returns the bytes it still holds."""
        grants = self.of(owner)
        for grant in grants:
            grant.quarantined = True
        return sum(grant.held.total for grant in grants)

    def exited(self, owner: int) -> int:
        """Takes back everything of an owner that is gone; returns how many bytes."""
        freed = 0
        for grant in self.of(owner):
            del self._grants[grant.generation]
            freed += grant.held.total
            for start, end in grant.held:
                self.dirty.add(start, end)
        return freed

    def next_dirty(self, most: int) -> tuple[int, int] | None:
        """Takes a dirty range of up to `most` bytes; zeroed, it goes to `scrubbed`."""
        return self.dirty.take_some(most)

    def scrubbed(self, start: int, end: int) -> None:
        """Makes a range of `next_dirty` free."""
        self.free.add(start, end)

    def resize(self, limit: int) -> None:
        """Sets how many bytes may be lent, in whole pages.

        Raises:
          ConfigError: not from 0 to the size of the arena.
        """
        if not 0 <= limit <= self.size:
            raise ConfigError("bytes", limit, f"0 to {self.size}, the size of the arena")
        self.limit = round_up(limit)

    def next_to_withhold(self) -> tuple[int, int] | None:
        """Takes out of lending one range more than the limit allows: dirty ones first, then free.

        Its memory goes back to the system.
        """
        most = self.size - self.limit - self.withheld.total
        taken = self.dirty.take_some(most) or self.free.take_some(most)
        if taken:
            self.withheld.add(*taken)
        return taken

    def next_to_restore(self) -> tuple[int, int] | None:
        """A withheld range that the limit allows to lend; allocated again, it is `restored`."""
        return self.withheld.take_some(self.limit - (self.size - self.withheld.total))

    def restored(self, start: int, end: int) -> None:
        """Makes a range of `next_to_restore` free."""
        self.free.add(start, end)

    def not_restored(self, start: int, end: int) -> None:
        """The memory of a range of `next_to_restore` can't be had: it stays withheld."""
        self.withheld.add(start, end)
        self.limit = self.size - self.withheld.total

    def ask(self) -> list[Grant]:
        """Decides who should give back what the limit forbids to lend: the newest grants first.

        Quarantined owners can't be asked, so others are asked for their bytes too.

        Returns:
          The grants whose `keep` has changed.
        """
        spare = self.free.total + self.dirty.total + self.withheld.total
        need = max(0, self.size - self.limit - spare)
        changed = []
        for grant in reversed(self.all()):
            if grant.quarantined:
                continue
            take = min(need, grant.held.total)
            need -= take
            keep = grant.held.total - take if take else grant.size
            if keep != grant.keep:
                grant.keep = keep
                changed.append(grant)
        return changed
