"""The fair queue alone."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aqua_jax.scheduling.virtual_time import Member, VirtualTimeQueue
from tests.scale import scaled


def _members(*weights):
    return [Member(weight, (0.0, index)) for index, weight in enumerate(weights)]


def test_service_follows_weights():
    queue, members = VirtualTimeQueue(), _members(1.0, 2.0, 5.0)
    for member in members:
        queue.join(member)
        queue.wait(member)
    served = dict.fromkeys(members, 0)
    for _ in range(800):
        first = queue.first()
        queue.charge(first, 1.0)
        served[first] += 1
    assert [served[member] for member in members] == pytest.approx([100, 200, 500], abs=2)
    assert queue.clock == pytest.approx(100, abs=1)


def test_a_stream_of_newcomers_does_not_starve_the_old():
    queue, (old,) = VirtualTimeQueue(), _members(1.0)
    queue.join(old)
    queue.wait(old)
    queue.charge(old, 10.0)  # ten ahead of everyone who comes
    served = 0
    for number in range(1, 100):
        newcomer = Member(1.0, (0.0, number))
        queue.join(newcomer)
        queue.wait(newcomer)
        first = queue.first()
        queue.charge(first, 1.0)
        served += first is old
        queue.unwait(newcomer)
        queue.leave(newcomer)
    assert served > 30


def test_head_starts_lags_and_leads():
    queue, (one, other, late) = VirtualTimeQueue(), _members(1.0, 1.0, 2.0)
    for member in (one, other):
        queue.join(member)
        queue.wait(member)
    queue.charge(one, 10.0)
    assert (queue.clock, one.vruntime) == (5.0, 10.0)
    queue.join(late, head_start=4.0)
    assert late.vruntime == 3.0
    queue.catch_up(other, 1.0)
    assert other.vruntime == 4.0
    queue.unwait(one)
    queue.forgive(one, 2.0)
    assert one.vruntime == 7.0
    assert queue.first() is other
    queue.leave(late)
    late.vruntime = 9.0
    queue.join(late)  # who comes back too soon is not better off
    assert late.vruntime == 9.0


@given(st.lists(st.integers(0, 4), max_size=80), st.integers(0, 2**32))
@settings(max_examples=scaled(60), deadline=None)
def test_first_is_the_least_whatever_happened(actions, seed):
    rng, queue = random.Random(seed), VirtualTimeQueue()
    members, waiting = [], []
    for number, action in enumerate(actions):
        if action == 0 or not members:
            members.append(Member(rng.choice([0.5, 1.0, 3.0]), (rng.randrange(3), number)))
            queue.join(members[-1])
        member = rng.choice(members)
        if action == 1 and member not in waiting:
            waiting.append(member)
            queue.wait(member)
        elif action == 2 and member in waiting:
            waiting.remove(member)
            queue.unwait(member)
        elif action == 3:
            for _ in range(rng.choice([1, 40])):  # many: stale entries are swept
                queue.charge(member, rng.choice([-1.0, 2.0, 5.0]))
        assert len(queue) == len(waiting)
        expected = min(waiting, key=lambda m: (m.vruntime, m.tie), default=None)
        assert queue.first() is expected
        assert len(queue._heap) <= 2 * len(waiting) + 65
