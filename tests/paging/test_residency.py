"""What residency promises, one by one: the moves that are asked for, and those that are not.

Whatever random histories do to it is in `tests/scheduling/test_paging_properties.py`.
"""

from __future__ import annotations

import random

import pytest

from aqua_jax.memory.stores import HostStore
from aqua_jax.paging.moves import Move
from aqua_jax.paging.pages import FarthestNextUse, PageHandle, PagePool
from aqua_jax.paging.residency import Residency
from tests.scheduling.fake_copies import SLOT_BYTES

SIZE = 4  # tokens of a page


class World:
    """A pool, a store below it, and copies that end when they are told to."""

    def __init__(self, pages: int = 8, slots: int = 16, verify: bool = False) -> None:
        self.pool = PagePool(pages, SIZE, FarthestNextUse())
        self.store = HostStore(slots * SLOT_BYTES, SLOT_BYTES, SIZE)
        self.residency = Residency(self.pool, [self.store], verify=verify)
        self.held: dict[str, list[PageHandle]] = {}

    def run(self, owner: str, tokens: int) -> None:
        """Grows an owner's page table to so many tokens."""
        pages = self.held.setdefault(owner, [])
        more = self.pool.allocate(self.pool.pages_for(tokens) - len(pages))
        assert more is not None
        pages += more

    def leave(self, owner: str, tokens: int) -> list[Move]:
        """The owner gives way; the moves that are handed over for it."""
        self.residency.leave(owner, self.held.pop(owner), tokens)
        return self.hand_over()

    def come_back(self, owner: str, tokens: int) -> list[Move]:
        """The owner has pages for so many tokens again, what is there in the pool at their head."""
        found = self.residency.find(owner)
        here = [home for home, _, _ in found if home is not None]
        for page in here:
            self.pool.retain(page)
        fresh = self.pool.allocate(self.pool.pages_for(tokens) - len(here))
        assert fresh is not None
        pages = [fresh.pop(0) if home is None else home for home, _, _ in found] + fresh
        self.held[owner] = pages
        self.residency.come_back(owner, found, [home for home, _, _ in found], pages)
        return self.hand_over()

    def hand_over(self) -> list[Move]:
        return list(self.residency.take_moves(100))

    def end(self, moves: list[Move], ok: bool = True) -> None:
        for number, move in enumerate(moves):
            self.residency.finished(move, ok, 100 + number if self.residency.verify else None)

    def empty_pool(self) -> None:
        """Somebody takes all pages that can be had, and lets go of them."""
        pages = self.pool.allocate(self.pool.available)
        assert pages is not None
        for page in pages:
            self.pool.release(page)


@pytest.fixture
def world():
    made = World()
    yield made
    made.store.close()


def parts(moves: list[Move]) -> list[tuple[int, int]]:
    """(first token, tokens) of each, in the page."""
    return [(move.start, move.count) for move in moves]


def test_giving_way_again_copies_only_what_is_new(world):
    world.run("a", 10)
    out = world.leave("a", 10)
    assert parts(out) == [(0, 4), (0, 4), (0, 2)] and not any(move.inward for move in out)
    assert world.pool.available == 5  # its pages are pinned until the copies have ended
    world.end(out)
    assert world.pool.available == 8
    world.empty_pool()
    world.end(world.come_back("a", 14))
    world.run("a", 14)
    assert parts(world.leave("a", 14)) == [(2, 2), (0, 2)]


def test_pages_that_nobody_took_are_not_copied_back(world):
    world.run("a", 10)
    world.end(world.leave("a", 10))
    world.run("b", 20)  # five were free: a's are still there
    assert world.come_back("a", 10) == [] and not world.residency.arriving("a")
    assert world.residency.counters.tokens_revived == 10


def test_only_what_is_gone_is_copied_back(world):
    world.run("a", 10)
    world.end(world.leave("a", 10))
    world.run("b", 24)  # one more than were free
    world.pool.release(world.held["b"].pop())
    back = world.come_back("a", 10)
    assert [move.inward for move in back] == [True]
    assert world.residency.arriving("a")  # and must not run
    world.end(back)
    assert not world.residency.arriving("a")


