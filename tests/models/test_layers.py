"""Projection, norm and embedding: values, dtypes, packed storage."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from aqua_jax.models.layers import Embedding, Linear, RMSNorm
from aqua_jax.ops.linear import pack

DTYPES = [jnp.float32, jnp.bfloat16]


def _x(rows: int, features: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(5).standard_normal((rows, features)), jnp.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 5])
def test_linear(dtype: jnp.dtype, rows: int) -> None:
    layer = Linear(20, 33, use_bias=True, dtype=dtype, rngs=nnx.Rngs(0))
    assert layer.kernel[...].dtype == dtype
    assert layer.bias is not None and layer.bias[...].dtype == jnp.float32
    layer.bias[...] = jnp.arange(33, dtype=jnp.float32)
    x = _x(rows, 20)
    out = layer(x, implementation="xla")
    assert out.shape == (rows, 33) and out.dtype == jnp.float32
    rounded = np.asarray(x.astype(dtype), np.float64)
    expected = rounded @ np.asarray(layer.kernel[...], np.float64) + np.arange(33)
    np.testing.assert_allclose(out, expected, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_with_packed_kernel(dtype: jnp.dtype) -> None:
    layer = Linear(20, 70, dtype=dtype, rngs=nnx.Rngs(0))
    x = _x(3, 20)
    expected = layer(x, implementation="xla")
    layer.kernel = nnx.Param(jnp.asarray(pack(np.asarray(layer.kernel[...]), dtype)))
    np.testing.assert_allclose(layer(x, implementation="xla"), expected, atol=1e-6)
    np.testing.assert_allclose(layer(x), expected, atol=1e-5)


def test_linear_computes_leading_rows() -> None:
    layer = Linear(20, 33, rngs=nnx.Rngs(0))
    x = _x(6, 20)
    out = layer(x, rows=jnp.array([4], jnp.int32))
    np.testing.assert_allclose(out[:4], layer(x)[:4], atol=1e-6)
    assert np.isfinite(np.asarray(out)).all()


def test_rms_norm() -> None:
    norm = RMSNorm(12, eps=0.1, rngs=nnx.Rngs(0))
    norm.scale[...] = jnp.arange(12, dtype=jnp.float32)
    x = np.random.default_rng(0).standard_normal((2, 3, 12))
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 0.1) * np.arange(12)
    np.testing.assert_allclose(norm(jnp.asarray(x, jnp.float32)), expected, atol=1e-5)
    assert norm(jnp.zeros((1, 12), jnp.bfloat16)).dtype == jnp.float32


@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding_both_ways(dtype: jnp.dtype) -> None:
    embed = Embedding(75, 20, dtype=dtype, rngs=nnx.Rngs(0))
    table = np.asarray(embed.embedding[...], np.float64)
    tokens = jnp.array([0, 74, 3, 3], jnp.int32)
    rows = embed(tokens)
    assert rows.dtype == jnp.float32
    np.testing.assert_array_equal(rows, table[[0, 74, 3, 3]])
    x = _x(4, 20)
    logits = embed.attend(x, implementation="xla")
    np.testing.assert_allclose(
        logits, np.asarray(x.astype(dtype), np.float64) @ table.T, atol=1e-5
    )

    embed.embedding = nnx.Param(jnp.asarray(pack(np.asarray(embed.embedding[...]).T, dtype)))
    assert embed.packed
    np.testing.assert_array_equal(embed(tokens), rows)
    np.testing.assert_allclose(embed.attend(x, implementation="xla"), logits, atol=1e-6)


def test_without_rngs_there_are_shapes_only() -> None:
    layer = Linear(2**20, 2**20, use_bias=True, dtype=jnp.bfloat16, rngs=None)
    spec = layer.kernel.get_value()
    assert isinstance(spec, jax.ShapeDtypeStruct)
    assert (spec.shape, spec.dtype) == ((2**20, 2**20), jnp.bfloat16)
