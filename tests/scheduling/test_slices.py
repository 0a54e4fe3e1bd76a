"""The length of slices, without a scheduler; what configurations are refused."""

import pytest

from aqua_jax.errors import ConfigError
from aqua_jax.scheduling.fair import FairConfig
from aqua_jax.scheduling.slices import SliceConfig, Slices


def test_fixed_slices_stay():
    slices = Slices(SliceConfig(7))
    for step in range(50):
        slices.observe(0.1 * step, live=100, running=2)
    assert slices.steps == 7


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
