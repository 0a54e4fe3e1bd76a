"""AQUA's released scheduler: who runs, what is copied, and that everything ends."""

from __future__ import annotations

import random

import pytest

from aqua_jax.bench.service import gaps
from aqua_jax.bench.traces import TraceRequest
from aqua_jax.paging.pages import PagePool
from aqua_jax.scheduling.limits import SchedulerConfig
from aqua_jax.scheduling.plan import Plan
from aqua_jax.scheduling.sequence import Sequence
from aqua_jax.simulation.aqua_reference import AquaReference
from aqua_jax.simulation.cost import Line
from aqua_jax.simulation.links import CopyQueue, Link
from aqua_jax.simulation.simulator import Simulator
from aqua_jax.simulation.stores import SlotStore
from tests.scale import scaled


def make(pages: int, slots: int = 1000, steps: int = 5, seqs: int = 8) -> AquaReference:
    config = SchedulerConfig(seqs, 64, pages * 4)
    return AquaReference(config, PagePool(pages, 4), [SlotStore("host", slots, 400)], steps)


def add(scheduler: AquaReference, number: int, prompt: int, output: int) -> Sequence:
    sequence = Sequence(number, str(number), [1] * prompt, prompt + output, float(number))
    scheduler.add(sequence)
    return sequence


def step(scheduler: AquaReference) -> Plan:
    plan = scheduler.plan(0.0)
    assert plan is not None
    for chunk in plan.chunks:
        scheduler.accept(chunk.sequence, 7)
        if chunk.sequence.complete:
            scheduler.finish(chunk.sequence)
    return plan


def test_prompts_first_whole_and_alone() -> None:
    scheduler = make(pages=40)
    first = add(scheduler, 0, 10, 30)
    assert [c.count for c in step(scheduler).chunks] == [10]
    assert [c.count for c in step(scheduler).chunks] == [1]
    second, third = add(scheduler, 1, 20, 5), add(scheduler, 2, 24, 5)
    plan = step(scheduler)
    assert [(c.sequence, c.count) for c in plan.chunks] == [(second, 20), (third, 24)]
    assert {c.sequence for c in step(scheduler).chunks} == {first, second, third}


def test_delta_out_full_in() -> None:
    scheduler = make(pages=8, steps=3)
    first = add(scheduler, 0, 14, 12)
    step(scheduler)
    second = add(scheduler, 1, 16, 6)  # 4 pages beside 4 would fit; the watermark of 8 pages is 0
    step(scheduler)
    assert first.pages and second.pages
    plan = step(scheduler)
    while not plan.preempted:  # until pages run short: both need a fifth
        plan = step(scheduler)
    # All pages go out, the first time: 5 of first's (17 tokens) or 4 to 5 of second's.
    out = [move for move in plan.moves if not move.inward]
    gone = plan.preempted[0]
    assert len(out) == -(-gone.num_computed // 4) and all(move.count == 4 for move in out)
    while gone.status.name == "WAITING":
        plan = step(scheduler)
    back = [move for move in plan.moves if move.inward]
    assert len(back) == len(out), "every page comes back"
    known = len(out)
    while gone not in plan.preempted and gone.status.name != "FINISHED":
        other = next(s for s in (first, second) if s is not gone)
        if other.status.name == "FINISHED":
            add(scheduler, 2, 24, 2)
        plan = step(scheduler)
    if gone in plan.preempted:
        again = [move for move in plan.moves if not move.inward and move.page]
        fresh = -(-gone.num_computed // 4) - known
        assert len(again) == fresh + 1, "new pages, and the last of the old ones"


def test_the_least_served_are_next_after_a_slice() -> None:
    scheduler = make(pages=8, steps=2)
    first = add(scheduler, 0, 12, 18)
    for _ in range(5):
        step(scheduler)
    second = add(scheduler, 1, 20, 10)
    step(scheduler)
    assert not first.pages and second.pages, "it gave way to a prompt"
    served = []
    for _ in range(40):
        if scheduler.num_live == 0:
            break
        served.append([c.sequence for c in step(scheduler).chunks])
    assert served[0] == [second]
    # second has fewer tokens until it has caught up with first.
    assert [first] in served and [second] in served[served.index([first]) :]


@pytest.mark.parametrize("slots", [1000, 3])
def test_everything_ends_and_nothing_is_left(slots: int) -> None:
    for seed in range(scaled(20)):
        rng = random.Random(seed)
        requests = sorted(
            (TraceRequest(rng.uniform(0, 30), rng.randrange(1, 40), rng.randrange(1, 30))
             for _ in range(25)), key=lambda one: one.arrival_s,
        )
        scheduler = make(pages=rng.randrange(18, 40), slots=slots, steps=rng.randrange(1, 9))
        queue = CopyQueue([Link("host", 1 << 20, 4000.0)], 4)
        outcome = Simulator(scheduler, Line(0.5, 0.01, 0.01), requests, queue=queue).run()
        assert [len(one.tokens) for one in outcome.run.served] == [r.output for r in requests]
        assert scheduler.pool.free == scheduler.pool.num_pages
        assert scheduler.stores[0].in_use == 0 and scheduler.num_live == 0
        if slots > 3:
            assert outcome.counters.recomputed_tokens == 0 and outcome.bytes_in > 0
            computed = sum(r.prompt + r.output - 1 for r in requests)
            assert outcome.counters.tokens == computed
        assert outcome.wait_s > 0.0, "steps wait for their copies"


def test_steps_wait_for_copies() -> None:
    requests = [TraceRequest(0.0, 20, 20), TraceRequest(0.0, 20, 20)]

    def worst(rate: float) -> float:
        queue = CopyQueue([Link("host", 1 << 20, rate)], 4)
        outcome = Simulator(make(pages=12), Line(1.0), requests, queue=queue).run()
        assert outcome.bytes_in > 0
        return max(max(gaps(one)) for one in outcome.run.served)

    assert worst(10.0) > worst(1e6) + 10.0
