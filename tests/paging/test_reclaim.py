"""What happens to copies when lenders want memory back, and when they lend again: case by case."""

from __future__ import annotations

from typing import Any

import pytest

from aqua_jax.memory import growing
from aqua_jax.memory.pace import Pace
from aqua_jax.memory.stores import HostStore, PeerStore
from aqua_jax.paging.moves import Shift
from aqua_jax.paging.pages import PagePool
from aqua_jax.paging.residency import Residency
from tests.scheduling.fake_copies import SLOT_BYTES, host_store, peer_store

TOKENS = 4  # of a page


class World:
    """Owners that have left, their pages in stores, and a thread that copies when told to."""

    def __init__(self, *stores: PeerStore | HostStore, owners: int = 4, pages: int = 5) -> None:
        self.pool = PagePool(owners * pages, TOKENS)
        self.residency = Residency(self.pool, stores)
        self.shifts: list[Shift] = []
        for owner in range(owners):
            taken = self.pool.allocate(pages)
            assert taken is not None
            self.residency.leave(owner, taken, pages * TOKENS)
            self.report()

    def report(self) -> None:
        """Moves are made at once."""
        for move in self.residency.take_moves(1000):
            self.residency.finished(move, True)

    def respond(self, climb: int = 0, copy: bool = True) -> None:
        """A step boundary; what has begun is copied before the next."""
        self.residency.respond(self.shifts.append, climb)
        if copy:
            for shift in self.shifts:
                shift.done = True
            self.shifts.clear()

    def found(self, owner: int = 0) -> int:
        """Tokens that the owner has in stores, whatever the pool has."""
        return self.residency.backed_tokens(owner)


def want(store: PeerStore, slots: int) -> None:
    """The lender lets so many slots stay."""
    lease: Any = store.lease
    lease.keep = slots * SLOT_BYTES


def test_the_same_lease_then_another_then_the_host_and_no_more_than_asked():
    first, second, host = peer_store(24, TOKENS), peer_store(6, TOKENS), host_store(40, TOKENS)
    world = World(first, second, host)
    assert first.in_use == 20
    for owner in (0, 2):  # the slots of these come free, the lowest among them
        world.residency.drop(owner)
    want(first, 12)
    world.respond()
    assert first.capacity == 20  # what is used by nobody goes at once
    world.respond()
    assert (first.capacity, first.in_use, second.in_use, host.in_use) == (12, 10, 0, 0)
    want(first, 2)
    world.respond()
    world.respond()
    assert (first.capacity, first.in_use, second.in_use, host.in_use) == (2, 2, 6, 2)
    assert world.residency.counters.dropped == 0 and world.found(1) == world.found(3) == 20
    world.respond()
    assert first.capacity == 2 and not world.shifts


def test_without_room_below_the_rest_is_given_up():
    first, host = peer_store(20, TOKENS), host_store(3, TOKENS)
    world = World(first, host)
    want(first, 15)
    world.respond()
    world.respond()
    assert first.capacity == 15 and host.in_use == 3
    assert world.residency.counters.relocated == 3
    # The end of one sequence, and nothing else.
    assert world.residency.counters.dropped == 1
    assert [world.found(owner) for owner in range(4)] == [20, 20, 20, 12]


def test_a_tier_that_grows_is_waited_for_and_nothing_is_dropped(monkeypatch):
    monkeypatch.setattr(growing, "GROWTH", 2 * SLOT_BYTES)
    host = HostStore(40 * SLOT_BYTES, SLOT_BYTES, TOKENS, grows=True)
    first = peer_store(20, TOKENS)
    world = World(first, host)
    want(first, 0)
    for _ in range(10_000):
        world.respond()
        if not first.capacity:
            break
    assert host.in_use == 20 and world.residency.counters.dropped == 0
    host.close()


