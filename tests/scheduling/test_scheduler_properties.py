"""Random workloads over tiny pools, on a device that checks every page it is told to read."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aqua_jax.errors import RequestError, SequenceStateError
from aqua_jax.paging.pages import PagePool
from aqua_jax.paging.prefix import PrefixCache
from aqua_jax.scheduling.fair import Fair, FairConfig
from aqua_jax.scheduling.plan import Plan
from aqua_jax.scheduling.policies import FirstComeFirstServed, Policy, StrictPriority
from aqua_jax.scheduling.scheduler import Scheduler, SchedulerConfig
from aqua_jax.scheduling.sequence import Sequence, Status
from aqua_jax.scheduling.slices import SliceConfig
from tests.scale import scaled
from tests.scheduling.fake_device import FakeEngine


@dataclasses.dataclass(frozen=True)
class Case:
    """One pool, one engine, and a seed for everything that happens."""

    page_tokens: int
    num_pages: int
    max_num_seqs: int
    max_step_tokens: int
    growth_tokens: int
    max_chunk_tokens: int | None
    prefix_caching: bool
    run_ahead: int
    num_requests: int
    arrival_rate: float
    abort_rate: float
    seed: int
    slice_steps: int | float | str  # of `fair`
    credit_share: float
    switch_share: float


SWITCH_SHARES = (1.0, 0.1, 1e-6)  # with the last one, the guard is nearly always overdrawn
POLICIES: dict[str, Callable[[Case], Policy]] = {
    "fcfs": lambda case: FirstComeFirstServed(),
    "priority": lambda case: StrictPriority(ageing_s=3.0),
    "fair": lambda case: Fair(FairConfig(
        SliceConfig(case.slice_steps, tbt_slo_s=0.1, min_slice_steps=2),  # type: ignore[arg-type]
        user_weights={"b": 2.0}, credit_share=case.credit_share,
    )),
}


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Mostly too small for what is asked of them."""
    max_num_seqs = draw(st.integers(1, 8))
    return Case(
        page_tokens=draw(st.sampled_from([1, 2, 4])),
        num_pages=draw(st.integers(3, 20)),
        max_num_seqs=max_num_seqs,
        max_step_tokens=max_num_seqs + draw(st.integers(0, 12)),
        growth_tokens=draw(st.sampled_from([0, 0, 0, 3, 100])),
        max_chunk_tokens=draw(st.sampled_from([None, None, 1, 3])),
        prefix_caching=draw(st.booleans()),
        run_ahead=draw(st.integers(0, 2)),
        num_requests=draw(st.sampled_from([1, 3, 8, 16])),
        arrival_rate=draw(st.sampled_from([0.2, 1.0])),
        abort_rate=draw(st.sampled_from([0.0, 0.02, 0.1])),
        seed=draw(st.integers(0, 2**32)),
        slice_steps=draw(st.sampled_from([1, 2, 5, 100, math.inf, "auto"])),
        credit_share=draw(st.sampled_from([0.0, 0.1, 0.9])),
        switch_share=draw(st.sampled_from(SWITCH_SHARES)),
    )


