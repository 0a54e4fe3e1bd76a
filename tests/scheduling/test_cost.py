"""Prices follow what was measured, and the fate of whoever gives way follows prices."""

from __future__ import annotations

import pytest

from aqua_jax.errors import ConfigError
from aqua_jax.scheduling.cost import CostConfig, Costs
from aqua_jax.scheduling.fair import Fair, FairConfig
from aqua_jax.scheduling.slices import SliceConfig
from tests.scheduling.histories import PAGE_TOKENS, History, Machine

STEP_S, DECODES = 0.02, 10  # a decode token: 2 ms
DECODE_S = STEP_S / DECODES


def measured(prefill_s: float, page_s: float, **config) -> Costs:
    """Costs after steps and copies that took so long, for a prompt token and for a page."""
    costs = Costs(PAGE_TOKENS, CostConfig(**config))
    teach(costs, prefill_s, page_s)
    return costs


def teach(costs: Costs, prefill_s: float, page_s: float) -> None:
    for _ in range(200):
        costs.observe_step(0, DECODES, STEP_S)
        costs.observe_step(100, DECODES, STEP_S + 100 * prefill_s)
        costs.observe_moves(8.0, 8 * page_s)


def test_prices_are_assumed_until_they_are_measured() -> None:
    config = CostConfig(prefill_tokens=0.3, moved_page=0.7, page_s=1e-3, transit_steps=4)
    costs = Costs(PAGE_TOKENS, config)
    assert (costs.prefill, costs.page, costs.switch_steps) == (0.3, 0.7, 4)
    costs.observe_step(0, DECODES, STEP_S)  # now a page's seconds can be compared with something
    assert costs.prefill == 0.3 and costs.page == pytest.approx(0.5 * 1e-3 / DECODE_S)
    costs.observe_return(9)
    assert costs.switch_steps == 9


def test_prices_are_in_decode_tokens() -> None:
    costs = measured(prefill_s=1e-4, page_s=4e-3, interference=0.25)
    assert costs.prefill == pytest.approx(1e-4 / DECODE_S)
    assert costs.page == pytest.approx(0.25 * 4e-3 / DECODE_S)
    assert costs.recompute(40) == pytest.approx(40 * costs.prefill)
    # Out what isn't there yet, back everything.
    assert costs.swap(40, 8) == pytest.approx(48 / PAGE_TOKENS * costs.page)


def test_steps_that_tell_nothing_are_left_out() -> None:
    costs = measured(prefill_s=1e-4, page_s=4e-3)
    before = costs.prefill, costs.page
    costs.observe_step(0, DECODES, 0.0)
    costs.observe_step(2, DECODES, 9.0)  # two prompt tokens
    costs.observe_step(100, DECODES, STEP_S / 2)  # faster than its decodes alone
    costs.observe_moves(0.0, 1.0)
    assert (costs.prefill, costs.page) == before


def test_a_copy_that_was_held_up_says_little_about_pages() -> None:
    costs = measured(prefill_s=1e-4, page_s=1e-4)
    before = costs.page
    costs.observe_moves(1.0, 0.1)  # a thousand times as long
    assert before < costs.page < 1.2 * before


def test_means_follow_a_machine_that_changes() -> None:
    costs = measured(prefill_s=1e-4, page_s=4e-3)
    old = costs.page
    teach(costs, 1e-4, 8e-3)
    assert costs.page == pytest.approx(2 * old, rel=1e-3)


def test_a_lenders_pace_makes_copies_dearer() -> None:
    costs = measured(prefill_s=1e-4, page_s=1e-6)
    assert costs.swap(40, 0) < costs.recompute(40)
    costs.delay_moves(0.05)  # a place in the batch is empty for so long
    assert costs.swap(40, 0) > costs.recompute(40)
    costs.delay_moves(0.0)
    assert costs.swap(40, 0) < costs.recompute(40)


def test_as_many_pages_as_fit_into_a_share_of_a_step() -> None:
    costs = measured(prefill_s=1e-4, page_s=1e-3)
    assert costs.pages_within(0.5) == 10
    assert costs.patience_s == pytest.approx(STEP_S / 4)


@pytest.mark.parametrize(
    ("prefill_s", "page_s", "kept"), [(1e-3, 1e-5, True), (1e-6, 1e-2, False)]
)
def test_whoever_gives_way_is_copied_or_computed_again_as_is_cheaper(
    prefill_s: float, page_s: float, kept: bool
) -> None:
    history = History(
        Machine(num_pages=40, max_num_seqs=3, max_step_tokens=32, host_slots=200),
        Fair(FairConfig(SliceConfig(4))),
    )
    teach(history.scheduler.costs, prefill_s, page_s)
    for _ in range(8):
        history.add(12, 40)
    for _ in range(150):
        history.step()
    counters, residency = history.scheduler.counters, history.residency
    assert residency is not None and counters.preemptions > 10
    assert counters.swaps == (counters.preemptions if kept else 0)
    assert (counters.recomputed_tokens == 0) == kept
    assert (residency.counters.tokens_in > 0) == kept
    history.close()


def test_a_machine_that_changes_its_mind_changes_fates() -> None:
    history = History(
        Machine(num_pages=60, max_num_seqs=3, max_step_tokens=32, host_slots=200),
        Fair(FairConfig(SliceConfig(4))),
    )
    costs, counters = history.scheduler.costs, history.scheduler.counters
    for _ in range(12):
        history.add(12, 200)
    fates = []
    for prefill_s, page_s in [(1e-6, 1e-2), (1e-3, 1e-5), (1e-6, 1e-2)]:
        teach(costs, prefill_s, page_s)
        swaps, preemptions = counters.swaps, counters.preemptions
        for _ in range(100):
            history.step()
        fates.append((counters.swaps - swaps) / (counters.preemptions - preemptions))
    assert fates[0] == 0 and fates[1] == 1 and fates[2] < 0.2
    history.close()


@pytest.mark.parametrize(("field", "value"), [
    ("prefill_tokens", 0.0), ("moved_page", -1.0), ("page_s", -1e-9), ("interference", 1.5),
    ("transit_steps", float("inf")),
])
def test_assumptions_are_checked(field: str, value: float) -> None:
    with pytest.raises(ConfigError) as caught:
        CostConfig(**{field: value})
    assert caught.value.field == field
