"""Steps that repeat the one before are skipped, and nothing differs: no time, no count, no plan."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest

from aqua_jax.bench.traces import TraceRequest
from aqua_jax.paging.pages import FarthestNextUse, LeastRecentlyUsed, PagePool
from aqua_jax.paging.prefix import PrefixCache
from aqua_jax.paging.residency import Residency
from aqua_jax.scheduling.cost import Costs
from aqua_jax.scheduling.fair import Fair, FairConfig
from aqua_jax.scheduling.plan import Plan
from aqua_jax.scheduling.policies import FirstComeFirstServed, Policy, StrictPriority
from aqua_jax.scheduling.recording import Recorder, plan_digest
from aqua_jax.scheduling.scheduler import Scheduler, SchedulerConfig
from aqua_jax.scheduling.slices import SliceConfig
from aqua_jax.simulation.cost import Line
from aqua_jax.simulation.links import CopyQueue, Link
from aqua_jax.simulation.simulator import Outcome, Simulator
from aqua_jax.simulation.stores import SlotStore
from aqua_jax.simulation.vtc import VirtualTokenCounter
from tests.scale import scaled

SIZE = 4  # tokens of a page
POLICIES: dict[str, Any] = {
    "fcfs": FirstComeFirstServed,
    "priority": StrictPriority,
    "vtc": VirtualTokenCounter,
    "fair": lambda: Fair(FairConfig(SliceConfig(6))),
    "fair, by what things cost": lambda: Fair(FairConfig(SliceConfig("auto"))),
    "fair, by the clock": lambda: Fair(FairConfig(SliceConfig("auto", tbt_slo_s=2.0))),
    "fair, no slices": lambda: Fair(FairConfig(SliceConfig(float("inf")))),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A machine and what comes to it."""

    requests: list[TraceRequest]
    stops: list[int]  # what each could become, at most
    pages: int
    slots: int  # of the store; 0: none
    seqs: int
    link_s: float
    run_ahead: int
    host_s: float
    growth: int
    prefix: bool
    farthest: bool
    switch_share: float
    owed: float  # what the guard's budgets are overdrawn by at the start, beyond their slack

    @classmethod
    def draw(cls, seed: int) -> Case:
        """At random; long outputs, so that there is something to skip."""
        rng = random.Random(seed)
        pages = rng.randrange(40, 120)
        longest = pages * SIZE // 2
        spread = rng.choice([2.0, 20.0, 60.0])
        requests = sorted(
            (TraceRequest(
                rng.uniform(0, spread), rng.randrange(1, longest // 2),
                rng.randrange(1, longest // 2), rng.choice("aab"), priority=rng.randrange(2),
                weight=rng.choice([1.0, 1.0, 2.5]),
            ) for _ in range(rng.randrange(4, 25))),
            key=lambda one: one.arrival_s,
        )
        stops = [one.output + rng.choice([0, 0, 9]) for one in requests]
        return cls(
            requests, stops, pages, rng.choice([0, 10, 200]), rng.choice([3, 8, 16]),
            rng.choice([1e3, 2e4, 1e6]), rng.choice([0, 1, 1, 2]), rng.choice([0.0, 0.01, 0.2]),
            rng.choice([0, 5, 48]), rng.random() < 0.7, rng.random() < 0.7,
            rng.choice([1.0, 0.1, 0.1, 1e-6]), rng.choice([0.0, 2.0, 20.0]),
        )

    def run(self, policy: Policy, skip: bool) -> tuple[Outcome, dict[int, str], Scheduler]:
        """The outcome, and the digests of the plans that were made."""
        pool = PagePool(
            self.pages, SIZE, FarthestNextUse() if self.farthest else LeastRecentlyUsed()
        )
        stores = [SlotStore("host", self.slots, 400)] if self.slots else []
        one = Scheduler(
            SchedulerConfig(
                self.seqs, 40, self.pages * SIZE, growth_tokens=self.growth,
                switch_share=self.switch_share,
            ),
            policy, pool, PrefixCache(pool) if self.prefix else None,
            Residency(pool, stores) if stores else None, Costs(SIZE),
        )
        if self.owed and self.switch_share < 1:
            for budget in (one.guard.turns, one.guard.shortages):
                budget.spend(budget.left + 10_000 * budget.rate + self.owed)
                assert budget.alarming
        digests: dict[int, str] = {}
        plan = one.plan

        def planned(now: float) -> Plan | None:
            made = plan(now)
            if made is not None:
                digests[made.step_id] = plan_digest(made)
            return made

        one.plan = planned  # type: ignore[method-assign]
        queue = CopyQueue([Link("host", 1 << 30, self.link_s)], SIZE)
        outcome = Simulator(
            one, Line(0.1, 0.01, 0.02, 0.001, moved_byte_s=1e-5), self.requests, queue=queue,
            host_s=self.host_s, run_ahead=self.run_ahead, max_tokens=self.stops, skip=skip,
        ).run()
        return outcome, digests, one


def compare(name: str, seed: int) -> tuple[int, int]:
    """Runs a case with and without skipping; how many plans the one made, and the other."""
    case = Case.draw(seed)
    whole, every, one = case.run(POLICIES[name](), skip=False)
    skipped, some, other = case.run(POLICIES[name](), skip=True)
    for ours, theirs in zip(skipped.run.served, whole.run.served, strict=True):
        assert (ours.tokens, ours.steps) == (theirs.tokens, theirs.steps)
    assert skipped.run.samples == whole.run.samples
    assert dataclasses.replace(skipped, run=whole.run) == whole  # counters and times
    assert vars(one.costs).keys() == vars(other.costs).keys()
    assert all(vars(other.costs)[field] == value for field, value in vars(one.costs).items()
               if isinstance(value, float))
    if case.slots:
        assert one.residency is not None and other.residency is not None
        assert one.residency.counters == other.residency.counters
    # Page tables, slots, copies and moves of the plans between the skipped ones.
    assert some == {step: every[step] for step in some}
    return len(some), len(every)


@pytest.mark.parametrize("name", POLICIES)
def test_what_is_skipped_makes_no_difference(name: str) -> None:
    counts = [compare(name, seed) for seed in range(scaled(12))]
    assert sum(some for some, _ in counts) < 0.7 * sum(every for _, every in counts), (
        "little was skipped"
    )


@pytest.mark.parametrize(("name", "seed"), [("priority", 42), ("fair", 57)])
def test_stores_that_fill_up_while_steps_are_skipped(name: str, seed: int) -> None:
    """Room in stores decides how much admissions leave, so it is looked at in every step."""
    compare(name, seed)


def test_a_plan_says_how_long_it_holds() -> None:
    pool = PagePool(20, SIZE)
    one = Scheduler(SchedulerConfig(4, 40, 80, growth_tokens=0), FirstComeFirstServed(), pool)
    queue = CopyQueue((), SIZE)
    said: list[tuple[int, int]] = []
    plan = one.plan

    def planned(now: float) -> Plan | None:
        made = plan(now)
        if made is not None:
            said.append((made.step_id, made.holds))
        return made

    one.plan = planned  # type: ignore[method-assign]
    requests = [TraceRequest(0.0, 5, 30), TraceRequest(0.0, 7, 12), TraceRequest(11.5, 4, 1)]
    outcome = Simulator(one, Line(1.0), requests, queue=queue).run()
    assert outcome.run.served[0].tokens == [float(t) for t in (*range(1, 14), *range(14, 31))]
    # Prompts don't hold. The first decodes hold until the shorter one has all its tokens (step 11)
    # or somebody comes; then the step that only the longer one is in, and so on.
    assert dict(said)[0] == 0 and dict(said)[1] == 10
    assert len(said) < outcome.steps


def test_pages_end_it_as_well() -> None:
    """Ten pages, two sequences of up to 40 tokens: somewhere one has to give way."""
    case = Case(
        [TraceRequest(0.0, 3, 30), TraceRequest(0.0, 3, 30)], [30, 30], 10, 0, 4, 1e6, 1, 0.0, 0,
        True, True, 1.0, 0.0,
    )
    outcome, digests, _ = case.run(FirstComeFirstServed(), skip=True)
    assert outcome.counters.preemptions == 1
    assert outcome == case.run(FirstComeFirstServed(), skip=False)[0]
    assert len(digests) < 20 < outcome.steps


def test_a_budget_earned_back_ends_it_as_well() -> None:
    """One slot: the urgent request takes it as soon as the guard bears that, in mid-stride."""
    case = Case(
        [TraceRequest(0.0, 3, 200, priority=1), TraceRequest(1.0, 3, 5)], [200, 5], 60, 0, 1, 1e6,
        1, 0.0, 0, False, True, 0.75, 20.0,
    )
    outcome, digests, _ = case.run(StrictPriority(), skip=True)
    assert outcome.counters.switches == 1
    urgent = outcome.run.served[1]
    assert 25 < urgent.steps[0] < 100  # 20 tokens earn what was owed, and more the price
    assert outcome == case.run(StrictPriority(), skip=False)[0]
    assert len(digests) < 30 < outcome.steps


def test_a_recorder_sees_every_plan() -> None:
    case = Case.draw(3)
    pool = PagePool(case.pages, SIZE)
    one = Scheduler(SchedulerConfig(8, 40, case.pages * SIZE), FirstComeFirstServed(), pool)
    recorder = Recorder(one)
    outcome = Simulator(one, Line(0.1), case.requests).run()
    made = [event for event in recorder.events if event[0] == "plan" and event[2]]
    assert len(made) == outcome.counters.plans
