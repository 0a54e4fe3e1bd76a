"""Contestants on one load: what must be equal, what must differ, what must be left at the end."""

from __future__ import annotations

import dataclasses
import functools

import pytest

from aqua_jax.bench.traces import TraceRequest
from aqua_jax.scheduling.scheduler import Scheduler
from aqua_jax.simulation.loads import sharegpt_like, timed
from aqua_jax.simulation.machines import System, build_system
from aqua_jax.simulation.models import MODELS
from aqua_jax.simulation.report import figures, simulate
from aqua_jax.simulation.setups import NAMES, Limits, build, parse_setup
from aqua_jax.simulation.simulator import Outcome, Simulator

LIMITS = Limits(max_model_len=4096)


@functools.cache
def system() -> System:
    """A pool of a quarter of what the load would fill."""
    machine = build_system("h100-nvlink", MODELS["34b"])
    return dataclasses.replace(machine, num_pages=400)


@functools.cache
def load() -> tuple[TraceRequest, ...]:
    lengths = [(min(p, 1500), min(o, 150)) for p, o in sharegpt_like(70, 1)]
    return tuple(timed(lengths, "gamma", 12.0, 0.3, 3, 1))


@functools.cache
def outcome(name: str) -> Outcome:
    return simulate(parse_setup(name), system(), LIMITS, load())


def tokens(name: str) -> list[list[float]]:
    return [one.tokens for one in outcome(name).run.served]


def one_user(name: str) -> list[list[float]]:
    requests = [dataclasses.replace(one, user="") for one in load()]
    run = simulate(parse_setup(name), system(), LIMITS, requests).run
    return [one.tokens for one in run.served]


def test_the_load_is_more_than_the_pool_holds() -> None:
    assert outcome("vllm").counters.preemptions > 0
    assert figures(outcome("fcfs"))["ttft_p99_s"] > 1.0


def test_no_slices_and_no_stores_are_first_come_first_served() -> None:
    """What AQUA calls interval 0, step for step."""
    assert one_user("fair@none/0") == one_user("fcfs")
    assert one_user("fair@none/10") != one_user("fcfs")


@pytest.mark.parametrize("name", NAMES)
def test_every_contestant_serves_everything_and_leaves_nothing(name: str) -> None:
    setup = parse_setup(name)
    scheduler, queue = build(setup, system(), LIMITS)
    done = Simulator(scheduler, system().cost, load(), queue=queue).run()
    assert [len(one.tokens) for one in done.run.served] == [one.output for one in load()]
    assert scheduler.num_live == 0 and scheduler.pool.in_use == 0
    residency = getattr(scheduler, "residency", None)
    assert residency is None or residency.outstanding == 0
    assert len(queue) == 0
    assert all(store.free_slots == store.capacity for store in getattr(scheduler, "stores", ()))
    if residency is not None:
        assert all(store.free_slots == store.capacity for store in residency.tiers.stores)
        assert done.bytes_out > 0, "nothing was paged"
        assert 0 < done.bytes_in <= 1000 * done.bytes_out


def test_slices_bring_early_first_tokens() -> None:
    late, early = figures(outcome("fcfs")), figures(outcome("fair@peer/10"))
    assert early["ttft_p99_s"] < 0.7 * late["ttft_p99_s"]
    assert early["output_tok_s"] > 0.8 * late["output_tok_s"]
    counters = outcome("fair@peer/10").counters
    assert counters.recomputed_tokens < 0.02 * counters.tokens


def test_longer_slices_move_less() -> None:
    moved = [outcome(f"fair@peer/{steps}").bytes_in for steps in (5, 20, 80)]
    assert moved[0] > moved[1] > moved[2]


def test_a_link_too_slow_shows() -> None:
    slow = dataclasses.replace(system(), links=system().with_links(("host",)).links).with_rate(2e8)
    done = figures(simulate(parse_setup("aqua_reference"), slow, LIMITS, load()))
    fast = figures(outcome("aqua_reference@peer"))
    assert done["output_tok_s"] < 0.7 * fast["output_tok_s"]


def test_pages_that_arrive_in_a_moment_are_waited_for() -> None:
    """As the engine does, so that a sequence which comes back is in the very next step."""

    def steps_to_return(rate: float | None) -> float:
        here = system() if rate is None else system().with_rate(rate)
        scheduler, queue = build(parse_setup("fair@peer/10"), here, LIMITS)
        Simulator(scheduler, here.cost, load(), queue=queue, host_s=here.host_s).run()
        assert isinstance(scheduler, Scheduler)
        return scheduler.costs.switch_steps

    assert steps_to_return(None) == pytest.approx(1.0, abs=0.1)
    assert steps_to_return(1e9) > 2.0


def test_figures_of_a_run() -> None:
    done = outcome("fair@peer/10")
    shown = figures(done)
    assert shown["steps"] == done.steps and shown["bytes_in"] == done.bytes_in
    assert 0.5 < shown["device_share"] <= 1.0
    assert shown["worst_gap_p50_s"] <= shown["worst_gap_s"]
    assert shown["worst_gap_s"] == pytest.approx(shown["tbt_max_ms"] / 1e3)
    assert done.run.stores_total["peer"] == pytest.approx(40 * 2**30 / system().page_bytes, abs=1)
    assert max(one.stores["peer"] for one in done.run.samples) > 0
    assert done.run.samples[-1].bytes_in == done.bytes_in
