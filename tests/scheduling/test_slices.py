"""The length of slices and the guard, without a scheduler; what configurations are refused."""

import math

import pytest

from aqua_jax.errors import ConfigError
from aqua_jax.scheduling.fair import FairConfig
from aqua_jax.scheduling.slices import SliceConfig, Slices


def test_fixed_slices_stay_and_are_not_guarded():
    slices = Slices(SliceConfig(7))
    for step in range(50):
        slices.observe(0.1 * step, live=100, running=2)
    assert (slices.steps, slices.growth_steps) == (7, 7)
    slices.spend(10**6)
    assert slices.affords(10**6)
    assert slices.growth_steps == 7


def test_infinite_slices_ask_for_no_room():
    assert Slices(SliceConfig(math.inf)).growth_steps == 0


def test_switches_are_paid_by_other_tokens():
    slices = Slices(SliceConfig(recompute_share=0.2))
    assert not slices.affords(1)
    slices.earn(400)
    assert slices.affords(100)
    assert not slices.affords(101)
    slices.spend(100)
    assert not slices.affords(1)
    slices.spend(-60)  # the prefix cache still had them
    assert slices.affords(60)


def test_savings_have_an_end():
    slices = Slices(SliceConfig(recompute_share=0.5))
    slices.earn(10**9)
    assert slices.affords(100_000)
    assert not slices.affords(100_001)


def test_an_overdrawn_budget_makes_admissions_leave_more_room():
    slices = Slices(SliceConfig(min_slice_steps=16, max_slice_steps=256))
    assert slices.growth_steps == 16
    slices.spend(10)
    assert slices.growth_steps == 256
    slices.earn(40)
    assert slices.growth_steps == 16


def test_pauses_are_not_steps():
    slices = Slices(SliceConfig(tbt_slo_s=1.0))
    now = 0.0
    for _ in range(50):
        now += 0.01
        slices.observe(now, live=12, running=4)
    before = slices.steps
    assert before == pytest.approx(50, abs=1)
    slices.observe(now + 3600.0, live=12, running=4)
    assert slices.steps == before


@pytest.mark.parametrize(
    "make, field",
    [
        (lambda: SliceConfig(0), "slice_steps"), (lambda: SliceConfig("short"), "slice_steps"),
        (lambda: SliceConfig(tbt_slo_s=-1.0), "tbt_slo_s"),
        (lambda: SliceConfig(recompute_share=1.0), "recompute_share"),
        (lambda: SliceConfig(min_slice_steps=9, max_slice_steps=8), "min_slice_steps"),
        (lambda: FairConfig(prefill_cost=0.0), "prefill_cost"),
        (lambda: FairConfig(credit_share=1.0), "credit_share"),
        (lambda: FairConfig(user_weights={"a": 0.0}), "user_weights"),
    ],
)
def test_configurations_are_checked(make, field) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    assert caught.value.field == field
