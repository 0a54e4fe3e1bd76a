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
    climbed: int = 0  # pages moved up a tier because there was room again
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
    """Stores in order of preference, and the copies in their slots.

    Attributes:
      stores: replaced, never changed; a lender's come and go while others stay.
    """

    def __init__(self, stores: Sequence[Store]) -> None:
        self.stores = tuple(stores)
        self._by_slot: dict[Store, dict[int, Stored]] = {store: {} for store in stores}

    def __iter__(self) -> Iterator[Store]:
        return iter(self.stores)

    def add(self, store: Store) -> None:
        """One more, empty: behind those of its name, before all others."""
        names = [one.name for one in self.stores]
        place = len(names) - names[::-1].index(store.name) if store.name in names else 0
        self.stores = (*self.stores[:place], store, *self.stores[place:])
        self._by_slot[store] = {}

    def remove(self, store: Store) -> bool:
        """Forgets a store; False, and nothing changed, if copies are in it."""
        if self._by_slot[store]:
            return False
        self.stores = tuple(one for one in self.stores if one is not store)
        del self._by_slot[store]
        return True

    def place(self) -> Stored | None:
        """An empty copy in the best tier with room; better in a lower one than in one whose lender
        lets copies wait."""
        congested: list[Store] = []
        for store in self.stores:
            if store.pace is not None and store.pace.congested:
                congested.append(store)
            elif stored := self._empty(store):
                return stored
        for store in congested:
            if stored := self._empty(store):
                return stored
        return None

    def _empty(self, store: Store) -> Stored | None:
        slots = store.allocate(1) if store.free_slots else None
        if not slots:
            return None
        stored = self._by_slot[store][slots[0].id] = Stored(store, slots[0])
        return stored

    @property
    def paced_page_s(self) -> float:
        """Seconds by which lenders' caps delay a page that is copied now; 0: there is room that
        has none."""
        rates = []
        for store in reversed(self.stores):  # what has no cap is mostly the last one
            if store.free_slots:
                if store.pace is None:
                    return 0.0
                rates.append(1.0 / store.pace.page_s)
        return 1.0 / max(rates) if rates else 0.0

    def at(self, store: Store, slot: StoreSlot) -> Stored | None:
        """The copy in a slot."""
        return self._by_slot.get(store, {}).get(slot.id)

    def of(self, store: Store) -> list[Stored]:
        """All copies in a store."""
        return list(self._by_slot[store].values())

    def refuge(self, stored: Stored) -> tuple[Store, StoreSlot] | None:
        """An empty slot for a copy that has to leave its own: in the same store, or the best other
        one that has room; None when there is none."""
        for store in (stored.store, *self.stores):
            slots = store.allocate(1) if store.free_slots else None
            if slots:
                return store, slots[0]
        return None

    def settle(self, stored: Stored, store: Store, slot: StoreSlot) -> None:
        """A copy is in another slot from now on; the old one is the caller's to free."""
        del self._by_slot[stored.store][stored.slot.id]
        stored.store, stored.slot = store, slot
        self._by_slot[store][slot.id] = stored

    def descend(self, stored: Stored) -> bool:
        """Gives a copy another slot, as `refuge` has it; the old one is the caller's to free.
        False, and nothing changed, when there is none."""
        found = self.refuge(stored)
        if found is not None:
            self.settle(stored, *found)
        return found is not None

    def free(self, stored: Stored) -> None:
        """Frees the slot of a copy that nobody owns; may be repeated."""
        copies = self._by_slot.get(stored.store, {})
        if copies.get(stored.slot.id) is stored:
            del copies[stored.slot.id]
            with contextlib.suppress(StaleHandleError):  # given back, or the store was closed
                stored.store.free(stored.slot)
