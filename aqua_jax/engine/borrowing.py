"""The memory of lenders as an engine has it: a store for each lease, more of them as it is lent.

Where the devices of a model have lenders of their own a store has a lease of each (`memory.split`).

A thread asks the lender or the coordinator for what is missing up to the limit, again and again;
the engine looks at what has come at step boundaries. While nobody answers it goes on with what it
holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from aqua_jax.errors import ConfigError
from aqua_jax.memory.joint import JointSegment, JointTier
from aqua_jax.memory.lease import Lease
from aqua_jax.memory.loan import capped
from aqua_jax.memory.pace import Pace
from aqua_jax.memory.peers import PeerTier
from aqua_jax.memory.pinning import Pins
from aqua_jax.memory.segments import LeaseSegment, Segment
from aqua_jax.memory.sources import LeaseSource
from aqua_jax.memory.split import SplitStore
from aqua_jax.memory.stores import PeerStore

LentStore = PeerStore | SplitStore

_ALL = 1 << 40  # asked for where there is no limit: more than anybody has
# Leases at a time; each is a mapping, and costs a look at every step boundary.
MOST_LEASES = 32
# Seconds between two questions that were answered with nothing: the first pause, the longest.
_FIRST_S, _LONGEST_S = 0.1, 1.0


class Borrowing:
    """What is lent to one engine. Belongs to the engine's thread.

    Attributes:
      stores: one for each lease, or for leases that belong together; oldest first.
      leases: that were ever there.
      lost: of these, those whose lender has gone.
      paces: what lenders let copies be at most, for those that say so, by process, name and rate.
      moved: by lender, bytes moved from the pool to its memory, and back.
    """

    def __init__(
        self, sources: Sequence[LeaseSource], limit: int | None, slot_bytes: int,
        page_tokens: int, pins: Pins | None = None, homes: Sequence[int] = (0,),
        one_place: bool = False,
    ) -> None:
        """
        Args:
          sources: whom to ask; owned. With several, each holds a part of every page.
          limit: most bytes; None: all that is lent.
          slot_bytes: of one page of keys and values.
          page_tokens: tokens of a page.
          pins: makes leases ready for a device's copies; None: they are.
          homes: for each device that has an equal part of a page, at which source it is.
          one_place: whether all sources are one coordinator's.
        """
        self.stores: tuple[LentStore, ...] = ()
        self.leases = self.lost = 0
        self.paces: dict[tuple[int, str, int], Pace] = {}
        self.moved: dict[str, list[int]] = {}
        self._limit, self._slot_bytes, self._page_tokens = limit, slot_bytes, page_tokens
        self._homes = tuple(homes)
        each = slot_bytes // len(homes)
        self._units = [each * homes.count(index) for index in range(len(sources))]
        pauses = (_FIRST_S, _LONGEST_S)
        self._tier = (
            PeerTier(sources, limit, step=slot_bytes, pauses_s=pauses, pins=pins)
            if len(sources) == 1 else JointTier(
                sources, self._units, pauses_s=pauses, pins=pins, one_place=one_place
            )
        )
        self._wished = 0

    def open(self) -> tuple[LentStore, ...]:
        """Asks once, and waits for the answer.

        Returns:
          The first stores; none if nothing is lent now.
        """
        segment = self._tier.grow(self._missing())
        if segment is not None:
            self._tier.arrivals.appendleft(segment)
        return self.take()

    def _missing(self) -> int:
        """Bytes that would be of use."""
        if len(self.stores) >= MOST_LEASES:
            return 0
        if self._limit is None:
            return _ALL
        held = sum(part.lease.held.total for store in self.stores for part in store.parts)
        missing = self._limit - held
        return missing if missing >= self._slot_bytes else 0

    @property
    def arrived(self) -> bool:
        """Whether `take` has something."""
        return bool(self._tier.arrivals)

    def take(self) -> tuple[LentStore, ...]:
        """Stores that have come since the last time, and says what else is wished for."""
        come: list[LentStore] = []
        while self._tier.arrivals:
            store = self._store(self._tier.arrivals.popleft())
            if store is not None:
                come.append(store)
                self.leases += len(store.parts)
                for part in store.parts:
                    self.moved.setdefault(part.lease.lender, [0, 0])
        self.stores += tuple(come)
        missing = self._missing()
        if missing != self._wished or come:
            self._wished = missing
            self._tier.wish(missing)
        return tuple(come)

    def _store(self, segment: Segment) -> LentStore | None:
        assert isinstance(segment, LeaseSegment | JointSegment)
        try:
            parts = [
                PeerStore(lease, unit, self._page_tokens, pace=self._pace(lease))
                for lease, unit in zip(segment.leases, self._units, strict=True)
            ]
        except ConfigError:  # too small for a page
            for lease in segment.leases:
                lease.close()
            return None
        if len(parts) == 1:
            return parts[0]
        return SplitStore(parts, self._homes, self._page_tokens)

    def _pace(self, lease: Lease) -> Pace | None:
        """One for all leases of a lender."""
        key = capped(lease)
        if key is not None and key not in self.paces:
            self.paces[key] = Pace(key[-1], self._slot_bytes)
        return None if key is None else self.paces[key]

    def drop(self, store: LentStore) -> None:
        """Lets go of a store that nobody uses: its lender is gone, or has got everything back."""
        self.stores = tuple(one for one in self.stores if one is not store)
        if store.capacity:
            self.lost += sum(part.lost for part in store.parts)
        self._tier.end(store.close)

    def count(self, store: object, size: int, inward: bool) -> None:
        """So many bytes have moved between the pool and a store, if it is a lender's."""
        if isinstance(store, PeerStore | SplitStore):
            for part in store.parts:
                share = size * part.slot_bytes // store.slot_bytes
                self.moved[part.lease.lender][inward] += share

    def lenders(self) -> list[dict[str, Any]]:
        """Whose memory there is, how much, what is in it, what has moved."""
        found = {
            name: {
                "lender": name, "leases": 0, "capacity": 0, "in_use": 0, "wanted": 0, "lost": 0,
                "bandwidth_cap": 0, "kind": "", "shared_by": "", "bytes_out": out, "bytes_in": back,
            }
            for name, (out, back) in list(self.moved.items())
        }
        for store in self.stores:
            for part in store.parts:
                shown: dict[str, Any] = found[part.lease.lender]
                shown["leases"] += 1
                shown["capacity"] += part.capacity
                shown["in_use"] += store.in_use
                shown["wanted"] += part.wanted_slots
                shown["lost"] += part.lost
                shown["bandwidth_cap"] = 0 if part.pace is None else part.pace.cap
                shown["kind"], shown["shared_by"] = part.lease.kind, part.lease.way
        return list(found.values())

    def close(self) -> None:
        """Gives everything back and ends the connection; may be repeated."""
        for store in self.stores:
            store.close()
        self._tier.close()