class Run:
    """Carries out a case and checks each plan."""

    def __init__(self, case: Case, policy: str, pool: PagePool | None = None) -> None:
        self.case = case
        self.name = policy
        self.steps = 0
        self.rng = random.Random(case.seed)
        self.pool = pool or PagePool(case.num_pages, case.page_tokens)
        self.policy = POLICIES[policy](case)
        self.scheduler = Scheduler(
            SchedulerConfig(
                case.max_num_seqs, case.max_step_tokens, 1000, case.max_chunk_tokens,
                case.growth_tokens, switch_share=case.switch_share,
            ),
            self.policy, self.pool, PrefixCache(self.pool) if case.prefix_caching else None,
        )
        self.engine = FakeEngine(self.scheduler, self.rng, case.run_ahead)
        self.live: list[Sequence] = []
        self.added: list[Sequence] = []
        self.capacity = case.num_pages * case.page_tokens
        self.stems = [[self.rng.randrange(8) for _ in range(self.capacity)] for _ in range(2)]

    def add_request(self) -> None:
        """A prompt that starts like others, with 1 to 4 samples."""
        rng = self.rng
        stem = rng.choice(self.stems)[: rng.randrange(self.capacity // 2)]
        prompt = stem + [rng.randrange(8) for _ in range(rng.randrange(1, 4))]
        parent = None
        stops = rng.random() < 0.3
        limit = len(prompt) + rng.randrange(1, max(3, self.capacity - len(prompt) + 3))
        salt = rng.choice([b"", b"", b"other"])
        user, weight = rng.choice(["a", "a", "a", "b", "c"]), rng.choice([1.0, 1.0, 0.25, 3.0])
        priority = rng.randrange(3)
        for index in range(rng.choice([1, 1, 1, 2, 4])):
            sequence = Sequence(
                len(self.added), f"r{len(self.added)}", list(prompt), limit,
                arrival=rng.choice([0.0, float(len(self.added))]), sample_index=index,
                parent=parent, salt=salt, no_prefix_read=index == 0 and rng.random() < 0.1,
                user=user, weight=weight, priority=priority,
            )
            parent = parent or sequence
            try:
                self.engine.add(sequence, stops)
            except RequestError:
                assert limit - 1 > self.capacity
                return
            self.added.append(sequence)
            self.live.append(sequence)

    def maybe_abort(self) -> None:
        """Ends a random live sequence, whatever it is doing."""
        if self.live and self.rng.random() < self.case.abort_rate:
            self.engine.abort(self.rng.choice(self.live))

    def step(self) -> None:
        """One engine step; checks what the plan promises."""
        waiting_before = [s for s in self.live if s.status is Status.WAITING]
        decoding_before = [
            s for s in self.live
            if s.status is Status.RUNNING and s.pending == 1 and not s.complete
        ]
        idle = len(self.engine.device) == 0
        self.steps += 1
        plan = self.engine.scheduler.plan(0.01 * self.steps)
        if plan is not None:
            self.check_plan(plan, waiting_before, decoding_before)
            self.engine.device.dispatch(plan)
        else:
            assert not (idle and self.live), "livelock: nothing runs and nothing is awaited"
        if len(self.engine.device) > (self.case.run_ahead if plan is not None else 0):
            self.engine._take_in()
        self.live = [s for s in self.live if s.status is not Status.FINISHED]

    def check_plan(
        self, plan: Plan, waiting_before: list[Sequence], decoding_before: list[Sequence]
    ) -> None:
        """Budget, decode share, order."""
        config = self.scheduler.config
        assert plan.num_tokens == sum(chunk.count for chunk in plan.chunks)
        assert 0 < plan.num_tokens <= config.max_step_tokens
        assert 0 < len(plan.chunks) <= config.max_num_seqs
        assert all(chunk.count > 0 for chunk in plan.chunks)
        planned = {chunk.sequence for chunk in plan.chunks}
        assert len(planned) == len(plan.chunks)
        assert not planned & set(plan.preempted)
        for sequence in decoding_before:
            if sequence not in planned and sequence not in plan.preempted:
                assert self.pool.available == 0, "a decode was left out with pages to spare"
        admitted = [s for s in waiting_before if s.status is Status.RUNNING]
        assert not set(admitted) & set(plan.preempted)
        if self.name == "fcfs":
            assert not (admitted and plan.preempted)
        if self.name != "fair":
            self.check_nobody_overtook(admitted, planned)

    def check_nobody_overtook(self, admitted: list[Sequence], planned: set[Sequence]) -> None:
        """The order of rank, for policies where it is fixed."""
        ageing = 3.0 if self.name == "priority" else 0.0
        head = self.policy.head(0.0)
        if head is not None:
            rank = (head.arrival + ageing * head.priority, head.seq_id)
            assert all(
                (s.arrival + ageing * s.priority, s.seq_id) < rank
                or (s.parent is not None and head.parent is s.parent)
                or head.parent in planned  # a fork that became eligible in this very plan
                for s in admitted
            ), "overtaken"

    def finish(self) -> None:
        """Everything accepted has ended exactly, and nothing is held."""
        self.engine.drain()
        assert set(self.engine.ended) == set(self.added)
        assert (self.scheduler.num_live, self.scheduler.num_running, len(self.policy)) == (0, 0, 0)
        assert self.scheduler.num_waiting == 0
        assert self.pool.in_use == 0
        assert self.scheduler.slots.available == self.case.max_num_seqs
        assert not self.scheduler._queue.num_held
        counters = self.scheduler.counters
        assert counters.finished + counters.aborted == len(self.added)
        if isinstance(self.policy, Fair):
            assert not self.policy._accounts and not self.policy._active
            assert not self.policy._siblings and not self.policy._idle
        for sequence in self.added:
            with pytest.raises(SequenceStateError):
                self.scheduler.finish(sequence)


@pytest.mark.parametrize("policy", POLICIES)
@given(case=cases())
@settings(max_examples=scaled(200), deadline=None)
def test_every_sequence_ends_exactly_and_reads_only_its_own_kv(policy: str, case: Case) -> None:
    run = Run(case, policy)
    steps = 0
    requests = case.num_requests
    while requests or run.live:
        if requests and (run.rng.random() < case.arrival_rate or not run.live):
            run.add_request()
            requests -= 1
        run.step()
        run.maybe_abort()
        run.live = [s for s in run.live if s.status is not Status.FINISHED]
        steps += 1
        total = sum(s.max_total_tokens for s in run.added)
        # Each switch of `fair` costs a recomputation, in the worst case after one token.
        again = run.capacity if policy == "fair" else 1
        allowed = (case.run_ahead + 2) * (again * total + 10 * case.num_requests)
        assert steps <= allowed, "no progress"
    run.finish()
