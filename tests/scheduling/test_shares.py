"""Users' shares of the service where pages are copied to a store and back."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

import pytest

from aqua_jax.scheduling.fair import Fair, FairConfig
from aqua_jax.scheduling.sequence import Sequence
from aqua_jax.scheduling.slices import SliceConfig
from tests.scale import at_scale
from tests.scheduling.histories import History, Machine


def jain(values: list[float]) -> float:
    """1 where all are equal, 1 / n where one has everything."""
    return sum(values) ** 2 / (len(values) * sum(value * value for value in values))


def count_service(policy: Fair) -> collections.Counter[str]:
    """Service by user from now on, as the policy prices it: prompts, decodes and copies."""
    service: collections.Counter[str] = collections.Counter()
    original, config = policy.on_service, policy.config

    def counting(sequence: Sequence, *, tokens: int = 0, price: float = 0.0) -> None:
        prefill = min(tokens, policy._accounts[sequence].prefill_left)
        decodes = tokens - prefill + price
        service[sequence.user] += policy.prefill_cost * prefill + config.decode_cost * decodes
        original(sequence, tokens=tokens, price=price)

    policy.on_service = counting  # type: ignore[method-assign]
    return service


@dataclasses.dataclass(frozen=True)
class Case:
    """Requests that each user has all the time, their prompts, and what slices and copies cost."""

    counts: tuple[int, int, int]
    prompts: tuple[int, int, int]
    output: int  # at least, and less than twice that
    slice_steps: int
    page_price: float
    switch_share: float


CASES = [
    Case((3, 2, 2), (8, 8, 14), 6, 4, 0.5, 1.0),
    Case((8, 3, 4), (8, 8, 8), 20, 5, 1e-3, 0.1),
    Case((8, 3, 4), (8, 8, 40), 20, 5, 0.5, 1.0),
][: at_scale(1, 3)]


@pytest.mark.parametrize("case", CASES)
def test_equally_backlogged_users_get_equal_service(case: Case) -> None:
    policy = Fair(FairConfig(SliceConfig(case.slice_steps), prefill_cost=0.5))
    history = History(Machine(
        num_pages=60, max_num_seqs=3, max_step_tokens=64, host_slots=2000,
        page_price=case.page_price, switch_share=case.switch_share,
    ), policy)
    history.state_every = 10  # steps; the load is much the same all the time
    users = {name: (case.counts[i], case.prompts[i]) for i, name in enumerate("abc")}

    def refill() -> None:
        live = collections.Counter(sequence.user for sequence in history.live)
        for user, (count, prompt) in users.items():
            for _ in range(count - live[user]):
                history.add(prompt, case.output + history.rng.randrange(case.output), user=user)

    refill()
    service = count_service(policy)
    window = 20 * int(history.state_bound())
    for _ in range(at_scale(1, 5)):
        service.clear()
        for _ in range(window):
            before = len(history.live)
            history.step()
            if len(history.live) < before:
                refill()
        assert jain([service[user] for user in users]) >= 0.99
    assert history.scheduler.counters.swaps > window / 100
    assert all(gap.steps <= gap.bound for gap in history.all_gaps())
    history.close()


@pytest.mark.parametrize("host_slots", [0, 20_000])
def test_one_request_among_anothers_thousand_is_served_within_its_bound(host_slots: int) -> None:
    history = History(
        Machine(
            num_pages=80, max_num_seqs=4, max_step_tokens=64, host_slots=host_slots,
            switch_share=0.15 if host_slots else 1.0,  # where turns are dear, it waits for an end
        ),
        Fair(FairConfig(SliceConfig(8))),
    )
    with_it: Any = {"user": "crowd"}
    for _ in range(1000):
        history.add(8, 60, **with_it)
    for _ in range(100):
        history.step()
    (one,) = history.add(8, 40, user="one")
    bound, sent = history.state_bound(), history.now
    while not history.tokens[one]:
        history.step()
    # In fact the first place that comes free: a slice, and a copy's time.
    assert history.now - sent <= min(bound, 2 * (8 + 2 + 3 * bool(host_slots)))
    while one in history.live:
        history.step()
    assert all(gap.steps <= gap.bound for gap in history.gaps if gap.sequence is one)
    history.close()
