"""Dense attention against a loop over queries in float64."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aqua_jax.models.attention import dense_attention


@pytest.mark.parametrize(
    ("heads", "kv_heads", "window"),
    [(1, 1, None), (4, 4, 3), (5, 1, 2), (9, 3, None), *((6, 2, w) for w in (1, 3, 10, 11, 50))],
)
def test_against_a_loop(heads: int, kv_heads: int, window: int | None) -> None:
    rng = np.random.default_rng(heads)
    batch, length, dim = 2, 11, 6
    q = rng.standard_normal((batch, length, heads, dim))
    k, v = (rng.standard_normal((batch, length, kv_heads, dim)) for _ in range(2))
    run = jax.jit(functools.partial(dense_attention, scale=0.4, window=window))
    out = np.asarray(run(*(jnp.asarray(x, jnp.float32) for x in (q, k, v))))
    assert out.dtype == np.float32
    for b, t, h in np.ndindex(batch, length, heads):
        first = 0 if window is None else max(0, t + 1 - window)
        kv = h // (heads // kv_heads)
        scores = k[b, first : t + 1, kv] @ q[b, t, h] * 0.4
        weights = np.exp(scores - scores.max())
        expected = weights @ v[b, first : t + 1, kv] / weights.sum()
        np.testing.assert_allclose(out[b, t, h], expected, atol=2e-6)


def test_low_precision_inputs_are_summed_in_f32() -> None:
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((1, 40, 2, 8)), jnp.bfloat16) for _ in range(3))
    run = jax.jit(functools.partial(dense_attention, scale=0.5, window=None))
    out, wide = run(q, k, v), run(*(x.astype(jnp.float32) for x in (q, k, v)))
    assert out.dtype == jnp.float32
    np.testing.assert_array_equal(out, wide)


def test_gradient_is_finite_and_causal() -> None:
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((1, 7, 2, 4)), jnp.float32) for _ in range(3))

    def at_three(k: jax.Array) -> jax.Array:
        return dense_attention(q, k, v, scale=0.5, window=3)[0, 3].sum()

    gradient = np.asarray(jax.jit(jax.grad(at_three))(k))
    assert np.isfinite(gradient).all()
    reached = np.abs(gradient).sum(axis=(0, 2, 3)) > 0
    assert reached.tolist() == [False, True, True, True, False, False, False]
