"""SwiGLU and the fused gated MLP."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from aqua_jax.ops.activation import gated_mlp, swiglu
from aqua_jax.ops.linear import linear, pack
from tests.ops import matmul_data as data

IMPLEMENTATIONS = ("ffi", "xla")


@pytest.fixture(params=data.instruction_sets())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every instruction set of this processor in turn."""
    monkeypatch.setenv("AQUA_ISA", request.param)
    return request.param


@pytest.mark.parametrize("dtype", data.DTYPES)
def test_swiglu(isa: str, dtype: type) -> None:
    for t, f in ((1, 1), (3, 77), (40, 300), (5, 1024)):
        gate_up = data.normal(t, t, 2 * f) * 10
        gate_up[0, 0], gate_up[-1, f - 1] = 200, -200  # exp overflows f32 beyond 88.7
        expected = data.swiglu(gate_up)
        for implementation in IMPLEMENTATIONS:
            out = swiglu(jnp.asarray(gate_up), None, dtype, implementation=implementation)
            assert out.shape == (t, f) and out.dtype == dtype
            relative = 2**-8 if dtype == jnp.bfloat16 else 2e-6
            np.testing.assert_allclose(
                np.asarray(out).astype(np.float64), expected, rtol=relative, atol=1e-6
            )


def test_swiglu_keeps_nan_where_it_is(isa: str) -> None:
    gate_up = data.normal(0, 2, 80)
    gate_up[1, 3] = np.nan
    out = np.asarray(swiglu(jnp.asarray(gate_up), implementation="ffi"))
    assert np.isnan(out[1, 3]) and np.isnan(out).sum() == 1


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", data.DTYPES)
def test_swiglu_rows_beyond_the_valid_ones_are_zero(implementation: str, dtype: type) -> None:
    gate_up = data.normal(0, 9, 60)
    whole = np.asarray(swiglu(jnp.asarray(gate_up), None, dtype, implementation=implementation))
    gate_up[4:] = np.nan
    for valid in (0, 4, 1):
        rows = jnp.array([valid], jnp.int32)
        out = swiglu(jnp.asarray(gate_up), rows, dtype, implementation=implementation)
        np.testing.assert_array_equal(np.asarray(out)[:valid], whole[:valid])
        assert not np.asarray(out)[valid:].any()


def test_swiglu_misuse_is_an_error() -> None:
    with pytest.raises(ValueError, match="2F"):
        swiglu(jnp.zeros((2, 3)))
    with pytest.raises(ValueError, match="f32"):
        swiglu(jnp.zeros((2, 4), jnp.bfloat16), implementation="ffi")


def mlp_case(t: int, d: int, f: int, dtype: type) -> tuple[dict[str, Any], np.ndarray]:
    """Arguments of gated_mlp and the f64 result over weights rounded to dtype."""
    x, gate_up = data.normal(0, t, d), data.normal(1, d, 2 * f) / np.sqrt(d)
    down, scale = data.normal(2, f, d) / np.sqrt(f), data.normal(3, d)
    gate_up_bias, down_bias = data.normal(4, 2 * f), data.normal(5, d)
    residual = data.normal(6, t, d)
    wide = data.rms_norm(x, scale, 1e-5) @ data.rounded(gate_up, dtype) + gate_up_bias
    expected = data.swiglu(wide) @ data.rounded(down, dtype) + down_bias + residual
    arguments = {
        "x": jnp.asarray(x), "gate_up": jnp.asarray(pack(gate_up, dtype)),
        "down": jnp.asarray(pack(down, dtype)), "features": d, "hidden": f,
        "gate_up_bias": jnp.asarray(gate_up_bias), "down_bias": jnp.asarray(down_bias),
        "norm": (jnp.asarray(scale), 1e-5), "residual": jnp.asarray(residual),
    }  # fmt: skip
    return arguments, expected


@pytest.mark.parametrize("dtype", data.DTYPES)
def test_gated_mlp(isa: str, dtype: type) -> None:
    for t, d, f in ((1, 70, 64), (37, 96, 192), (100, 64, 128)):
        arguments, expected = mlp_case(t, d, f, dtype)
        bound = 0.02 if dtype == jnp.bfloat16 else 1e-5
        for implementation in IMPLEMENTATIONS:
            out = gated_mlp(**arguments, implementation=implementation)
            assert np.max(np.abs(np.asarray(out) - expected)) < bound * np.max(np.abs(expected))


@pytest.mark.parametrize("dtype", data.DTYPES)
def test_gated_mlp_is_its_parts_bit_for_bit(isa: str, dtype: type) -> None:
    arguments, _ = mlp_case(35, 96, 128, dtype)
    wide = linear(
        arguments["x"], arguments["gate_up"], in_features=96, out_features=256,
        bias=arguments["gate_up_bias"], norm=arguments["norm"], implementation="ffi",
    )  # fmt: skip
    middle = swiglu(wide, None, dtype, implementation="ffi")
    parts = linear(
        middle, arguments["down"], in_features=128, out_features=96,
        bias=arguments["down_bias"], residual=arguments["residual"], implementation="ffi",
    )  # fmt: skip
    whole = gated_mlp(**arguments, implementation="ffi")
    np.testing.assert_array_equal(np.asarray(whole), np.asarray(parts))
    x = arguments["x"].at[3].set(jnp.nan).at[20:].set(jnp.nan)
    rows = jnp.array([20], jnp.int32)
    fewer = np.asarray(gated_mlp(**(arguments | {"x": x}), rows=rows, implementation="ffi"))
    keep = [i for i in range(20) if i != 3]
    np.testing.assert_array_equal(fewer[keep], np.asarray(parts)[keep])
    assert not fewer[20:].any()


def test_gated_mlp_takes_widths_and_weights_that_the_fused_one_can_not() -> None:
    arguments, expected = mlp_case(9, 64, 96, jnp.float32)
    out = gated_mlp(**arguments)
    assert np.max(np.abs(np.asarray(out) - expected)) < 1e-5 * np.max(np.abs(expected))
    with pytest.raises(ValueError, match="multiple of 64"):
        gated_mlp(**arguments, implementation="ffi")
    assert gated_mlp(**(arguments | {"x": arguments["x"].astype(jnp.float16)})).shape == (9, 64)
