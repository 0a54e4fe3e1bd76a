"""Step costs: the roofline's arithmetic, the fit of a line."""

from __future__ import annotations

import dataclasses
import random

import pytest

from aqua_jax.errors import ConfigError
from aqua_jax.simulation.cost import Line, ModelShape, Roofline, Varied
from aqua_jax.simulation.fit import fit_line
from aqua_jax.simulation.models import MODELS, model_named
from aqua_jax.simulation.work import Work

SHAPE = ModelShape(
    layer_flops=2000.0, head_flops=500.0, attention_flops=10.0, weight_bytes=10_000, kv_bytes=100,
    hidden=8, layers=3,
)


def test_shape_of_a_known_model() -> None:
    shape = ModelShape.of(MODELS["34b"])
    assert shape.kv_bytes == 2 * 48 * 8 * 128 * 2
    assert shape.weight_bytes == pytest.approx(67.5e9, rel=0.01)
    assert shape.layer_flops + 2 * shape.head_flops == 2.0 * MODELS["34b"].num_parameters
    with pytest.raises(ConfigError, match="model"):
        model_named("5b")


def test_decodes_are_bound_by_bytes_and_prompts_by_arithmetic() -> None:
    cost = Roofline(SHAPE, flops_per_s=1e6, bytes_per_s=1e5, step_s=0.5)
    decode = Work(decodes=1, decode_context=20, sampled=1)
    assert cost.seconds(decode) == 0.5 + (10_000 + 100 * 20) / 1e5
    prefill = Work(prefill_tokens=100, prefill_context=5050, prefill_reads=100, sampled=1)
    assert cost.seconds(prefill) == 0.5 + (2000 * 100 + 500 + 10 * 5050) / 1e6
    moved = decode._replace(moved_bytes=1000)
    assert cost.seconds(moved) - cost.seconds(decode) == pytest.approx(1000 / 1e5)


def test_devices_share_products_and_pay_for_sums() -> None:
    one = Roofline(SHAPE, 1e6, 1e5, step_s=0.0)
    two = dataclasses.replace(one, devices=2, all_reduce_s=0.01, all_reduce_bytes_per_s=1e4)
    work = Work(decodes=2, decode_context=30, sampled=2)
    sums = 2 * 3 * (0.01 + 2 * 8 * 2 / 1e4)
    assert two.seconds(work) == pytest.approx(one.seconds(work) / 2 + sums)


def _steps(line: Line, rng: random.Random, count: int, noise: float) -> list[tuple[Work, float]]:
    steps = []
    for _ in range(count):
        decodes, prompts = rng.randrange(64), rng.choice([0, 0, 100, 500])
        if not decodes + prompts:
            continue
        work = Work(
            prompts, decodes, decodes * rng.randrange(1, 900), prompts * rng.randrange(1, 900),
        )
        steps.append((work, line.seconds(work) * rng.uniform(1 - noise, 1 + noise)))
    return steps


LINE = Line(8e-3, 1.3e-4, 2e-4, 4e-7, 1e-7)


def test_a_line_is_found_again() -> None:
    fit = fit_line(_steps(LINE, random.Random(1), 200, 0.0))
    for field in dataclasses.fields(Line):
        assert getattr(fit.line, field.name) == pytest.approx(getattr(LINE, field.name), rel=1e-6)
    assert fit.error_p90 < 1e-6


def test_outliers_and_noise_are_no_matter() -> None:
    rng = random.Random(2)
    steps = _steps(LINE, rng, 400, 0.05)
    held_up = [(w, s * (5.0 if rng.random() < 0.05 else 1.0)) for w, s in steps]
    line = fit_line(held_up).line
    for work, _ in steps:
        assert line.seconds(work) == pytest.approx(LINE.seconds(work), rel=0.05)


def test_coefficients_are_never_negative() -> None:
    # Longer contexts are faster here, which no machine is: the best line ignores the context.
    steps = [
        (Work(decodes=n, decode_context=c), 0.01 + n * 1e-3 - c * 1e-6)
        for n in (1, 5, 9, 20) for c in (100, 300, 900)
    ]
    line = fit_line(steps).line
    assert line.decode_context_s == 0.0 and min(dataclasses.astuple(line)) >= 0.0
    assert line.seconds(Work(decodes=5, decode_context=300)) == pytest.approx(0.0147, rel=0.02)


def test_bad_steps_and_lines_are_refused() -> None:
    with pytest.raises(ConfigError, match="different"):
        fit_line([(Work(decodes=1, decode_context=5), 0.1)] * 50)
    with pytest.raises(ConfigError, match="above 0"):
        fit_line([(Work(decodes=n, decode_context=n), 0.0) for n in range(1, 9)])
    for bad in (-1.0, float("nan"), float("inf"), "1", True):
        with pytest.raises(ConfigError, match="decode_s"):
            Line(1.0, decode_s=bad)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="coefficient"):
        Line(0.0)


def test_steps_vary_as_recorded_ones_did() -> None:
    work, ratios = Work(decodes=4, decode_context=90), [0.9, 1.0, 1.0, 1.5]
    draws = [one.seconds(work) for one in [Varied(LINE, ratios, 3)] for _ in range(2000)]
    again = [one.seconds(work) for one in [Varied(LINE, ratios, 3)] for _ in range(2000)]
    assert draws == again != [one.seconds(work) for one in [Varied(LINE, ratios, 4)]
                              for _ in range(2000)]
    shares = [sum(draw == pytest.approx(ratio * LINE.seconds(work)) for draw in draws) / 2000
              for ratio in (0.9, 1.0, 1.5)]
    assert shares == pytest.approx([0.25, 0.5, 0.25], abs=0.04)
    for bad in ([], [1.0, 0.0], [float("inf")]):
        with pytest.raises(ConfigError, match="ratios"):
            Varied(LINE, bad, 0)
