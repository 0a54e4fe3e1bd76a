"""Exact, whatever happens: random schedules on a tiny model, over pools, tiers and faults."""

from __future__ import annotations

import collections

import pytest

from aqua_jax.config import SamplingParams
from tests.coordinator.running import coordinator
from tests.engine.driving import tiny_engine
from tests.engine.paged import PAGE_BYTES
from tests.engine.schedules import Catalogue, Request, Scale, Schedule, check, tally
from tests.engine.test_engine import prompt
from tests.memory.lending import new_name
from tests.scale import at_scale

BLOCK = at_scale(10, 50)  # schedules of one test
BLOCKS = at_scale(1, 20)
REQUESTS = 160
SCALE = Scale(
    PAGE_BYTES, pool_tokens=(16 * 12, 16 * 22), lent_pages=(6, 40), host_pages=(0, 16, 64, 64),
    requests=14, arrivals=50, aborts=3,
)


def requests() -> list[Request]:
    """Some share their beginnings; some are asked for several samples; some draw lots."""
    made = []
    for index in range(REQUESTS):
        start = prompt(1 + 37 * index % 40, index % 3)
        tail = prompt(29 * index % 31, 100 + index)
        made.append(Request(start + tail, SamplingParams(
            temperature=0.9 * (index % 2), seed=index, n=3 if index % 4 == 1 else 1,
            max_tokens=1 + 53 * index % 83, ignore_eos=True,
        )))
    return made


@pytest.fixture(scope="module")
def catalogue(folder):
    with tiny_engine(folder, deterministic=True, kv_cache_tokens=16384, policy="fcfs") as roomy:
        yield Catalogue(requests(), roomy)


@pytest.fixture(scope="module")
def running():
    with coordinator(new_name(), "--term_s=5", "--metrics_port=0") as found:
        yield found


@pytest.mark.parametrize("block", range(BLOCKS))
def test_random_schedules_say_the_same(folder, catalogue, running, block):
    seen: collections.Counter[str] = collections.Counter()
    for seed in range(block * BLOCK, (block + 1) * BLOCK):
        schedule = Schedule(seed, SCALE, catalogue.requests, running.path)
        wanted = catalogue.answers(schedule.chosen)
        try:
            answers, stats = schedule.run(
                lambda **settings: tiny_engine(folder, deterministic=True, **settings)
            )
            check(schedule, answers, stats, wanted)
        except BaseException as error:
            error.add_note(f"schedule {seed}: {schedule.lender}, {schedule.breaks}, "
                           f"{schedule.settings}")
            raise
        seen += tally(schedule, stats)
    missing = {
        "pages came back", "revived", "recomputed", "pool reset", "changed pages noticed",
        "lender lost", "two tiers", "fair", "fcfs_swap", "priority",
    } - set(seen)
    if BLOCK >= 50:  # it takes a lender that asks at the right moment
        missing |= {"moved down"} - set(seen)
    assert not missing, f"the schedules of this block had none of these: {sorted(missing)}"
