"""First come, first served; strict priority. (`fair` has its own file.)"""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aqua_jax.errors import ConfigError
from aqua_jax.paging.pages import PagePool
from aqua_jax.scheduling.fair import Fair
from aqua_jax.scheduling.limits import SchedulerConfig
from aqua_jax.scheduling.policies import POLICIES, FirstComeFirstServed, StrictPriority
from aqua_jax.scheduling.scheduler import Scheduler
from aqua_jax.scheduling.sequence import Sequence
from tests.scheduling.fake_device import FakeEngine


def _sequences(arrivals):
    return [
        Sequence(index, str(index), [1], 2, arrival=float(arrival))
        for index, arrival in enumerate(arrivals)
    ]


def _order(sequences):
    return sorted(sequences, key=lambda s: (s.arrival, s.seq_id))


@given(st.lists(st.integers(0, 3), min_size=1, max_size=20), st.randoms(use_true_random=False))
def test_the_queue_is_in_order_of_arrival_whenever_one_joins(arrivals, random):
    policy, sequences = FirstComeFirstServed(), _sequences(arrivals)
    random.shuffle(sequences)
    queued = []
    for sequence in sequences:
        policy.push(sequence)
        queued.append(sequence)
        if random.random() < 0.3:
            leaver = random.choice(queued)
            policy.remove(leaver)
            queued.remove(leaver)
        assert len(policy) == len(queued)
        assert policy.head(0.0) is (_order(queued)[0] if queued else None)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=20), st.randoms(use_true_random=False))
def test_early_arrivals_run_first_and_the_latest_gives_way(arrivals, random):
    policy, sequences = FirstComeFirstServed(), _sequences(arrivals)
    expected = _order(sequences)
    random.shuffle(sequences)
    order = policy.running_order(sequences, 0.0)
    assert order == expected
    assert policy.victim(reversed(order)) is expected[-1]


def test_policies_have_names():
    assert POLICIES == {
        "fair": Fair, "fcfs": FirstComeFirstServed, "fcfs_swap": FirstComeFirstServed,
        "priority": StrictPriority,
    }


def test_lower_priority_runs_first_and_takes_the_place_of_higher_ones():
    policy = StrictPriority(ageing_s=10.0)
    running = _sequences([0, 1, 2])
    for sequence, priority in zip(running, (1, 2, 2), strict=True):
        sequence.priority = priority
    urgent = Sequence(7, "urgent", [1], 2, arrival=3.0, priority=1)
    policy.push(urgent)
    assert list(policy.yielding(urgent, running)) == [running[2], running[1]]
    urgent.priority = 2
    assert list(policy.yielding(urgent, running)) == []


def test_age_makes_up_for_priority_but_takes_nobody_off():
    policy = StrictPriority(ageing_s=10.0)
    old = Sequence(0, "old", [1], 2, arrival=0.0, priority=3)
    soon = Sequence(1, "soon", [1], 2, arrival=29.0, priority=0)
    late = Sequence(2, "late", [1], 2, arrival=31.0, priority=0)
    for sequence in (late, soon, old):
        policy.push(sequence)
    order = []
    while len(policy):
        order.append(policy.head(0.0))
        policy.remove(order[-1])
    assert order == [soon, old, late]
    assert list(policy.yielding(old, [late])) == []


@pytest.mark.parametrize("ageing_s", [0.0, -1.0, float("inf")])
def test_ageing_is_checked(ageing_s):
    with pytest.raises(ConfigError):
        StrictPriority(ageing_s)


def test_ranks_promise_no_bound():
    pool, limits = PagePool(8, 4), SchedulerConfig(2, 8, 100)
    assert POLICIES["fcfs"]().waiting_bound(limits, pool) is None
    assert POLICIES["fair"]().waiting_bound(limits, pool) is None  # nobody is live


def test_a_fork_that_loses_its_pages_in_the_plan_that_gave_them_copies_nothing():
    pool = PagePool(3, 4)
    scheduler = Scheduler(
        SchedulerConfig(2, 32, 100, growth_tokens=0), StrictPriority(), pool, None
    )
    engine = FakeEngine(scheduler, random.Random(0), 0)
    parent = Sequence(0, "0", [1, 2, 3, 4, 5, 6], 12)
    lowly = Sequence(1, "1", [7], 5, priority=1)
    for sequence in (parent, lowly):
        engine.add(sequence)
    while parent.num_computed < 8:
        engine.step()
    fork = Sequence(2, "0", list(parent.tokens[:6]), 8, sample_index=1, parent=parent)
    engine.add(fork)
    plan = engine.step()  # `lowly` gives way to the fork, and the fork to the parent
    assert plan.preempted == (lowly, fork)
    assert plan.copies == ()
    while scheduler.num_live:
        engine.step()
    engine.drain()
    assert set(engine.ended) == {parent, lowly, fork}


def test_nobody_is_taken_off_while_a_place_is_about_to_come_free():
    pool = PagePool(8, 4)
    scheduler = Scheduler(SchedulerConfig(1, 32, 100), StrictPriority(), pool, None)
    engine = FakeEngine(scheduler, random.Random(0), 1)
    ending, urgent = Sequence(0, "0", [1, 2], 3, priority=1), Sequence(1, "1", [3], 4)
    engine.add(ending)
    engine.step()
    assert ending.complete  # and its token is still on the device
    engine.add(urgent)
    while scheduler.num_live:
        engine.step()
    engine.drain()
    assert scheduler.counters.preemptions == 0
