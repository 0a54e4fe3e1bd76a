"""Pages are lent and come back at random while sequences run on them; nobody's KV is touched.

The runs are those of `test_scheduler_properties` and `test_paging_properties`, on a device that
checks every page it is told to read, and that fills pages which were away with nonsense.
"""

from __future__ import annotations

import dataclasses
import random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from aqua_jax.errors import RequestError
from aqua_jax.paging.pages import LeastRecentlyUsed, PagePool
from aqua_jax.paging.withdrawal import WithdrawablePool
from aqua_jax.scheduling.fair import Fair, FairConfig
from aqua_jax.scheduling.policies import FirstComeFirstServed
from aqua_jax.scheduling.scheduler import Scheduler, SchedulerConfig
from aqua_jax.scheduling.sequence import Sequence
from tests.scale import scaled
from tests.scheduling import test_paging_properties as with_stores
from tests.scheduling import test_scheduler_properties as without
from tests.scheduling.fake_device import FakeEngine


class Producer:
    """Withdraws extents at random, writes to those that are empty, and restores them."""

    def __init__(self, engine: FakeEngine, pool: WithdrawablePool, rng: random.Random) -> None:
        self.engine, self.pool, self.rng = engine, pool, rng
        self.going: dict[int, int] = {}  # extent -> plans that may still name its pages; -1: many
        self.lent: dict[int, list[int]] = {}
        self.lendings = 0

    def boundary(self) -> None:
        """Before a plan."""
        rng, pool = self.rng, self.pool
        dispatched = len(self.engine.device)
        for extent, left in list(self.going.items()):
            if pool.pending(extent):
                if rng.random() < 0.02:  # it has taken too long
                    pool.restore(pool.pages_of(extent))
                    del self.going[extent]
                continue
            if left < 0:
                self.going[extent] = dispatched
            elif left == 0:
                del self.going[extent]
                self.lent[extent] = list(pool.pages_of(extent))
                self.lendings += 1
            else:
                self.going[extent] = min(left, dispatched)
        for extent, pages in list(self.lent.items()):
            for page in pages:  # whoever has borrowed it
                for offset in range(pool.page_tokens):
                    self.engine.device.kv[page, offset] = -7
            if rng.random() < 0.1:
                back = [pages.pop() for _ in range(rng.randrange(1, len(pages) + 1))]
                pool.restore(back)
                if not pages:
                    del self.lent[extent]
        extent = rng.randrange(pool.extents)
        if rng.random() < 0.2 and extent not in self.going and extent not in self.lent:
            pool.withdraw(extent)
            self.going[extent] = -1

    def finish(self) -> None:
        """Everything comes back."""
        for extent in self.going:
            self.pool.restore(self.pool.pages_of(extent))
        for pages in self.lent.values():
            self.pool.restore(pages)
        assert self.pool.away == self.pool.draining == 0


def shape(pages: int, rng: random.Random) -> tuple[int, int, int]:
    """Reserve, extents and their length, `pages` of them in the reserve."""
    return pages, rng.randrange(1, 5), rng.randrange(1, 5)


@given(
    case=without.cases(), policy=st.sampled_from(sorted(without.POLICIES)), seed=st.integers(0, 99)
)
@example(  # who gives way was the last holder of a page that goes away, which the next would share
    case=without.Case(
        page_tokens=1, num_pages=20, max_num_seqs=5, max_step_tokens=15, growth_tokens=100,
        max_chunk_tokens=3, prefix_caching=True, run_ahead=0, num_requests=16, arrival_rate=0.2,
        abort_rate=0.0, seed=3483831765, slice_steps=2, credit_share=0.1,
        switch_share=1.0,
    ), policy="fair", seed=119,
)
@settings(max_examples=scaled(60), deadline=None)
def test_lending_changes_no_token(case: without.Case, policy: str, seed: int) -> None:
    rng = random.Random(seed)
    pool = WithdrawablePool(*shape(case.num_pages, rng), case.page_tokens)
    run = without.Run(case, policy, pool)
    producer = Producer(run.engine, pool, rng)
    requests, steps = case.num_requests, 0
    while requests or run.live:
        if requests and (run.rng.random() < case.arrival_rate or not run.live):
            run.add_request()
            requests -= 1
        producer.boundary()
        run.engine.step()
        run.live = [sequence for sequence in run.live if sequence not in run.engine.ended]
        run.maybe_abort()
        run.live = [sequence for sequence in run.live if sequence not in run.engine.ended]
        steps += 1
        assert steps < 20_000, "no progress"
    run.engine.drain()
    producer.finish()
    assert pool.in_use == 0
    assert set(run.engine.ended) == set(run.added)


