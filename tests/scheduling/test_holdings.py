"""What a sequence takes when it comes back, and what comes free when others go."""

from __future__ import annotations

from aqua_jax.paging.pages import PagePool
from aqua_jax.paging.prefix import PrefixCache
from aqua_jax.paging.residency import Residency
from aqua_jax.scheduling.holdings import Holdings
from aqua_jax.scheduling.policies import FirstComeFirstServed
from aqua_jax.scheduling.scheduler import Scheduler, SchedulerConfig
from aqua_jax.scheduling.sequence import Sequence
from tests.scheduling.fake_copies import host_store

SIZE = 4


def test_a_page_that_was_partly_filled_when_its_owner_left_is_registered_once_it_is_full():
    pool = PagePool(8, SIZE)
    with host_store(8, SIZE) as store:
        prefix = PrefixCache(pool)
        holdings = Holdings(pool, prefix, Residency(pool, [store]))
        one = Sequence(0, "0", [1, 2, 3, 4, 5, 6], 20)
        one.chain = prefix.chain(b"")
        one.chain.extend(one.tokens)
        assert holdings.take(one, holdings.find(one)) is None
        one.num_computed = 6
        holdings.register(one)
        holdings.give_up(one, keep=6)
        found = holdings.find(one)
        assert found.tokens == 6 and None not in found.pages
        holdings.take(one, found)
        assert one.num_computed == 6 and one.num_registered == 1
        one.tokens += [7, 8]
        one.num_computed = 8
        holdings.register(one)
        assert one.num_registered == 2
        other = Sequence(1, "1", [*one.tokens, 9], 20)
        other.chain = prefix.chain(b"")
        other.chain.extend(other.tokens)
        assert holdings.find(other).tokens == 8
        holdings.give_up(one)


def test_a_shared_page_comes_free_with_the_last_of_its_holders():
    pool = PagePool(8, SIZE)
    holdings = Holdings(pool, None, None)
    shared, own = pool.allocate(2), pool.allocate(3)
    assert shared is not None and own is not None
    holders = [Sequence(number, str(number), [1], 20) for number in range(3)]
    for one, page in zip(holders, own, strict=True):
        one.pages = [*shared, page]
    for page in shared * 2:
        pool.retain(page)
    assert [gain for _, gain in holdings.freed_by(holders[:2], ())] == [1, 1]
    assert [gain for _, gain in holdings.freed_by(holders, ())] == [1, 1, 3]
    assert [gain for _, gain in holdings.freed_by(holders, [shared[0], own[1]])] == [1, 0, 2]
    for one in holders:
        pool.release_all(one.pages)
    assert pool.free == 8


def test_a_lost_pool_leaves_a_token_to_compute_though_the_copies_hold_one_more():
    """A step in flight had computed the token that nobody has seen, and it was copied out."""
    with host_store(8, SIZE) as store:
        pool = PagePool(8, SIZE)
        residency = Residency(pool, [store])
        scheduler = Scheduler(
            SchedulerConfig(2, 64, 100), FirstComeFirstServed(), pool, residency=residency
        )
        one = Sequence(0, "0", list(range(8)), 20)
        scheduler.add(one)
        moves = []
        for now in (0.0, 1.0):  # the prompt, and its first token without waiting for it
            plan = scheduler.plan(now)
            assert plan is not None
            moves += plan.moves
        assert (one.num_computed, one.num_inflight) == (9, 2)
        residency.back(one, one.pages, one.num_computed)
        for move in (*moves, *residency.take_moves(9)):
            residency.finished(move, True)
        assert residency.backed_tokens(one) == 9
        scheduler.reset()
        assert scheduler.holdings.find(one).tokens == 4  # of the second page all or nothing
        plan = scheduler.plan(2.0)
        assert plan is not None and [move.count for move in plan.moves] == [4]
        for move in plan.moves:
            residency.finished(move, True)
        plan = scheduler.plan(3.0)
        assert plan is not None and [chunk[1:] for chunk in plan.chunks] == [(4, 4, True)]
        scheduler.abort(one)