def test_shared_pages_move_once_and_have_one_slot(world):
    world.run("a", 8)
    for page in world.held["a"]:
        world.pool.retain(page)
    world.held["b"] = list(world.held["a"])
    world.run("b", 12)
    first, second = world.leave("a", 8), world.leave("b", 12)
    assert parts(first) == [(0, 4), (0, 4)] and parts(second) == [(0, 4)]
    world.end(first + second)
    assert world.store.in_use == 3
    world.empty_pool()
    back = world.come_back("b", 12)
    assert len(back) == 3
    assert world.come_back("a", 8) == []  # it finds what is on its way for the other
    assert world.residency.arriving("a") and world.residency.arriving("b")
    world.end(back)
    assert not world.residency.arriving("a") and not world.residency.arriving("b")
    world.residency.drop("a")
    assert world.store.in_use == 3
    world.residency.drop("b")
    assert world.store.in_use == 0


def test_what_was_copied_ahead_comes_free_at_once(world):
    world.run("a", 10)
    pages = world.held["a"]
    assert world.residency.back("a", pages, 8, limit=1) == 1
    assert world.residency.back("a", pages, 8) == 1
    ahead = world.hand_over()
    assert parts(ahead) == [(0, 4), (0, 4)]
    world.end(ahead)
    assert world.pool.in_use == 3  # it runs on
    rest = world.leave("a", 10)
    assert parts(rest) == [(0, 2)] and world.pool.available == 7


def test_pages_come_ahead_of_their_owner(world):
    world.run("a", 10)
    world.end(world.leave("a", 10))
    world.empty_pool()
    residency = world.residency
    assert residency.prefetch(residency.find("a"), limit=2) == 2
    ahead = world.hand_over()
    assert parts(ahead) == [(0, 4), (0, 4)] and all(move.inward for move in ahead)
    assert not residency.arriving("a")  # it isn't here yet
    rest = world.come_back("a", 10)
    assert parts(rest) == [(0, 2)]
    world.end(rest)
    assert residency.arriving("a")  # what came ahead isn't there yet
    world.end(ahead)
    assert not residency.arriving("a") and residency.counters.prefetched == 2


def test_what_came_ahead_is_taken_last_but_can_be_taken(world):
    for owner in "ab":
        world.run(owner, 8)
        world.end(world.leave(owner, 8))
    world.empty_pool()
    residency = world.residency
    residency.prefetch(residency.find("a"), limit=8)
    world.end(world.hand_over())
    world.run("c", 24)  # the six that hold nothing
    assert [home for home, _, _ in residency.find("a")].count(None) == 0
    world.run("c", 28)
    assert [home for home, _, _ in residency.find("a")].count(None) == 1


def test_an_arrival_that_fails_costs_what_is_behind_it(world):
    world.run("a", 14)
    world.end(world.leave("a", 14))
    world.empty_pool()
    back = world.come_back("a", 14)
    world.end(back[:1])
    world.end(back[1:2], ok=False)
    world.end(back[2:])
    assert world.residency.take_failed() == ["a"] and world.residency.take_failed() == []
    assert world.residency.sound_tokens("a") == 4
    assert not world.residency.arriving("a")
    assert world.store.in_use == 1


def test_what_did_not_get_out_is_copied_again(world):
    world.run("a", 8)
    assert world.residency.back("a", world.held["a"], 8) == 2
    world.end(world.hand_over(), ok=False)
    assert world.residency.backed_tokens("a") == 0
    out = world.leave("a", 8)
    assert parts(out) == [(0, 4), (0, 4)]
    world.end(out)
    assert world.residency.backed_tokens("a") == 8


def test_a_full_store_keeps_the_head_and_the_pool_what_it_can():
    world = World(slots=2)
    world.run("a", 12)
    out = world.leave("a", 12)
    assert len(out) == 2 and world.residency.counters.refused == 1
    assert world.pool.available == 6  # nobody needs the third page any more
    world.end(out)
    assert world.residency.backed_tokens("a") == 8
    world.store.close()


def out_in_parts() -> tuple[World, list[Move]]:
    """A sequence of two pages on its way back; the second one went out in two parts."""
    world = World(verify=True)
    world.run("a", 6)
    world.end(world.leave("a", 6))
    world.empty_pool()
    world.end(world.come_back("a", 7))
    world.end(world.leave("a", 7))
    world.empty_pool()
    return world, world.come_back("a", 7)


