"""SmolLM2 says the same under random schedules: a lender that is killed, checksums, other faults.

The unconstrained engine takes transformers' place here (`test_demo` compares the two).
"""

from __future__ import annotations

import pytest

from aqua_jax.config import EngineConfig, SamplingParams
from aqua_jax.engine.engine import Engine
from tests.engine.schedules import LENDERS, Catalogue, Request, Scale, Schedule, check
from tests.scale import at_scale

TEXTS = [
    "The capital of France is", "def fibonacci(n):\n    ", "Once upon a time, in a small village",
    "Water boils at", "The three primary colours are", "A haiku about the sea:\n",
    "Once upon a time, in a large city", "To make an omelette, first",
]
PAGE_BYTES = 30 * 2 * 16 * 3 * 64 * 2  # layers, keys and values, tokens, heads, width, bfloat16
SCALE = Scale(
    PAGE_BYTES, pool_tokens=(16 * 8, 16 * 11), lent_pages=(6, 24), host_pages=(0, 8, 24),
    requests=7, arrivals=8, aborts=1,
)
KILLED = [5 * turn + LENDERS.index("is killed") for turn in range(at_scale(1, 12))]


def engine(**settings) -> Engine:
    return Engine(EngineConfig(
        model="demo", dtype="bfloat16", max_num_seqs=6, max_step_tokens=48, warmup="none",
        deterministic=True, **settings,
    ))


@pytest.fixture(scope="module")
def catalogue():
    with engine(kv_cache_tokens=4096, policy="fcfs") as roomy:
        requests = [
            Request(roomy.tokenizer.encode(text), SamplingParams(
                temperature=0.8 * (index % 2), seed=index, n=1 + (index == 3),
                max_tokens=28 + 7 * index % 12, ignore_eos=True,
            ))
            for index, text in enumerate(TEXTS)
        ]
        yield Catalogue(requests, roomy)


@pytest.mark.parametrize("seed", KILLED)
def test_random_schedules_say_the_same(catalogue, seed):
    schedule = Schedule(seed, SCALE, catalogue.requests)
    schedule.settings["verify_pages"] = True
    wanted = catalogue.answers(schedule.chosen)
    answers, stats = schedule.run(engine)
    check(schedule, answers, stats, wanted)
    assert stats["paging"]["stores"][0]["lost"] and stats["paging"]["bytes_out"] > 0
