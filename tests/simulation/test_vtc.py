"""The virtual token counter: who is served next, who is never taken off."""

from __future__ import annotations

from collections import Counter

import pytest

from aqua_jax.bench.traces import TraceRequest
from aqua_jax.paging.pages import PagePool
from aqua_jax.scheduling.scheduler import Scheduler, SchedulerConfig
from aqua_jax.scheduling.sequence import Sequence
from aqua_jax.simulation.cost import Line
from aqua_jax.simulation.simulator import Outcome, Simulator
from aqua_jax.simulation.vtc import VirtualTokenCounter


def sequence(number: int, user: str, prompt: int = 10, weight: float = 1.0) -> Sequence:
    return Sequence(number, str(number), [0] * prompt, prompt + 10, float(number), user=user,
                    weight=weight)


def serve(policy: VirtualTokenCounter, one: Sequence, tokens: int) -> None:
    policy.remove(one)
    policy.admitted(one)
    policy.on_service(one, tokens=tokens)


def test_least_counter_first_and_output_counts_twice() -> None:
    policy = VirtualTokenCounter()
    first, second, third = sequence(0, "a"), sequence(1, "a"), sequence(2, "b", prompt=12)
    fourth = sequence(3, "b")
    for one in (first, second, third, fourth):
        policy.push(one)
    assert policy.head(0.0) is first
    serve(policy, first, 10)  # a: 10
    assert policy.head(0.0) is third
    serve(policy, third, 12)  # b: 12
    assert policy.head(0.0) is second
    policy.on_service(first, tokens=2)  # a: 14
    assert policy.head(0.0) is fourth
    assert len(policy) == 2


def test_weights_divide() -> None:
    policy = VirtualTokenCounter()
    heavy, light = sequence(0, "a", weight=3.0), sequence(1, "b")
    more = sequence(2, "a"), sequence(3, "b")
    for one in (heavy, light, *more):
        policy.push(one)
    serve(policy, heavy, 12)  # 10 prompt tokens and 2 of output: 14 / 3
    serve(policy, light, 5)
    assert policy.head(0.0) is more[0]


@pytest.mark.parametrize("weight, first", [(1.0, "b"), (3.0, "a")])
def test_users_weights_divide(weight: float, first: str) -> None:
    policy = VirtualTokenCounter({"a": weight})
    heavy, light, *more = (sequence(number, user) for number, user in enumerate("abab"))
    for one in (heavy, light, *more):
        policy.push(one)
    serve(policy, heavy, 12)  # 14 over the weight
    serve(policy, light, 5)
    head = policy.head(0.0)
    assert head is not None and head.user == first


def test_who_comes_back_is_lifted() -> None:
    policy = VirtualTokenCounter()
    for one in (mine := sequence(0, "a", 100)), sequence(1, "a"), sequence(2, "a"):
        policy.push(one)
    serve(policy, mine, 100)
    policy.push(sequence(3, "late"))
    policy.push(sequence(4, "late"))
    serve(policy, policy.head(0.0), 10)  # a and late are level, and a's name comes first
    assert policy.head(0.0).user == "late", "no claim was saved up, and none is held against it"


def run(users: list[str], seqs: int = 4) -> Outcome:
    pool = PagePool(200, 4)
    scheduler = Scheduler(SchedulerConfig(seqs, 64, 800), VirtualTokenCounter(), pool)
    requests = [TraceRequest(0.0, 20, 20, user) for user in users]
    return Simulator(scheduler, Line(1.0), requests).run()


def test_one_request_does_not_wait_behind_anothers_thousand() -> None:
    outcome = run(["many"] * 40 + ["one"])
    first = [one.tokens[0] for one in outcome.run.served]
    assert first[-1] == sorted(first)[4], "the first place that comes free"
    assert outcome.counters.preemptions == 0


def test_running_requests_are_never_taken_off_for_fairness() -> None:
    outcome = run(["a"] * 30 + ["b"] * 30)
    assert outcome.counters.preemptions == outcome.counters.recomputed_tokens == 0
    half = sorted(outcome.run.served, key=lambda one: one.tokens[0])[:30]
    counts = Counter(one.request.user for one in half)
    assert abs(counts["a"] - counts["b"]) <= 4


def test_recomputing_is_not_counted_again() -> None:
    policy = VirtualTokenCounter()
    mine, theirs = [sequence(i, "a") for i in range(2)], [sequence(i, "b", 16) for i in (2, 3)]
    for one in (*mine, *theirs):
        policy.push(one)
    serve(policy, mine[0], 10)
    policy.on_service(mine[0], tokens=2)  # a: 14
    policy.push(mine[0])  # it gave way
    serve(policy, mine[0], 12)
    serve(policy, theirs[0], 15)
    assert policy.head(0.0) is mine[1], "14 against 15"
    policy.on_service(mine[0], tokens=1)
    assert policy.head(0.0) is theirs[1], "16 against 15"


def test_the_latest_admitted_gives_way() -> None:
    policy = VirtualTokenCounter()
    both = [sequence(0, "a"), sequence(1, "b")]
    for one in both:
        policy.push(one)
    for one in reversed(both):
        serve(policy, one, 10)
    assert policy.running_order(both, 0.0) == both[::-1]
    assert policy.victim(iter(both)) is both[0]
    assert policy.yielding(both[0], both) == [] == policy.leaving_next(both)
