"""What happens to copies when the owner of a store's memory wants it back, is gone, or has more.

Copies go from store to store beside the steps (`Shift`): down when a lender wants its memory, up
again when a faster tier has room and nothing else is under way. Until a shift has ended the copy is
where it was. Then it counts only if nothing has happened to either end meanwhile; otherwise it is
as if it had never begun.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol

from aqua_jax.errors import StaleHandleError
from aqua_jax.paging.moves import Pace, Shift, Store, StoreSlot
from aqua_jax.paging.stored import Stored, Tiers

Copy = Callable[[Shift], None]

# Shifts under way at most: beginning and ending one takes the host some microseconds.
_SHIFTS = 1024
_LOOKS = 64  # copies looked at per call for one that may climb


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
    """Responds to lenders, as much as they ask for; lets copies climb."""

    def __init__(self, tiers: Tiers, books: Books) -> None:
        self._tiers, self._books = tiers, books
        self._retired: set[Store] = set()  # have stopped handing out some of their slots
        self._lost: set[Store] = set()  # their lender is gone
        # Under way, with what the copy held when they began and whether they climb; and the slots
        # they read or write.
        self._shifts: dict[Shift, tuple[Stored, int, bool]] = {}
        self._pinned: set[tuple[Store, int]] = set()
        self._climbers: list[Stored] = []  # not looked at yet

    @property
    def shifting(self) -> int:
        """Shifts begun that will end and have not been ended here."""
        return sum(not shift.failed for shift in self._shifts)

    def respond(self, copy: Copy, climb: int = 0) -> None:
        """Called at a step boundary.

        Args:
          copy: begins a shift; returns at once.
          climb: shifts to a faster tier that may be under way; 0: none are begun.
        """
        if self._shifts:
            self._end_shifts()
        wanting: list[tuple[Any, Sequence[StoreSlot], int]] = []
        for store in self._tiers.stores:
            if store.lost:
                if store not in self._lost:
                    self._note(self._lost, store)
                    self._lose(store)
            elif wanted := store.wanted_slots:
                self._note(self._retired, store)
                # All of them first: nothing goes where it is wanted as well.
                wanting.append((store, store.retire(wanted), wanted))  # type: ignore[attr-defined]
            elif store in self._retired:
                self._retired.discard(store)
                store.restore()  # type: ignore[attr-defined]  # the lender has changed its mind
        for store, slots, wanted in wanting:
            self._give_back(store, slots, wanted, copy)
        if climb and not wanting and len(self._shifts) < climb:
            self._climb(copy, climb - len(self._shifts))

    def _note(self, where: set[Store], store: Store) -> None:
        where.intersection_update(self._tiers.stores)  # others may have been removed
        where.add(store)

    # Shifts.

    def _begin(
        self, stored: Stored, place: tuple[Store, StoreSlot], copy: Copy, up: bool = False
    ) -> None:
        shift = Shift(stored.store, stored.slot, *place)
        for pace in _paces(shift.source, shift.target):
            pace.begin(shift, shift.source.slot_bytes)
        stored.store.retain(stored.slot)  # its owner may let go of it meanwhile
        self._shifts[shift] = stored, stored.tokens, up
        self._pinned.update(_ends(shift))
        copy(shift)

    def _end_shifts(self) -> None:
        for shift, (stored, tokens, up) in list(self._shifts.items()):
            there = self._tiers.at(shift.source, shift.slot) is stored
            if not shift.done or (there and stored.busy):  # moves under way name the old slot
                continue
            del self._shifts[shift]
            for pace in _paces(shift.source, shift.target):
                pace.ended(shift)
            self._pinned.difference_update(_ends(shift))
            good = (
                there and stored.tokens == tokens and shift.source.holds(shift.slot)
                and not shift.target.lost
            )
            if good:
                self._tiers.settle(stored, shift.target, shift.place)
                stored.count()
                self._books.counters.relocated += not up
                self._books.counters.climbed += up
                _free(shift.source, shift.slot)
            else:
                _free(shift.target, shift.place)
            _free(shift.source, shift.slot)

    # Down.

    def _give_back(
        self, store: Any, slots: Sequence[StoreSlot], wanted: int, copy: Copy
    ) -> None:
        highest = store.capacity - wanted - 1  # the highest slot that can't go yet
        growing = any(other.growing for other in self._tiers)
        # Highest first; but what there is no room for is better the end of a sequence than its
        # beginning, without which the rest is of no use, and beginnings lie lower.
        room = sum(other.free_slots for other in self._tiers if not other.lost)
        for slot in slots if room >= len(slots) else reversed(slots):
            stored = self._tiers.at(store, slot)
            if (store, slot.id) in self._pinned:
                highest = max(highest, slot.id)
            elif stored is None:  # given up a moment ago, with an earlier page of its owner
                continue
            elif stored.busy or len(self._shifts) >= _SHIFTS:
                highest = max(highest, slot.id)
            elif not _admitted(store) and not store.pressed:
                highest = max(highest, slot.id)
            elif place := self._refuge(stored):
                highest = max(highest, slot.id)
                self._begin(stored, place, copy)
            elif self._books.held_back(stored) or (growing and not store.pressed):
                highest = max(highest, slot.id)
            else:
                self._books.counters.dropped += 1
                for owner in list(stored.owners):
                    self._books.cut(owner, stored)
        count = store.capacity - 1 - highest
        if count:
            store.give_back(count)

    def _refuge(self, stored: Stored) -> tuple[Store, StoreSlot] | None:
        """Where a copy can be shifted to now; None: nowhere, or its lender has no time left for
        what its own pace allows."""
        return self._tiers.refuge(stored) if _admitted(stored.store) else None

    def _lose(self, store: Store) -> None:
        """What is still in the pool is copied to another tier at once."""
        for stored in self._tiers.of(store):
            # What arrives just now is refused by whoever copies.
            if not stored.owners or stored.arrivals:
                continue
            old = stored.store, stored.slot
            if self._books.alive(stored) and self._tiers.descend(stored):
                _free(*old)
                self._books.copy_again(stored)
            else:
                self._books.lost(stored)

    # Up.

    def _climb(self, copy: Copy, most: int) -> None:
        stores = self._tiers.stores
        upper = next((store for store in stores if store.free_slots and not store.lost), None)
        lower = stores[-1] if stores else None
        if upper is None or lower is None or lower.name == upper.name or lower.lost:
            return
        if not _admitted(upper):
            return
        if not self._climbers:
            self._climbers = self._tiers.of(lower)
        for _ in range(min(_LOOKS, len(self._climbers))):
            stored = self._climbers.pop()
            if (
                self._tiers.at(lower, stored.slot) is not stored or stored.busy
                or not stored.tokens or (lower, stored.slot.id) in self._pinned
            ):
                continue
            slots = upper.allocate(1)
            if slots is None:
                return
            self._begin(stored, (upper, slots[0]), copy, up=True)
            most -= 1
            if not most or not _admitted(upper):
                return


def _paces(*stores: Store) -> set[Pace]:
    """What a copy between these has to keep to."""
    return {store.pace for store in stores if store.pace is not None}


def _admitted(*stores: Store) -> bool:
    """Whether a slot may be copied from, or to, these now."""
    return all(pace.room(stores[0].slot_bytes) for pace in _paces(*stores))


def _ends(shift: Shift) -> tuple[tuple[Store, int], tuple[Store, int]]:
    return (shift.source, shift.slot.id), (shift.target, shift.place.id)


def _free(store: Store, slot: StoreSlot) -> None:
    with contextlib.suppress(StaleHandleError):  # given back, or the store was closed
        store.free(slot)
