"""What happens to copies when the owner of a store's memory wants it back, or is gone."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Protocol

from aqua_jax.paging.moves import Store, StoreSlot
from aqua_jax.paging.stored import Stored, Tiers

Copy = Callable[[Store, StoreSlot, Store, StoreSlot], None]

_PAGES = 16  # moved down a tier per call, so that no step waits long for it


class Books(Protocol):
    """What is asked of `Residency`."""

    counters: Any

    def held_back(self, stored: Stored) -> bool:
        """Whether a copy has to stay where it is for now."""

    def alive(self, stored: Stored) -> bool:
        """Whether the pool has the content."""

    def copy_again(self, stored: Stored) -> None:
        """From the pool to the slot that it has now."""

    def lost(self, stored: Stored) -> None:
        """The store doesn't have it any more."""

    def cut(self, owner: Hashable, stored: Stored) -> None:
        """Takes away a copy and all behind it."""


class Reclaim:
    """Responds to lenders, as much as they ask for and no more than a few pages at a time."""

    def __init__(self, tiers: Tiers, books: Books) -> None:
        self._tiers, self._books = tiers, books
        self._retired: set[int] = set()  # places of stores that have stopped handing out slots
        self._lost: set[int] = set()  # places of stores whose lender is gone

    def respond(self, copy: Copy) -> None:
        """Called at a step boundary."""
        for place, store in enumerate(self._tiers.stores):
            if store.lost:
                if place not in self._lost:
                    self._lost.add(place)
                    self._lose(place)
            elif wanted := store.wanted_slots:
                self._retired.add(place)
                self._give_back(place, store, wanted, copy)
            elif place in self._retired:
                self._retired.discard(place)
                store.restore()  # type: ignore[attr-defined]  # the lender has changed its mind

    def _give_back(self, place: int, store: Any, wanted: int, copy: Copy) -> None:
        moved, highest = 0, store.capacity - wanted - 1  # the highest slot that can't go yet
        for slot in store.retire(wanted):  # highest first
            stored = self._tiers.at(place, slot)
            if stored is None:  # given up a moment ago, with an earlier page of its owner
                continue
            if moved == _PAGES or self._books.held_back(stored):
                highest = max(highest, slot.id)
                continue
            moved += 1
            self._move_down(stored, copy)
        count = store.capacity - 1 - highest
        if count:
            store.give_back(count)

    def _move_down(self, stored: Stored, copy: Copy) -> None:
        """To a lower tier, or nowhere."""
        old = stored.store, stored.slot
        if self._tiers.descend(stored):
            copy(*old, stored.store, stored.slot)
            old[0].free(old[1])
            stored.count()
            self._books.counters.relocated += 1
            return
        self._books.counters.dropped += 1
        for owner in list(stored.owners):
            self._books.cut(owner, stored)

    def _lose(self, place: int) -> None:
        """What is still in the pool is copied to another tier at once."""
        for stored in self._tiers.of(place):
            # What arrives just now is refused by whoever copies.
            if not stored.owners or stored.arrivals:
                continue
            old = stored.store, stored.slot
            if self._books.alive(stored) and self._tiers.descend(stored):
                old[0].free(old[1])
                self._books.copy_again(stored)
            else:
                self._books.lost(stored)
