"""What the informer promises, over random loads and clocks."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aqua_jax.errors import ConfigError
from aqua_jax.memory.informer import Informer, InformerConfig, Load
from tests.scale import scaled

configs = st.builds(
    lambda capacity, reserve, per, step, hold, horizon: InformerConfig(
        capacity, min(reserve, capacity), per, step, hold, horizon
    ),
    st.integers(1, 1000), st.integers(0, 1000), st.integers(0, 50), st.sampled_from([1, 7, 64]),
    st.sampled_from([0.0, 1.0, 10.0]), st.sampled_from([0.0, 2.0]),
)
# Seconds since the last decision, units in use, requests waiting, requests come.
moments = st.lists(
    st.tuples(
        st.sampled_from([0.0, 0.1, 0.9, 3.0, 20.0]), st.integers(0, 1200), st.integers(0, 30),
        st.integers(0, 9),
    ),
    min_size=1, max_size=60,
)


def run(config, steps):
    """Yields (time, load, informer, lent before, lent) for each moment."""
    informer, now, arrived, before = Informer(config), 100.0, 0, 0
    for passed, used, queue, came in steps:
        now, arrived = now + passed, arrived + came
        load = Load(used, queue, arrived)
        lent = informer.decide(now, load)
        yield now, load, informer, before, lent
        before = lent


@settings(max_examples=scaled(150), deadline=None)
@given(configs, moments)
def test_the_reserve_and_the_need_are_never_lent(config, steps):
    for _, load, informer, _, lent in run(config, steps):
        assert 0 <= lent <= config.capacity - config.reserve
        assert lent % config.step == 0
        own = config.capacity - lent
        wanted = config.reserve + load.used + load.queue * config.per_request
        # Met within this very decision, however fast queue or use have grown.
        assert own >= min(config.capacity, wanted)
        assert informer.need(load) >= wanted


@settings(max_examples=scaled(150), deadline=None)
@given(configs, moments)
def test_it_never_swings_faster_than_its_hold_time(config, steps):
    taken_back = None
    for now, _, _, before, lent in run(config, steps):
        if lent < before:
            taken_back = now
        if lent > before and taken_back is not None:
            assert now - taken_back > config.hold_s or config.hold_s == 0


@settings(max_examples=scaled(100), deadline=None)
@given(configs, moments, st.integers(1, 40))
def test_a_growing_queue_takes_memory_back_within_one_decision(config, steps, more):
    *_, (now, load, informer, _, lent) = run(config, steps)
    grown = Load(load.used, load.queue + more, load.arrived + more)
    fewer = informer.decide(now, grown)
    assert fewer <= lent
    short = config.reserve + grown.used + grown.queue * config.per_request - (
        config.capacity - lent
    )
    if short > 0:
        assert fewer <= max(0, lent - short)


@settings(max_examples=scaled(100), deadline=None)
@given(configs, moments)
def test_a_calm_model_lends_all_it_can_spare_after_the_hold_time(config, steps):
    *_, (now, load, informer, _, _) = run(config, steps)
    calm = Load(3, 0, load.arrived)
    for passed in range(1, 400):
        lent = informer.decide(now + passed * max(config.hold_s, 0.5) / 5, calm)
    spare = max(0, config.capacity - informer.need(calm))
    assert lent == spare // config.step * config.step


def test_the_rate_is_that_of_steady_arrivals():
    informer = Informer(InformerConfig(1000, per_request=10, horizon_s=2.0, hold_s=0.0))
    for second in range(200):
        lent = informer.decide(second, Load(100, 0, 4 * second))
    assert informer.rate == pytest.approx(4.0, rel=1e-6)
    assert lent == 1000 - 100 - 80, "what comes within two seconds is kept free"
    # Several counts at one moment aren't lost.
    informer.decide(199, Load(100, 0, 900))
    informer.decide(200, Load(100, 0, 900))
    assert informer.rate > 4.0


def test_nothing_is_lent_before_the_load_has_been_watched():
    informer = Informer(InformerConfig(100, hold_s=5.0))
    assert [informer.decide(now, Load(0)) for now in (0, 4.9, 5.0)] == [0, 0, 100]


def test_what_cannot_be_is_refused():
    for wrong in (
        {"capacity": 0}, {"reserve": 11}, {"reserve": -1}, {"per_request": -1}, {"step": 0},
        {"hold_s": -1.0}, {"horizon_s": float("nan")}, {"rate_s": 0.0},
    ):
        with pytest.raises(ConfigError):
            InformerConfig(**({"capacity": 10} | wrong))
    informer = Informer(InformerConfig(10))
    informer.decide(5.0, Load(0, 0, 3))
    for now, load in ((4.0, Load(0, 0, 3)), (6.0, Load(0, 0, 2)), (6.0, Load(-1, 0, 3))):
        with pytest.raises(ConfigError):
            informer.decide(now, load)