def test_sums_are_compared_part_by_part():
    world, back = out_in_parts()
    # Sums are of the parts that pages went out in.
    assert [(move.start, move.count, move.checksum) for move in back] == [
        (0, 4, 100), (0, 2, 101), (2, 1, 100),
    ]
    for move in (back[1], back[0]):
        world.residency.finished(move, True)
        assert world.residency.arriving("a")  # a page is there when all its parts are
    world.residency.finished(back[2], True)
    assert not world.residency.arriving("a") and world.residency.take_failed() == []
    assert world.residency.outstanding == 0
    world.store.close()


def test_a_page_of_which_a_part_fails_has_not_arrived():
    world, (whole, first, second) = out_in_parts()
    world.residency.finished(first, False)
    assert world.residency.arriving("a") and world.residency.take_failed() == []
    world.residency.finished(second, True)
    world.residency.finished(whole, True)
    assert not world.residency.arriving("a") and world.residency.take_failed() == ["a"]
    assert world.residency.sound_tokens("a") == 4
    world.store.close()


def test_a_move_that_nobody_waits_for_is_not_made(world):
    world.run("a", 8)
    world.residency.leave("a", world.held.pop("a"), 8)
    world.residency.drop("a")
    world.residency.cancel_unwanted()
    assert world.hand_over() == [] and world.residency.outstanding == 0
    assert world.pool.available == 8 and world.store.in_use == 0


@pytest.mark.parametrize("seed", range(20))
def test_no_departure_copies_more_than_the_new_tokens_and_a_page(seed):
    """And nothing is copied back that is in the pool. Whatever is written ahead, taken, shared."""
    rng = random.Random(seed)
    world = World(pages=24, slots=200)
    residency, pool = world.residency, world.pool
    tokens = dict.fromkeys("abcd", 0)  # of each owner
    saved = dict.fromkeys("abcd", 0)  # of these, at its last departure
    ahead = dict.fromkeys("abcd", 0)  # copied out while it ran
    for _ in range(300):
        owner = rng.choice("abcd")
        if owner in world.held or not tokens[owner]:
            have = len(world.held.get(owner, ())) * SIZE
            grown = min(tokens[owner] + rng.randrange(1, 9), have + pool.available * SIZE, 40)
            tokens[owner] = max(tokens[owner], grown)
            world.run(owner, tokens[owner])
            if rng.random() < 0.3:
                full = tokens[owner] // SIZE * SIZE
                residency.back(owner, world.held[owner], full, rng.randrange(1, 4))
                moves = world.hand_over()
                ahead[owner] += sum(move.count for move in moves)
                world.end(moves)
            if rng.random() < 0.5:
                out = world.leave(owner, tokens[owner])
                new = tokens[owner] - saved[owner]
                # To the token what is new, written ahead or now, and a page's worth at the most.
                assert sum(move.count for move in out) + ahead[owner] == new
                assert len(out) <= pool.pages_for(new) + 1
                saved[owner], ahead[owner] = tokens[owner], 0
                world.end(out)
        elif pool.available >= pool.pages_for(tokens[owner]):
            gone = [home for home, _, _ in residency.find(owner)].count(None)
            back = world.come_back(owner, tokens[owner])
            assert len(back) == gone and all(move.inward for move in back)
            world.end(back)
    assert residency.counters.departures > 20 and residency.counters.tokens_revived > 0
    for owner in "abcd":
        residency.drop(owner)
        for page in world.held.pop(owner, ()):
            pool.release(page)
    assert world.store.in_use == 0 and pool.in_use == 0
    world.store.close()


def test_what_could_not_be_copied_out_is_copied_when_its_owner_leaves_again():
    world = World()
    world.run("a", 2 * SIZE)
    world.end(world.leave("a", 2 * SIZE), ok=False)
    assert world.residency.backed_tokens("a") <= SIZE  # nothing is promised that no store has
    world.come_back("a", 2 * SIZE)
    again = world.leave("a", 2 * SIZE)
    assert [(move.start, move.count) for move in again] == [(0, SIZE), (0, SIZE)]
