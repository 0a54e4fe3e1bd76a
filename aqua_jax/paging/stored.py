"""The copies of pages in stores, which slot has which, and what was counted on the way."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Hashable, Iterator, Sequence

from aqua_jax.errors import StaleHandleError
from aqua_jax.paging.moves import Part, Store, StoreSlot
from aqua_jax.paging.pages import PageHandle


@dataclasses.dataclass
class ResidencyCounters:
    """Totals since the start."""

    departures: int = 0  # owners that gave way and kept something
    returns: int = 0  # owners that found something again
    tokens_out: int = 0  # copied into stores
    tokens_in: int = 0  # copied back
    prefetched: int = 0  # pages whose copy back began before their owner's return
    tokens_revived: int = 0  # found in the pool on return: nothing was copied
    tokens_held: int = 0  # what copying everything at each departure and return would have moved
    failed: int = 0  # moves that did not arrive
    refused: int = 0  # pages not copied out because no store had room
    relocated: int = 0  # pages moved down a tier because a lender wanted its memory
    dropped: int = 0  # copies given up for somebody else's, or for a lender


class Stored:
    """The copy of one page's content in a store, and where in the pool the content was last."""

    __slots__ = (
        "arrivals", "failed", "home", "home_tokens", "outs", "owners", "parts", "promised", "slot",
        "store", "tokens", "waiters",
    )

    def __init__(self, store: Store, slot: StoreSlot) -> None:
        self.store, self.slot = store, slot
        self.parts: list[Part] = []  # that have arrived in the store
        self.tokens = 0  # that are in the store, from the page's first on
        self.promised = 0  # these and those on their way there
        self.outs = 0  # moves on their way out
        self.arrivals = 0  # moves on their way into `home`
        self.failed = False  # of these, one didn't make it
        self.waiters: list[Hashable] = []  # who waits for them
        self.home: PageHandle | None = None  # the pool's page
        self.home_tokens = 0  # that it holds
        self.owners: list[Hashable] = []

    @property
    def busy(self) -> bool:
        """Whether a copy is under way."""
        return self.outs > 0 or self.arrivals > 0

    def count(self) -> None:
        """Notes what the store holds without a gap."""
        end = 0
        for start, count, _ in self.parts:
            if start > end:
                break
            end = max(end, start + count)
        self.tokens = end
        with contextlib.suppress(StaleHandleError):  # given back meanwhile: then it isn't held
            self.store.fill(self.slot, end)


class Tiers:
    """Stores in order of preference, and the copies in their slots."""

    def __init__(self, stores: Sequence[Store]) -> None:
        self.stores = tuple(stores)
        self._by_slot: dict[tuple[int, int], Stored] = {}  # by the store's place and slot

    def place(self) -> Stored | None:
        """An empty copy in the best tier with room."""
        for place, store in enumerate(self.stores):
            slots = store.allocate(1) if store.free_slots else None
            if slots:
                stored = self._by_slot[place, slots[0].id] = Stored(store, slots[0])
                return stored
        return None

    def at(self, place: int, slot: StoreSlot) -> Stored | None:
        """The copy in a slot."""
        return self._by_slot.get((place, slot.id))

    def of(self, place: int) -> Iterator[Stored]:
        """All copies in a store."""
        return iter([stored for (at, _), stored in self._by_slot.items() if at == place])

    def descend(self, stored: Stored) -> bool:
        """Gives a copy an empty slot in a tier below its own; the old one is the caller's to free.
        False, and nothing changed, when there is none."""
        place = self.stores.index(stored.store)
        for lower in range(place + 1, len(self.stores)):
            store = self.stores[lower]
            slots = store.allocate(1) if store.free_slots else None
            if slots:
                del self._by_slot[place, stored.slot.id]
                stored.store, stored.slot = store, slots[0]
                self._by_slot[lower, slots[0].id] = stored
                return True
        return False

    def free(self, stored: Stored) -> None:
        """Frees the slot of a copy that nobody owns; may be repeated."""
        key = self.stores.index(stored.store), stored.slot.id
        if self._by_slot.get(key) is stored:
            del self._by_slot[key]
            with contextlib.suppress(StaleHandleError):  # given back, or the store was closed
                stored.store.free(stored.slot)
