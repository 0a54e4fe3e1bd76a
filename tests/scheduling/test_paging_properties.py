"""Random workloads over tiny pools and stores: slow copies, failing ones, lenders that want their
memory back or die, steps that fail. The device checks every page it is told to read."""

from __future__ import annotations

import dataclasses
import math
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aqua_jax.memory.pace import Pace
from aqua_jax.memory.split import SplitStore
from aqua_jax.memory.stores import PeerStore
from aqua_jax.paging.pages import FarthestNextUse, LeastRecentlyUsed, PagePool
from aqua_jax.paging.prefix import PrefixCache
from aqua_jax.paging.residency import Residency
from aqua_jax.scheduling.cost import CostConfig, Costs
from aqua_jax.scheduling.fair import Fair, FairConfig
from aqua_jax.scheduling.policies import FirstComeFirstServed, Policy, StrictPriority
from aqua_jax.scheduling.scheduler import Scheduler, SchedulerConfig
from aqua_jax.scheduling.sequence import Sequence, Status
from aqua_jax.scheduling.slices import SliceConfig
from tests.scale import scaled
from tests.scheduling.fake_copies import (
    SLOT_BYTES,
    FakeCopies,
    host_store,
    peer_store,
    split_store,
)
from tests.scheduling.fake_device import FakeEngine


@dataclasses.dataclass(frozen=True)
class Case:
    """One pool, its stores, one engine, and a seed for everything that happens."""

    policy: str
    page_tokens: int
    num_pages: int
    peer_slots: int  # 0: no such store
    host_slots: int
    max_num_seqs: int
    max_step_tokens: int
    growth_tokens: int
    prefix_caching: bool
    farthest: bool
    run_ahead: int
    num_requests: int
    abort_rate: float
    slice_steps: int | float | str
    max_moves: int
    write_behind: int
    page_price: float
    failures: float
    slowness: float
    switch_share: float
    lender: str
    lenders: int  # that each have a part of every slot
    paced: int  # pages that lenders let be copied in a tenth of a second; 0: any number
    resets: float
    seed: int


def cases() -> st.SearchStrategy[Case]:
    return st.builds(
        Case, policy=st.sampled_from(["fair", "fair", "fcfs_swap", "priority"]),
        page_tokens=st.sampled_from([1, 2, 4]), num_pages=st.integers(3, 20),
        peer_slots=st.sampled_from([0, 2, 10, 100]), host_slots=st.sampled_from([1, 4, 20, 200]),
        max_num_seqs=st.integers(1, 8), max_step_tokens=st.integers(8, 20),
        growth_tokens=st.sampled_from([0, 3, 48]), prefix_caching=st.booleans(),
        farthest=st.booleans(), run_ahead=st.integers(0, 2),
        num_requests=st.sampled_from([3, 8, 16]), abort_rate=st.sampled_from([0.0, 0.02, 0.1]),
        slice_steps=st.sampled_from([1, 2, 5, 100, math.inf, "auto"]),
        max_moves=st.sampled_from([1, 3, 100]), write_behind=st.sampled_from([0, 1, 8]),
        page_price=st.sampled_from([1e-3, 1e-3, 1.0]),
        switch_share=st.sampled_from([1.0, 0.1, 1e-6]),
        failures=st.sampled_from([0.0, 0.0, 0.1, 0.7]), slowness=st.sampled_from([0.0, 0.3, 0.7]),
        lender=st.sampled_from(["calm", "wants", "dies"]), lenders=st.sampled_from([1, 1, 2]),
        paced=st.sampled_from([0, 0, 1, 5]), resets=st.sampled_from([0.0, 0.0, 0.03]),
        seed=st.integers(0, 2**32),
    )


def policy_of(case: Case) -> Policy:
    if case.policy == "fair":
        slices: Any = case.slice_steps
        return Fair(FairConfig(SliceConfig(slices, tbt_slo_s=0.1, min_slice_steps=2)))
    return StrictPriority(ageing_s=3.0) if case.policy == "priority" else FirstComeFirstServed()


