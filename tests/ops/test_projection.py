"""The fused attention projection: norm, product, bias, head norms, rotary embedding."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from aqua_jax.ops.linear import pack
from aqua_jax.ops.projection import qkv_rotary
from tests.ops import matmul_data as data

IMPLEMENTATIONS = ("ffi", "xla")
# (T, k, H, K, D): heads narrower and wider than a panel of 64 columns, and across its edges.
CASES = ((1, 70, 3, 1, 64), (9, 64, 4, 2, 16), (20, 40, 2, 1, 128), (5, 96, 3, 3, 96),
         (40, 33, 4, 1, 10), (3, 20, 1, 1, 320))  # fmt: skip


@pytest.fixture(params=data.instruction_sets())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every instruction set of this processor in turn."""
    monkeypatch.setenv("AQUA_ISA", request.param)
    return request.param


def build(
    case: tuple[int, ...], dtype: type, extras: bool
) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Arguments of qkv_rotary, and q, k, v in f64 over weights rounded to dtype."""
    t, features, heads, kv_heads, size = case
    wide = (heads + 2 * kv_heads) * size
    x, w = data.normal(0, t, features), data.normal(1, features, wide) / np.sqrt(features)
    angles = data.normal(2, t, size // 2) * 5
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    arguments: dict[str, Any] = {
        "x": jnp.asarray(x), "w": jnp.asarray(pack(w, dtype)), "cos": jnp.asarray(cos),
        "sin": jnp.asarray(sin), "features": features, "heads": heads, "kv_heads": kv_heads,
        "head_dim": size,
    }  # fmt: skip
    if extras:
        bias, scale = data.normal(3, wide), data.normal(4, features)
        query_scale, key_scale = data.normal(5, size), data.normal(6, size)
        arguments |= {
            "bias": jnp.asarray(bias), "norm": (jnp.asarray(scale), 1e-5),
            "query_norm": (jnp.asarray(query_scale), 1e-6),
            "key_norm": (jnp.asarray(key_scale), 1e-6),
        }  # fmt: skip
        out = data.rms_norm(x, scale, 1e-5) @ data.rounded(w, dtype) + bias
    else:
        out = data.rounded(x, dtype) @ data.rounded(w, dtype)
    ends = [heads * size, (heads + kv_heads) * size]
    q, k, v = (part.reshape(t, -1, size) for part in np.split(out, ends, axis=1))
    if extras:
        q, k = data.rms_norm(q, query_scale, 1e-6), data.rms_norm(k, key_scale, 1e-6)

    def rotate(x: np.ndarray) -> np.ndarray:
        pairs = x[..., : size // 2] + 1j * x[..., size // 2 :]
        turned = pairs * (cos + 1j * sin.astype(np.float64))[:, None]
        return np.concatenate([turned.real, turned.imag], axis=-1)

    return arguments, [rotate(q), rotate(k), v]


@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize("dtype", data.DTYPES)
def test_queries_keys_and_values(isa: str, dtype: type, extras: bool) -> None:
    for case in CASES:
        arguments, expected = build(case, dtype, extras)
        # With a norm the operand is rounded to the weights' dtype after it.
        bound = 0.03 if extras and dtype == jnp.bfloat16 else 1e-5
        for implementation in IMPLEMENTATIONS:
            out = qkv_rotary(**arguments, implementation=implementation)
            for got, want in zip(out, expected, strict=True):
                assert got.shape == want.shape and got.dtype == jnp.float32
                error = np.max(np.abs(np.asarray(got) - want))
                assert error < bound * np.max(np.abs(want)), (case, implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_beyond_the_valid_ones_are_zero(implementation: str) -> None:
    arguments, _ = build((20, 40, 2, 1, 128), jnp.bfloat16, True)
    whole = qkv_rotary(**arguments, implementation=implementation)
    arguments["x"] = arguments["x"].at[11:].set(jnp.nan)
    out = qkv_rotary(**arguments, rows=jnp.array([11], jnp.int32), implementation=implementation)
    for got, want in zip(out, whole, strict=True):
        np.testing.assert_array_equal(np.asarray(got)[:11], np.asarray(want)[:11])
        assert not np.asarray(got)[11:].any()


def test_a_row_depends_on_nothing_but_itself(isa: str) -> None:
    arguments, _ = build((40, 64, 4, 2, 16), jnp.bfloat16, True)
    whole = qkv_rotary(**arguments, implementation="ffi")
    one = arguments | {name: arguments[name][33:34] for name in ("x", "cos", "sin")}
    alone = qkv_rotary(**one, implementation="ffi")
    for got, want in zip(alone, whole, strict=True):
        np.testing.assert_array_equal(np.asarray(got)[0], np.asarray(want)[33])


def test_misuse_is_an_error() -> None:
    arguments, _ = build((3, 20, 1, 1, 64), jnp.float32, True)
    with pytest.raises(ValueError, match="both or not at all"):
        qkv_rotary(**(arguments | {"key_norm": None}))
    with pytest.raises(ValueError, match="eps differs"):
        qkv_rotary(**(arguments | {"key_norm": (arguments["key_norm"][0], 0.5)}))
    with pytest.raises(ValueError, match=r"cos has shape \(2, 32\)"):
        qkv_rotary(**(arguments | {"cos": arguments["cos"][:2]}))
    plain = arguments | {"w": jnp.zeros((20, 192))}
    with pytest.raises(ValueError, match="not packed"):
        qkv_rotary(**plain, implementation="ffi")
