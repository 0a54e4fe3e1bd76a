"""No gap between two tokens, nor before the first, is longer than `fair` says it can be.

Over random histories: crowds that come at once or little by little, users and weights, samples,
prefixes, pools and stores of all sizes, copies that take as long as they may.
"""

from __future__ import annotations

import math
import random

import pytest

from aqua_jax.scheduling.fair import Fair, FairConfig
from aqua_jax.scheduling.slices import SliceConfig
from tests.scale import at_scale
from tests.scheduling.histories import PAGE_TOKENS, History, Machine

HISTORIES = at_scale(60, 10_000)
PARTS = at_scale(1, 20)  # of the histories, for several processes to share
STEPS = 200


def random_history(seed: int) -> History:
    """One history, ended."""
    rng = random.Random(seed)
    choose = rng.choice
    # Every other one has a bound that is short beside its outputs: few compete, as equals, and
    # prompts take one step. There a scheduler that forgets somebody is found out.
    sharp = seed % 2 == 0
    max_num_seqs = rng.randint(1, 6)
    machine = Machine(
        num_pages=rng.randint(12, 40) * (5 if sharp else 1), max_num_seqs=max_num_seqs,
        max_step_tokens=max_num_seqs + (800 if sharp else rng.randint(1, 40)),
        host_slots=choose([0, 4, 30, 1000, 1000, 1000]), run_ahead=rng.randint(0, 2),
        slowest=rng.random() < 0.5, page_price=choose([1e-3, 1e-3, 1e-3, 0.5]),
        write_behind=choose([0, 2, 64]), growth_tokens=choose([0, 4, 48]),
        prefix=rng.random() < 0.5, farthest=rng.random() < 0.8, seed=seed,
        max_switches=(8, 8, 1)[seed % 3],
        switch_share=1.0 if seed % 4 == 2 or seed % 10 == 5 else (0.1, 0.3)[seed % 8 // 4],
    )
    policy = Fair(FairConfig(SliceConfig(
        choose([1, 2, 3, 8] if sharp else [1, 2, 3, 8, 20, "auto"]), min_slice_steps=4,
        max_slice_steps=64, tbt_slo_s=choose([0.0, 0.0, 0.2]),
    )))
    history = History(machine, policy)
    capacity = PAGE_TOKENS * machine.num_pages
    users = 1 if sharp else rng.randint(1, 4)
    weights = choose([[1.0], [0.5, 1.0, 2.0]]) if not sharp else [1.0]
    least, output = (1, choose([2, 10, 60])) if not sharp else (200, 400)
    longest = 8 if sharp else choose([8, capacity // 4, capacity // 2])
    passers = sharp and rng.random() < 0.5  # they ask for little, and come all the time
    most = max_num_seqs + rng.randint(1, 4 + 4 * passers) if sharp else rng.randint(2, 24)
    rate, stem = choose([0.1, 0.5, 1.0]), [rng.randrange(8) for _ in range(capacity)]
    burst = rng.random() < 0.3

    def add() -> None:
        prompt = rng.randint(1, longest)
        shared = stem[: prompt - 1] if rng.random() < 0.3 else []
        tokens = min(rng.randint(least, max(least, output)), capacity - prompt)
        if passers and len(history.live) >= 2:
            tokens = rng.randint(1, 4)
        history.add(
            shared + [rng.randrange(10**6) for _ in range(prompt - len(shared))], tokens,
            samples=choose([1, 1, 1, 1, 3]) if not sharp else 1,
            user=str(rng.randrange(users)), weight=choose(weights),
        )

    while burst and len(history.live) < most:
        add()
    for _ in range(2 * STEPS if sharp else STEPS):
        for _ in range(3 if passers else not burst):
            if len(history.live) < most and rng.random() < rate:
                add()
        if history.live:
            history.step()
        if history.live and rng.random() < 0.01 and not sharp:
            history.abort(rng.choice(list(history.live)))
    history.close()
    return history


@pytest.mark.parametrize("part", range(PARTS))
def test_nobody_waits_longer_than_the_bound(part: int) -> None:
    violations = {
        seed: worst for seed in range(part, HISTORIES, PARTS)
        if (worst := max(gap.steps / gap.bound for gap in random_history(seed).gaps)) > 1
    }
    assert not violations


@pytest.mark.parametrize("seed", [65, 75, 126, 135, 145])
def test_whoever_is_admitted_gets_a_token_before_it_gives_way(seed: int) -> None:
    assert random_history(seed).in_vain == 0


@pytest.mark.parametrize("host_slots", [0, 2000])
def test_what_ran_while_nobody_waited_is_no_claim(host_slots: int) -> None:
    history = History(
        Machine(
            num_pages=260, max_num_seqs=10, max_step_tokens=600, host_slots=host_slots,
            switch_share=0.1 if host_slots else 1.0,
        ),
        Fair(FairConfig(SliceConfig(4))),
    )
    for _ in range(2):
        history.add(4, 1000)
    # Brief ones come and go beside them, until the two have grown and fill the pool.
    while history.scheduler.counters.preemptions == 0:
        while len(history.live) < 10:
            history.add(4, 2)
        history.step()
    history.gaps.clear()
    for _ in range(500):
        while len(history.live) < 8:
            history.add(4, 2)
        history.step()
    assert all(gap.steps <= gap.bound for gap in history.all_gaps())
    assert max(gap.steps for gap in history.all_gaps()) <= 60  # it was the rest of the run
    history.close()


def test_the_bound_knows_what_the_guard_withholds() -> None:
    def longest(share: float) -> tuple[float, float]:
        history = History(
            Machine(num_pages=200, max_num_seqs=1, max_step_tokens=200, switch_share=share),
            Fair(FairConfig(SliceConfig(4))),
        )
        for _ in range(3):
            history.add(100, 300)
        while history.live:
            history.step()
        assert all(gap.steps <= gap.bound for gap in history.gaps)
        worst = max(history.gaps, key=lambda gap: gap.steps)
        history.close()
        return worst.steps, worst.bound

    (free, bound), (withheld, _) = longest(1.0), longest(0.01)
    assert free <= bound < withheld


@pytest.mark.parametrize("users", [1, 2])
def test_without_slices_nothing_is_promised(users: int) -> None:
    history = History(
        Machine(num_pages=40, max_num_seqs=4, max_step_tokens=16),
        Fair(FairConfig(SliceConfig(math.inf))),
    )
    for number in range(4):
        history.add(4, 20, user=str(number % users))
    assert history.state_bound() == math.inf
    history.close()