class Run:
    """Carries out a case."""

    def __init__(self, case: Case, pool: PagePool | None = None) -> None:
        self.case, self.rng = case, random.Random(case.seed)
        evictable = FarthestNextUse() if case.farthest else LeastRecentlyUsed()
        self.pool = pool or PagePool(case.num_pages, case.page_tokens, evictable)
        self.peers: list[PeerStore | SplitStore] = []
        stores: list[Any] = [host_store(case.host_slots, case.page_tokens)]
        self.now = 0.0
        self.pace: Pace | None = None
        if case.paced:
            self.pace = Pace(10 * case.paced * SLOT_BYTES, SLOT_BYTES, clock=lambda: self.now)
        if case.peer_slots:
            self.peers.append(self.lent(case.peer_slots))
        stores = [*self.peers, *stores]
        self.stores = list(stores)
        self.residency = Residency(self.pool, stores)
        self.policy = policy_of(case)
        self.scheduler = Scheduler(
            SchedulerConfig(
                case.max_num_seqs, max(case.max_step_tokens, case.max_num_seqs), 1000,
                growth_tokens=case.growth_tokens, max_moves=case.max_moves,
                write_behind_pages=case.write_behind, switch_share=case.switch_share,
            ),
            self.policy, self.pool, PrefixCache(self.pool) if case.prefix_caching else None,
            self.residency, Costs(case.page_tokens, CostConfig(moved_page=case.page_price)),
        )
        self.engine = FakeEngine(self.scheduler, self.rng, case.run_ahead)
        self.copies = self.engine.device.copies = FakeCopies(
            self.residency, self.engine.device.kv, self.rng, failures=case.failures,
            slowness=case.slowness,
        )
        self.live: list[Sequence] = []
        self.added: list[Sequence] = []
        self.capacity = case.num_pages * case.page_tokens
        self.stem = [self.rng.randrange(8) for _ in range(self.capacity)]

    def add_request(self) -> None:
        rng = self.rng
        prompt = self.stem[: rng.randrange(self.capacity // 2)]
        prompt = prompt + [rng.randrange(8) for _ in range(rng.randrange(1, 4))]
        limit = min(self.capacity + 1, len(prompt) + rng.randrange(1, self.capacity + 3))
        if limit <= len(prompt):
            return
        parent = None
        user, stops = rng.choice("aab"), rng.random() < 0.3
        for index in range(rng.choice([1, 1, 1, 2, 4])):
            sequence = Sequence(
                len(self.added), f"r{len(self.added)}", list(prompt), limit,
                arrival=float(len(self.added)), sample_index=index, parent=parent, user=user,
                priority=rng.randrange(3), no_prefix_read=index == 0 and rng.random() < 0.1,
            )
            parent = parent or sequence
            self.engine.add(sequence, stops)
            self.added.append(sequence)
            self.live.append(sequence)

    def step(self) -> None:
        rng, engine = self.rng, self.engine
        self.annoy()
        self.now += 0.01
        engine.boundary()
        plan = self.scheduler.plan(0.01 * self.scheduler.counters.plans)
        if plan is not None:
            assert plan.chunks or plan.moves
            assert len(plan.moves) <= self.case.max_moves
            engine.device.dispatch(plan)
        elif not len(engine.device) and self.live:
            assert self.residency.outstanding, "livelock: nothing runs and nothing is awaited"
        assert self.pool.leaving == sum(
            0 < references == pins
            for references, pins in zip(self.pool._references, self.pool._pins, strict=True)
        )
        if len(engine.device) > (self.case.run_ahead if plan is not None else 0):
            engine._take_in()
        if self.live and rng.random() < self.case.abort_rate:
            victim = rng.choice(self.live)
            if victim.status is not Status.FINISHED:
                engine.abort(victim)
        if rng.random() < self.case.resets:
            engine.recover()
        self.live = [s for s in self.live if s.status is not Status.FINISHED]

    def lent(self, slots: int) -> PeerStore | SplitStore:
        """A store in others' memory."""
        make = peer_store if self.case.lenders == 1 else split_store
        return make(slots, self.case.page_tokens, self.pace)

    def annoy(self) -> None:
        """The lenders' moods; some go, and others come."""
        for peer in list(self.peers):
            lease: Any = self.rng.choice(peer.parts).lease
            if self.rng.random() < 0.05:
                if self.case.lender == "dies" and self.rng.random() < 0.3:
                    lease.alive = False
                elif self.case.lender == "wants":
                    lease.keep = self.rng.randrange(lease.size + 1)
                    lease.deadline = self.rng.choice([None, 0.0])
            if peer.in_use == 0 and (peer.lost or not peer.capacity):
                assert self.residency.tiers.remove(peer)
                self.peers.remove(peer)
                peer.close()
        if self.case.peer_slots and len(self.peers) < 3 and self.rng.random() < 0.02:
            slots = self.rng.randrange(1, 12)
            self.peers.append(self.lent(slots))
            self.residency.tiers.add(self.peers[-1])
            self.stores.append(self.peers[-1])

    def finish(self) -> None:
        """Everything has ended exactly, and nothing is held, in any tier."""
        self.engine.drain()
        assert set(self.engine.ended) == set(self.added)
        for _ in range(200):
            self.now += 0.01
            self.engine.boundary()
            plan = self.scheduler.plan(0.0)
            if plan is not None:
                self.engine.device.dispatch(plan)
        assert self.residency.outstanding == len(self.copies) == 0
        if self.pace is not None:
            assert not self.pace._queued and not self.pace._under_way and not self.pace._backlog
        assert self.pool.in_use == 0
        assert self.scheduler.slots.available == self.case.max_num_seqs
        for store in self.stores:
            assert store.in_use == 0
        residency = self.residency
        for left in (residency._backed, residency._resident, residency._by_page,
                     residency._awaited):
            assert not left
        assert self.pool.leaving == 0
        if not self.case.prefix_caching:
            assert self.pool.free == self.pool.num_pages


@given(case=cases())
@settings(max_examples=scaled(300), deadline=None)
def test_every_sequence_ends_exactly_whatever_happens_to_its_pages(case: Case) -> None:
    run = Run(case)
    requests, steps = case.num_requests, 0
    while requests or run.live:
        if requests and (run.rng.random() < 0.5 or not run.live):
            run.add_request()
            requests -= 1
        run.step()
        steps += 1
        assert steps <= 60_000, "no progress"
    run.finish()
    for store in run.stores:
        store.close()


@pytest.mark.parametrize("policy", ["fair", "fcfs_swap"])
def test_with_room_in_a_store_nothing_is_computed_twice(policy: str) -> None:
    case = Case(
        policy=policy, page_tokens=4, num_pages=16, peer_slots=0, host_slots=400, max_num_seqs=8,
        max_step_tokens=32, growth_tokens=4, prefix_caching=False, farthest=True, run_ahead=1,
        num_requests=20, abort_rate=0.0, slice_steps=4, max_moves=100, write_behind=8,
        page_price=1e-3, failures=0.0, slowness=0.2, switch_share=0.1, lender="calm", lenders=1,
        paced=0, resets=0.0, seed=1,
    )
    run = Run(case)
    for _ in range(case.num_requests):
        run.add_request()
    while run.live:
        run.step()
    run.finish()
    counters = run.scheduler.counters
    assert counters.swaps == counters.preemptions > 20
    assert counters.recomputed_tokens == 0
    moved = run.residency.counters
    assert moved.tokens_out + moved.tokens_in <= 0.9 * moved.tokens_held
    run.stores[0].close()
