"""The memory of lenders as an engine has it: a store for each lease, more of them as they are lent.

A thread asks the lender or the coordinator for what is missing up to the limit, again and again;
the engine looks at what has come at step boundaries. While nobody answers it goes on with what it
holds.
"""

from __future__ import annotations

from typing import Any

from aqua_jax.errors import ConfigError
from aqua_jax.memory.lease import Lease
from aqua_jax.memory.loan import Loan
from aqua_jax.memory.pace import Pace
from aqua_jax.memory.peers import PeerTier
from aqua_jax.memory.pinning import Pins
from aqua_jax.memory.segments import LeaseSegment, Segment
from aqua_jax.memory.sources import LeaseSource
from aqua_jax.memory.stores import PeerStore

_ALL = 1 << 40  # asked for where there is no limit: more than anybody has
# Leases at a time; each is a mapping, and costs a look at every step boundary.
MOST_LEASES = 32
# Seconds between two questions that were answered with nothing: the first pause, the longest.
_FIRST_S, _LONGEST_S = 0.1, 1.0


class Borrowing:
    """What is lent to one engine. Belongs to the engine's thread.

    Attributes:
      stores: one for each lease, oldest first.
      leases: that were ever there.
      lost: of these, those whose lender has gone.
      paces: what lenders let copies be at most, for those that say so, by arena.
      moved: by lender, bytes moved from the pool to its memory, and back.
    """

    def __init__(
        self, source: LeaseSource, limit: int | None, slot_bytes: int, page_tokens: int,
        pins: Pins | None = None,
    ) -> None:
        """
        Args:
          source: whom to ask; owned.
          limit: most bytes; None: all that is lent.
          slot_bytes: of one page of keys and values.
          page_tokens: tokens of a page.
          pins: makes leases ready for a device's copies; None: they are.
        """
        self.stores: tuple[PeerStore, ...] = ()
        self.leases = self.lost = 0
        self.paces: dict[int, Pace] = {}
        self.moved: dict[str, list[int]] = {}
        self._limit, self._slot_bytes, self._page_tokens = limit, slot_bytes, page_tokens
        self._tier = PeerTier(
            [source], limit, step=slot_bytes, pauses_s=(_FIRST_S, _LONGEST_S), pins=pins
        )
        self._wished = 0

    def open(self) -> tuple[PeerStore, ...]:
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
        held = sum(store.lease.held.total for store in self.stores)
        missing = self._limit - held
        return missing if missing >= self._slot_bytes else 0

    @property
    def arrived(self) -> bool:
        """Whether `take` has something."""
        return bool(self._tier.arrivals)

    def take(self) -> tuple[PeerStore, ...]:
        """Stores that have come since the last time, and says what else is wished for."""
        come: list[PeerStore] = []
        while self._tier.arrivals:
            store = self._store(self._tier.arrivals.popleft())
            if store is not None:
                come.append(store)
                self.moved.setdefault(store.lease.lender, [0, 0])
        self.stores += tuple(come)
        self.leases += len(come)
        missing = self._missing()
        if missing != self._wished or come:
            self._wished = missing
            self._tier.wish(missing)
        return tuple(come)

    def _store(self, segment: Segment) -> PeerStore | None:
        assert isinstance(segment, LeaseSegment)
        lease: Lease = segment.lease
        try:
            return PeerStore(
                lease, self._slot_bytes, self._page_tokens, pace=self._pace(lease)
            )
        except ConfigError:  # too small for a page
            lease.close()
            return None

    def _pace(self, lease: Lease) -> Pace | None:
        """One for all leases of an arena: it is the arena's owner who said it."""
        if not isinstance(lease, Loan) or not lease.bandwidth_cap:
            return None
        pace = self.paces.get(lease.arena)
        if pace is None:
            pace = self.paces[lease.arena] = Pace(lease.bandwidth_cap, self._slot_bytes)
        return pace

    def drop(self, store: PeerStore) -> None:
        """Lets go of a store that nobody uses: its lender is gone, or has got everything back."""
        self.stores = tuple(one for one in self.stores if one is not store)
        self.lost += store.lost and bool(store.capacity)
        store.close()

    def count(self, store: object, size: int, inward: bool) -> None:
        """So many bytes have moved between the pool and a store, if it is a lender's."""
        if isinstance(store, PeerStore):
            self.moved[store.lease.lender][inward] += size

    def lenders(self) -> list[dict[str, Any]]:
        """Whose memory there is, how much, what is in it, what has moved."""
        found = {
            name: {
                "lender": name, "leases": 0, "capacity": 0, "in_use": 0, "wanted": 0, "lost": 0,
                "bandwidth_cap": 0, "bytes_out": out, "bytes_in": back,
            }
            for name, (out, back) in list(self.moved.items())
        }
        for store in self.stores:
            shown: dict[str, Any] = found[store.lease.lender]
            shown["leases"] += 1
            shown["capacity"] += store.capacity
            shown["in_use"] += store.in_use
            shown["wanted"] += store.wanted_slots
            shown["lost"] += store.lost
            shown["bandwidth_cap"] = 0 if store.pace is None else store.pace.cap
        return list(found.values())

    def close(self) -> None:
        """Gives everything back and ends the connection; may be repeated."""
        for store in self.stores:
            store.close()
        self._tier.close()
