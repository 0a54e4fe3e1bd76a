"""Rotary embedding against its formulas in float64, and the rule for dynamic lengths."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

from aqua_jax.models import rope
from aqua_jax.models.config import ModelConfig, RopeScaling
from aqua_jax.ops.projection import rotate

D = 16
CONFIG = ModelConfig(
    family="llama", vocab_size=8, hidden_size=16, intermediate_size=8, num_layers=1, num_heads=1,
    num_kv_heads=1, head_dim=D, max_position=32, rope_theta=1000.0,
)  # fmt: skip


def _scaled(**fields: object) -> ModelConfig:
    return dataclasses.replace(CONFIG, rope_scaling=RopeScaling(**fields))  # type: ignore[arg-type]


def _plain_rates(theta: float = 1000.0) -> np.ndarray:
    return theta ** (-np.arange(0, D, 2) / D)


def test_plain_rates() -> None:
    rates = rope.inverse_frequencies(CONFIG)
    assert rates.dtype == np.float32
    np.testing.assert_allclose(rates, _plain_rates(), rtol=2e-7)


def test_linear_divides_positions() -> None:
    config = _scaled(kind="linear", factor=4.0)
    np.testing.assert_allclose(rope.inverse_frequencies(config), _plain_rates() / 4, rtol=2e-7)


def test_llama3_bands() -> None:
    config = _scaled(kind="llama3", factor=8.0, low_freq_factor=0.5, high_freq_factor=2.0)
    bands = set()
    for rate, plain in zip(rope.inverse_frequencies(config), _plain_rates(), strict=True):
        wavelength = 2 * math.pi / plain
        if wavelength < 32 / 2.0:
            expected, band = plain, "kept"
        elif wavelength > 32 / 0.5:
            expected, band = plain / 8, "divided"
        else:
            share = (32 / wavelength - 0.5) / (2.0 - 0.5)
            expected, band = (1 - share) * plain / 8 + share * plain, "between"
        bands.add(band)
        assert rate == pytest.approx(expected, rel=1e-6)
    assert bands == {"kept", "between", "divided"}


@pytest.mark.parametrize("truncate", [True, False])
def test_yarn_ramp(truncate: bool) -> None:
    config = _scaled(
        kind="yarn", factor=4.0, beta_fast=3.0, beta_slow=0.25, truncate=truncate,
        original_max_position=30,
    )  # fmt: skip

    def dimension(turns: float) -> float:
        return D * math.log(30 / (turns * 2 * math.pi)) / (2 * math.log(1000.0))

    low, high = dimension(3.0), dimension(0.25)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, D - 1)
    assert 0 <= low < high < D // 2
    ramp = np.clip((np.arange(D // 2) - low) / (high - low), 0, 1)
    expected = _plain_rates() * (ramp / 4 + 1 - ramp)
    np.testing.assert_allclose(rope.inverse_frequencies(config), expected, rtol=1e-6)
    assert ramp.min() == 0 and ramp.max() == 1


def test_yarn_range_of_no_width() -> None:
    config = _scaled(kind="yarn", factor=4.0, beta_fast=2.0, beta_slow=2.0, truncate=False)
    rates = rope.inverse_frequencies(config)
    ratios = rates / _plain_rates()
    assert set(np.round(ratios, 5)) == {1.0, 0.25}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"kind": "none"}, 1.0),
        ({"kind": "llama3", "factor": 8.0}, 1.0),
        ({"kind": "yarn", "factor": 4.0}, 0.1 * math.log(4) + 1),
        ({"kind": "yarn", "factor": 1.0}, 1.0),
        ({"kind": "yarn", "factor": 4.0, "attention_factor": 0.7}, 0.7),
        ({"kind": "yarn", "factor": 4.0, "mscale": 2.0}, 0.1 * math.log(4) + 1),
        ({"kind": "yarn", "factor": 4.0, "mscale": 2.0, "mscale_all_dim": 0.5},
         (0.2 * math.log(4) + 1) / (0.05 * math.log(4) + 1)),
    ],
)  # fmt: skip
def test_attention_scale(fields: dict[str, object], expected: float) -> None:
    config = _scaled(**fields)
    assert rope.attention_scale(config) == pytest.approx(expected, rel=1e-12)
    cos, sin = rope.cos_sin(config, jnp.arange(3))
    np.testing.assert_allclose(cos**2 + sin**2, expected**2, rtol=1e-5)


def test_angles() -> None:
    positions = jnp.array([0, 5, 31, 2])
    cos, sin = rope.cos_sin(CONFIG, positions)
    angles = np.asarray(positions)[:, None] * _plain_rates()
    np.testing.assert_allclose(cos, np.cos(angles), atol=1e-5)
    np.testing.assert_allclose(sin, np.sin(angles), atol=1e-5)
    # Prompt lengths matter to dynamic scaling only.
    again = rope.cos_sin(CONFIG, positions, jnp.full(4, 100))
    np.testing.assert_array_equal(cos, again[0])


def _dynamic_angles(position: int, length: int) -> np.ndarray:
    factor = 3.0
    stretch = factor * max(length, 32) / 32 - (factor - 1)
    return position * _plain_rates(1000.0 * stretch ** (D / (D - 2)))


@pytest.mark.parametrize("prompt", [1, 20, 32, 33, 70])
def test_dynamic_base_follows_prompt_then_position(prompt: int) -> None:
    config = _scaled(kind="dynamic", factor=3.0)
    positions = np.arange(90)
    cos, _ = rope.cos_sin(config, jnp.asarray(positions), jnp.full(90, prompt))
    expected = [np.cos(_dynamic_angles(p, max(prompt, p + 1))) for p in positions]
    np.testing.assert_allclose(cos, np.stack(expected), atol=5e-5)
    # Nothing changes within the trained context, to the last bit.
    if prompt <= 32:
        plain, _ = rope.cos_sin(CONFIG, jnp.asarray(positions))
        np.testing.assert_array_equal(cos[:32], plain[:32])
        assert not np.array_equal(cos[33:], plain[33:])


def test_dynamic_token_does_not_depend_on_its_chunk() -> None:
    config = _scaled(kind="dynamic", factor=3.0)
    whole = rope.cos_sin(config, jnp.arange(60), jnp.full(60, 50))
    part = rope.cos_sin(config, jnp.arange(17, 23), jnp.full(6, 50))
    np.testing.assert_array_equal(whole[0][17:23], part[0])


def test_rotate_turns_half_split_pairs() -> None:
    x = np.random.default_rng(0).standard_normal((3, 2, D)).astype(np.float32)
    positions = np.array([0, 4, 9])
    out = np.asarray(rotate(jnp.asarray(x), *rope.cos_sin(CONFIG, jnp.asarray(positions))))
    points = x[..., : D // 2] + 1j * x[..., D // 2 :]
    turned = points * np.exp(1j * positions[:, None, None] * _plain_rates())
    np.testing.assert_allclose(out[..., : D // 2], turned.real, atol=1e-5)
    np.testing.assert_allclose(out[..., D // 2 :], turned.imag, atol=1e-5)


def test_scores_depend_on_distance_only() -> None:
    rng = np.random.default_rng(1)
    q, k = (jnp.asarray(rng.standard_normal((1, 1, D)), jnp.float32) for _ in range(2))

    def score(query: int, key: int) -> float:
        turned_q = rotate(q, *rope.cos_sin(CONFIG, jnp.array([query])))
        turned_k = rotate(k, *rope.cos_sin(CONFIG, jnp.array([key])))
        return float(jnp.sum(turned_q * turned_k))

    assert score(9, 2) == pytest.approx(score(107, 100), abs=1e-3)
    assert abs(score(9, 2) - score(9, 5)) > 1e-2
