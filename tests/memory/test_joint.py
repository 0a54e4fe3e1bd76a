"""Memory of several lenders at once, and copies that keep to the paces of several."""

from __future__ import annotations

import random
import time

import pytest

from aqua_jax.errors import LenderError
from aqua_jax.memory.arena import PAGE, Arena
from aqua_jax.memory.joint import JointSegment, JointTier
from aqua_jax.memory.lease import Lease
from aqua_jax.memory.pace import JointPace, Pace
from tests.memory.leftovers import leftovers
from tests.memory.lending import wait_for

PAUSES = (0.001, 0.01)


class Source:
    """A lender in pieces: as much of its free bytes as is asked for, `piece` at a time."""

    def __init__(self, free: int, piece: int = 1 << 40) -> None:
        self.free, self.piece = free, piece
        self.asked: list[int] = []
        self.dead = self.closed = False

    def borrow(self, size: int) -> list[Lease]:
        self.asked.append(size)
        if self.dead:
            raise LenderError("gone")
        found = []
        while (most := min(size, self.free, self.piece) // PAGE * PAGE) and len(found) < 3:
            self.free, size = self.free - most, size - most
            found.append(Lease(Arena.anonymous(most), 1, self._back))
        return found

    def _back(self, lease: Lease, offset: int, size: int) -> None:
        self.free += size

    def close(self) -> None:
        self.closed = True


def slots_of(segment, units: tuple[int, ...]) -> int:
    return min(lease.size // unit for lease, unit in zip(segment.leases, units, strict=True))


def test_each_gives_its_part_or_nobody_does():
    units = (2 * PAGE, PAGE)
    with leftovers() as left:
        near, far = Source(64 * PAGE), Source(0)
        tier = JointTier([near, far], units, pauses_s=PAUSES)
        assert tier.grow(90 * PAGE) is None
        assert near.free == 64 * PAGE  # it isn't held while the other has nothing
        far.free = 10 * PAGE
        wait_for(lambda: (tier.wish(90 * PAGE), tier.arrivals)[1], "both have some")
        segment = tier.arrivals.popleft()
        assert isinstance(segment, JointSegment)
        # Whoever had nothing was asked first, the other for as much as that is good for.
        assert slots_of(segment, units) == 10 and near.asked[-1] == 20 * PAGE
        assert (near.free, far.free) == (44 * PAGE, 0)
        asked = len(near.asked)
        time.sleep(0.05)
        assert len(near.asked) == asked  # nothing is taken in vain
        far.dead = True
        wait_for(lambda: len(far.asked) > 20, "it is asked on")
        assert near.free == 44 * PAGE
        segment.close()
        tier.close()
        assert near.closed and far.closed and near.free == 64 * PAGE
    assert left() == []


class Shared(Source):
    """The same memory as another source's."""

    def __init__(self, one: Source) -> None:
        super().__init__(0)
        self.one = one

    def borrow(self, size: int) -> list[Lease]:
        return self.one.borrow(size)


@pytest.mark.parametrize("free", [1, 2, 7, 64])
def test_sources_of_one_place_divide_what_is_there(free):
    """Whoever is asked first could have all of it, and the others nothing for ever."""
    first = Source(free * PAGE)
    tier = JointTier([first, Shared(first)], (PAGE, PAGE), pauses_s=PAUSES, one_place=True)
    segment = tier.grow(1 << 40)
    if free == 1:
        assert segment is None and first.free == PAGE
    else:
        assert segment is not None and slots_of(segment, (PAGE, PAGE)) == free // 2
        segment.close()
    tier.close()
    assert first.free == free * PAGE
    # Where they are places of their own nobody is asked again at once.
    apart = JointTier([first, Shared(first)], (PAGE, PAGE), pauses_s=PAUSES)
    assert apart.grow(1 << 40) is None
    apart.close()


def test_pieces_are_paired_by_size_and_what_is_left_goes_back():
    units = (PAGE, PAGE)
    near, far = Source(12 * PAGE, piece=5 * PAGE), Source(100 * PAGE)
    tier = JointTier([near, far], units, pauses_s=PAUSES)
    first = tier.grow(100 * PAGE)
    assert first is not None and slots_of(first, units) == 5 and not tier.arrivals
    assert near.free == 7 * PAGE and far.free == 88 * PAGE
    second = tier.grow(14 * PAGE)
    assert second is not None and slots_of(second, units) == 5
    # Too small for a slot.
    third = JointTier([near, Source(PAGE)], (PAGE, 2 * PAGE), pauses_s=PAUSES)
    assert third.grow(100 * PAGE) is None and near.free == 2 * PAGE
    for one in (first, second):
        one.close()
    assert (near.free, far.free) == (12 * PAGE, 100 * PAGE)
    tier.close()
    third.close()


@pytest.mark.parametrize("seed", range(20))
def test_a_copy_in_parts_keeps_to_every_pace(seed):
    """As many bytes are under way at each lender as its own pace has admitted, whoever refuses."""
    rng, now = random.Random(seed), [0.0]
    page = 4096
    caps = [rng.choice([5, 40]), rng.choice([5, 40, 400])]
    rng.shuffle(caps)
    paces = [Pace(cap * page, page, clock=lambda: now[0]) for cap in caps]
    # The first lender has two of four parts, in two arenas or in one; one has no pace.
    joint = JointPace([(paces[0], 1024), (paces[1], 1024), (paces[0], 1024)], page)
    assert joint.page_s == max(page / 2 / paces[0].cap, page / 4 / paces[1].cap)
    waiting: list[int] = []
    under_way: dict[int, int] = {}
    admitted = refused = 0
    for number in range(600):
        size = rng.choice([page, page // 2])
        if rng.random() < 0.2 and joint.room(size):
            joint.begin(number, size)
            under_way[number] = size
        else:
            joint.ask(number, size)
            waiting.append((number, size))
        for what, size in list(waiting):
            free = joint.room(size)
            assert joint.admit(what) == free
            if free:
                waiting.remove((what, size))
                under_way[what] = size
                admitted += 1
            else:
                refused += 1
                if rng.random() < 0.1:
                    joint.ended(what)
                    waiting.remove((what, size))
        total = sum(under_way.values())
        assert [sum(pace._under_way.values()) for pace in paces] == [total // 2, total // 4]
        assert [pace._backlog for pace in paces] == [
            sum(size for _, size in waiting) // share for share in (2, 4)
        ]
        now[0] += rng.random() * 0.02
        for what in list(under_way):
            if rng.random() < 0.5:
                joint.ended(what)
                del under_way[what]
    assert admitted > 20 and refused > 0
    assert joint.congested == any(pace.congested for pace in paces)


def test_a_copy_between_two_places_of_a_lender_counts_once_and_ends_once():
    pace = Pace(10 * 4096, 4096, clock=lambda: now[0])
    now = [0.0]
    first, second = (JointPace([(pace, 2048)], 4096) for _ in range(2))
    for turn in range(50):
        now[0] += 1.0
        assert first.room(4096)
        for joint in (first, second):
            joint.begin(turn, 4096)
        assert pace._used == 2048
        for joint in (first, second):
            joint.ended(turn)
    now[0] += 1.0
    assert first.room(4096) and pace._used == 0
