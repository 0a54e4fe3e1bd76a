"""A recorded run, made again: the same plans, and a difference is found."""

from __future__ import annotations

import json
import random
from collections.abc import Callable

import pytest

from aqua_jax.bench.traces import TraceRequest
from aqua_jax.errors import SimulationError
from aqua_jax.paging.pages import PagePool
from aqua_jax.paging.prefix import PrefixCache
from aqua_jax.paging.residency import Residency
from aqua_jax.scheduling.cost import Costs
from aqua_jax.scheduling.fair import Fair, FairConfig
from aqua_jax.scheduling.policies import FirstComeFirstServed, Policy, StrictPriority
from aqua_jax.scheduling.recording import Recorder, limits_of
from aqua_jax.scheduling.scheduler import Scheduler, SchedulerConfig
from aqua_jax.scheduling.sequence import Sequence
from aqua_jax.scheduling.slices import SliceConfig
from aqua_jax.simulation.cost import Line
from aqua_jax.simulation.links import CopyQueue, Link
from aqua_jax.simulation.replay import Replay, build_scheduler
from aqua_jax.simulation.simulator import Simulator
from aqua_jax.simulation.stores import SlotStore
from tests.scale import scaled
from tests.scheduling.fake_device import FakeEngine

POLICIES: dict[str, Callable[[], Policy]] = {
    "fcfs": FirstComeFirstServed,
    "priority": StrictPriority,
    "fair": lambda: Fair(FairConfig(SliceConfig(4))),
    "fair, by what things cost": lambda: Fair(FairConfig(SliceConfig("auto", tbt_slo_s=2.0))),
}


def scheduler(policy: Policy, slots: int, prefix: bool = True) -> Scheduler:
    pool = PagePool(24, 4)
    residency = Residency(pool, [SlotStore("host", slots, 400)]) if slots else None
    return Scheduler(
        SchedulerConfig(8, 40, 96, growth_tokens=0), policy, pool,
        PrefixCache(pool) if prefix else None, residency, Costs(4),
    )


def recorded(name: str, slots: int, seed: int) -> tuple[dict, list[list]]:
    """Limits and events of a simulated run, by way of JSON."""
    rng = random.Random(seed)
    requests = sorted(
        (TraceRequest(rng.uniform(0, 20), rng.randrange(1, 40), rng.randrange(1, 40),
                      rng.choice("ab"), priority=rng.randrange(2)) for _ in range(30)),
        key=lambda one: one.arrival_s,
    )
    one = scheduler(POLICIES[name](), slots)
    limits, recorder = limits_of(one), Recorder(one)
    queue = CopyQueue([Link("host", 1, 1e5)], 4)
    outcome = Simulator(
        one, Line(0.1, 0.01, 0.02, 0.001), requests, queue=queue, host_s=0.01
    ).run()
    assert outcome.counters.preemptions > 0
    return tuple(json.loads(json.dumps([limits, recorder.events])))  # type: ignore[return-value]


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("slots", [0, 60])
def test_a_replay_makes_the_same_plans(name: str, slots: int) -> None:
    for seed in range(scaled(3)):
        limits, events = recorded(name, slots, seed)
        done = Replay(build_scheduler(limits, POLICIES[name]())).run(events)
        assert done.plans == sum(event[0] == "plan" for event in events) > 50
        # Copies made ahead may be under way when the last request has ended.
        assert 0 <= done.moves - sum(event[0] == "moved" for event in events) <= 2
        if not slots or name == "fair":  # what things cost may speak against stores
            assert (done.moves > 0) == bool(slots)


def test_a_difference_is_found() -> None:
    limits, events = recorded("fair", 60, 1)
    with pytest.raises(SimulationError, match="differs"):
        Replay(build_scheduler(limits, FirstComeFirstServed())).run(events)
    smaller = {**limits, "num_pages": limits["num_pages"] - 1}
    with pytest.raises(SimulationError, match="differs"):
        Replay(build_scheduler(smaller, POLICIES["fair"]())).run(events)


def test_what_was_measured_counts() -> None:
    name = "fair, by what things cost"
    limits, events = recorded(name, 60, 2)
    assert any(event[0] == "costs" for event in events)
    forgetful = [event for event in events if event[0] != "costs"]
    with pytest.raises(SimulationError, match="differs"):
        Replay(build_scheduler(limits, POLICIES[name]())).run(forgetful)


@pytest.mark.parametrize("run_ahead", [0, 2])
def test_aborts_forks_stops_and_failures(run_ahead: int) -> None:
    """Everything that can happen to a scheduler, on the device that checks every page."""
    for seed in range(scaled(5)):
        rng = random.Random(seed)
        one = scheduler(POLICIES["fair"](), 0)
        limits, recorder = limits_of(one), Recorder(one, prompts=True)
        engine = FakeEngine(one, rng, run_ahead)
        live: list[Sequence] = []
        for number in range(120):
            if rng.random() < 0.3 and len(live) < 12:
                # No prompt goes on as somebody's answer does: the replay has other answers.
                tokens = [rng.randrange(8, 11) for _ in range(rng.randrange(1, 30))]
                first = Sequence(2 * number, f"r{number}", tokens, len(tokens) + 12)
                engine.add(first)
                live.append(first)
                if rng.random() < 0.3:
                    engine.add(fork := Sequence(
                        2 * number + 1, f"r{number}", list(tokens), len(tokens) + 12,
                        sample_index=1, parent=first,
                    ))
                    live.append(fork)
            if live and rng.random() < 0.05:
                engine.abort(live.pop(rng.randrange(len(live))))
            engine.step()
            live = [sequence for sequence in live if sequence not in engine.ended]
            if rng.random() < 0.01:
                engine.drain()
                one.reset()
        kinds = {event[0] for event in recorder.events}
        assert {"add", "plan", "accept", "finish", "abort"} <= kinds
        Replay(build_scheduler(limits, POLICIES["fair"]())).run(
            json.loads(json.dumps(recorder.events))
        )