@given(case=with_stores.cases(), seed=st.integers(0, 99))
@settings(max_examples=scaled(60), deadline=None)
def test_lending_changes_no_token_while_pages_move_to_stores(
    case: with_stores.Case, seed: int
) -> None:
    rng = random.Random(seed)
    evictable = with_stores.FarthestNextUse() if case.farthest else LeastRecentlyUsed()
    pool = WithdrawablePool(*shape(case.num_pages, rng), case.page_tokens, evictable)
    run = with_stores.Run(case, pool)
    producer = Producer(run.engine, pool, rng)
    requests, steps = case.num_requests, 0
    while requests or run.live:
        if requests and (run.rng.random() < 0.5 or not run.live):
            run.add_request()
            requests -= 1
        producer.boundary()
        run.step()
        steps += 1
        assert steps <= 60_000, "no progress"
    for extent in list(producer.going):
        pool.restore(pool.pages_of(extent))
        del producer.going[extent]
    producer.finish()
    run.case = dataclasses.replace(case, prefix_caching=True)  # "all pages are free" isn't asked
    run.finish()


def engine_of(pool: PagePool, rng: random.Random, seqs: int = 8) -> FakeEngine:
    """An engine without stores."""
    config = SchedulerConfig(seqs, 64, 1000, growth_tokens=0)
    return FakeEngine(Scheduler(config, FirstComeFirstServed(), pool), rng, 1)


def test_an_extent_in_use_empties_within_a_few_steps_and_costs_no_preemption() -> None:
    pool = WithdrawablePool(48, 2, 8, 2)
    engine = engine_of(pool, random.Random(0), 4)
    for index in range(4):
        engine.add(Sequence(index, f"r{index}", [1] * 12, 20, arrival=0.0))
    held = pool.allocate(34)  # so that the others reach into the extents
    assert held is not None
    engine.step()
    pool.release_all(held)
    busy = pool.pages_of(0)
    assert any(page.id in busy for s in engine.scheduler._running for page in s.pages)
    pool.withdraw(0)
    pool.withdraw(1)
    before, steps = pool.draining, 0
    assert before
    while pool.draining:
        engine.step()
        steps += 1
    # Four copies a plan, for so many sequences it has room.
    assert steps == -(-before // 4)
    while engine.scheduler.num_live:
        engine.step()
    assert engine.scheduler.counters.preemptions == 0


def test_without_room_nothing_moves_and_nobody_gives_way() -> None:
    pool = WithdrawablePool(5, 1, 6, 2)
    engine = engine_of(pool, random.Random(0))
    for index in range(2):
        engine.add(Sequence(index, f"r{index}", [index] * 9, 11, arrival=0.0))
    engine.step()
    pool.withdraw(0)
    assert pool.draining == 5
    engine.step()
    while engine.scheduler.num_live == 2:
        assert pool.draining == 5
        engine.step()
    assert engine.scheduler.counters.preemptions == 0


def test_nobody_is_promised_pages_that_may_be_lent() -> None:
    bounds = []
    for pool in (PagePool(8, 2), WithdrawablePool(8, 2, 4, 2), WithdrawablePool(8, 9, 4, 2)):
        scheduler = Scheduler(SchedulerConfig(4, 64, 1000), Fair(FairConfig()), pool)
        for index in range(6):
            scheduler.add(Sequence(index, f"r{index}", [1] * 4, 8, arrival=0.0))
        bounds.append(scheduler.waiting_bound())
        with pytest.raises(RequestError, match="8 pages"):
            scheduler.add(Sequence(9, "r9", [1] * 4, 18, arrival=0.0))
    assert bounds[0] is not None and bounds[0] == bounds[1] == bounds[2]
