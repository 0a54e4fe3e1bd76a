"""Memory of several lenders at once, for slots that have a part in each: of all, or of none."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from aqua_jax.errors import AquaError
from aqua_jax.memory.lease import Lease
from aqua_jax.memory.peers import RETRY_S, PeerTier
from aqua_jax.memory.pinning import Pins
from aqua_jax.memory.segments import Segment
from aqua_jax.memory.sources import LeaseSource

_log = logging.getLogger(__name__)
# Sources that share what there is ask for less when one of them has left nothing to the others, so
# many times at once, and wait for what was given back to be zeroed.
_TRIES, _ZEROED_S = 10, 0.05


class JointSegment(Segment):
    """A lease of each source, in their order, for the same number of slots at least. Owns them."""

    def __init__(self, leases: Sequence[Lease]) -> None:
        super().__init__("peer", leases[0].address, sum(lease.size for lease in leases))
        self.leases = tuple(leases)

    def close(self) -> None:
        """Gives everything back."""
        for lease in self.leases:
            lease.close()


class JointTier(PeerTier):
    """As `PeerTier`, but each source has to give its part; what comes are `JointSegment`s.

    Whoever had nothing the last time is asked first, so that while one has nothing the others'
    memory isn't taken in vain again and again. What has no counterpart is given back at once.

    Sources of one coordinator may ask for the same memory, and the first one could take all of it.
    They are asked for half of that then, and for everything again once they have agreed.
    """

    def __init__(
        self, sources: Sequence[LeaseSource], units: Sequence[int], *,
        pauses_s: tuple[float, float], pins: Pins | None = None, one_place: bool = False,
    ) -> None:
        """
        Args:
          sources: whom to ask; owned.
          units: bytes of a slot at each source.
          pauses_s: see `PeerTier`.
          pins: see `PeerTier`.
          one_place: whether the sources may give the same memory to whoever comes first.
        """
        super().__init__(sources, step=1, pauses_s=pauses_s, pins=pins)
        self._one_place = one_place
        self._most: int | None = None  # slots to ask for, for what was left of more was nothing
        self._units = tuple(units)
        self._order = list(range(len(self._sources)))

    def _borrow(self, need: int, *, patient: bool) -> Segment | None:
        if self._closing.is_set() or (not patient and max(self._not_before) > self._clock()):
            return None
        slots = need // sum(self._units)
        for _ in range(_TRIES):
            segment = self._of_all(slots if self._most is None else min(slots, self._most))
            if segment is not None or self._most is None:
                break
            if self._closing.wait(_ZEROED_S):
                break
        self._most = None
        return segment

    def _of_all(self, slots: int) -> Segment | None:
        """Asks every source for its part of so many slots."""
        wanted = slots
        found: dict[int, list[Lease]] = {}
        for index in list(self._order):
            unit = self._units[index]
            found[index] = self._ask(index, slots * unit) if slots else []
            slots = min(slots, sum(lease.size // unit for lease in found[index]))
            if not slots:
                if self._one_place and len(found) > 1:
                    others = [
                        sum(lease.size // self._units[other] for lease in leases)
                        for other, leases in found.items() if other != index
                    ]
                    self._most = max(1, min(wanted, *others) // 2)
                self._order.remove(index)
                self._order.insert(0, index)
                self._not_before[index] = self._clock() + RETRY_S
                break
        # The largest with the largest: little is left over.
        rows = [sorted(found.get(index, ()), key=lambda one: -one.size)
                for index in range(len(self._sources))]
        segments = [JointSegment(leases) for leases in zip(*rows, strict=False)]
        for row in rows:
            for lease in row[len(segments) :]:
                lease.close()
        self.arrivals += segments[1:]
        return segments[0] if segments else None

    def _ask(self, index: int, size: int) -> list[Lease]:
        try:
            found = [lease for lease in self._sources[index].borrow(size) if self._ready(lease)]
        except AquaError as error:
            _log.info("no memory to borrow: %s", error)
            return []
        for lease in [lease for lease in found if lease.size < self._units[index]]:
            found.remove(lease)
            lease.close()
        return found