def test_a_copy_that_grew_while_it_was_shifted_stays_where_all_of_it_is():
    first, host = peer_store(5, TOKENS), host_store(10, TOKENS)
    world = World(first, host, owners=1)
    residency, pool = world.residency, world.pool
    residency.drop(0)
    pages = pool.allocate(5)
    residency.leave(0, pages, 18)
    world.report()
    want(first, 0)
    world.respond(copy=False)
    assert len(world.shifts) == 5
    # Back from the pool, and away again with two tokens more on the last page.
    found = residency.find(0)
    homes = [home for home, _, _ in found]
    for home in homes:
        pool.retain(home)
    residency.come_back(0, found, homes, homes)
    residency.leave(0, homes, 20)
    world.report()
    for shift in world.shifts:
        shift.done = True
    world.respond(copy=False)
    assert [stored.store for stored in residency.copies(0)] == [host] * 4 + [first]
    world.respond()
    world.respond()
    assert first.capacity == 0 and host.in_use == 5 and world.found() == 20


def test_a_shift_whose_owner_has_ended_counts_for_nothing():
    first, host = peer_store(20, TOKENS), host_store(40, TOKENS)
    world = World(first, host)
    want(first, 0)
    world.respond(copy=False)
    assert len(world.shifts) == 20 and host.in_use == 20
    for owner in range(4):
        world.residency.drop(owner)
    # Somebody still reads and writes there: neither end is given away.
    world.respond(copy=False)
    assert first.capacity == 20 and first.in_use == 20 and host.in_use == 20
    for shift in world.shifts:
        shift.done = True
    world.respond()
    assert first.capacity == 0 and host.in_use == 0
    assert world.residency.counters.relocated == 0


def test_a_lender_that_changes_its_mind_or_dies_in_the_middle():
    first, host = peer_store(20, TOKENS), host_store(40, TOKENS)
    world = World(first, host)
    want(first, 10)
    world.respond(copy=False)
    want(first, 20)
    world.respond()
    world.respond()
    assert first.capacity == 20 and first.free_slots == 10 and host.in_use == 10
    want(first, 5)
    world.respond(copy=False)
    lease: Any = first.lease
    lease.alive = False
    for shift in world.shifts:
        shift.done = True
    world.respond()
    assert first.in_use == 0 and world.residency.tiers.remove(first)  # the pool had it all still
    world.report()
    assert host.in_use == 20 and [world.found(owner) for owner in range(4)] == [20] * 4


def test_pages_climb_when_told_so_and_somebody_lends():
    host = host_store(40, TOKENS)
    world = World(host)
    fresh = peer_store(12, TOKENS)
    world.residency.tiers.add(fresh)
    world.respond()
    assert fresh.in_use == 0
    for _ in range(10):
        world.respond(climb=3, copy=False)
        assert len(world.shifts) <= 3
        for shift in world.shifts:
            shift.done = True
        world.shifts.clear()
    world.respond()
    assert (fresh.in_use, host.in_use) == (12, 8)
    assert world.residency.counters.climbed == 12
    assert [world.found(owner) for owner in range(4)] == [20] * 4


@pytest.mark.parametrize("late", [False, True])
def test_a_lenders_own_pace_holds_back_what_it_wants_until_its_deadline(late):
    now = [0.0]
    pace = Pace(10 * SLOT_BYTES, SLOT_BYTES, clock=lambda: now[0])  # a page in a tenth of a second
    first, host = peer_store(20, TOKENS), host_store(40, TOKENS)
    world = World(first, host)
    first.pace = pace
    want(first, 0)
    lease: Any = first.lease
    lease.deadline = 0.0 if late else float("inf")
    world.respond()
    world.respond()
    if late:
        assert first.capacity == 0 and host.in_use < 2
        assert world.residency.counters.dropped >= 18
        return
    assert first.in_use == 19 and host.in_use == 1
    for _ in range(40):
        now[0] += 0.11
        world.respond()
    assert first.capacity == 0 and host.in_use == 20 and world.residency.counters.dropped == 0
