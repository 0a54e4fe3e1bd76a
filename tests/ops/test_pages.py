"""Copies of pages inside the pool."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aqua_jax.ops.pages import copy_pages
from tests.scale import scaled

COPY = jax.jit(copy_pages, donate_argnums=0, static_argnames="implementation")


def run(kv, src, dst, count, implementation):
    arrays = (jnp.array(np.asarray(x, np.int32)) for x in (src, dst, [count]))
    return np.asarray(COPY(jnp.array(kv), *arrays, implementation=implementation))


@pytest.mark.parametrize("implementation", ["ffi", "reference"])
def test_copies_are_simultaneous(implementation):
    rng = np.random.default_rng(0)
    for _ in range(scaled(10)):
        kv = rng.standard_normal((9, 2, 2, 4, 1, 3), np.float32)
        src = rng.integers(0, 9, 6)
        dst = rng.permutation(9)[:6]  # may name pages that others read
        count = int(rng.integers(0, 7))
        expected = kv.copy()
        expected[dst[:count]] = kv[src[:count]]
        out = run(kv, src, dst, count, implementation)
        np.testing.assert_array_equal(out, expected)


def test_large_pages():
    kv = np.random.default_rng(1).standard_normal((4, 700_001), np.float32)
    np.testing.assert_array_equal(run(kv, [0, 2], [3, 1], 2, "ffi"), kv[[0, 2, 2, 0]])


def test_in_place():
    kv = jnp.zeros((64, 100_000), jnp.float32)
    ids = jnp.arange(4, dtype=jnp.int32)
    count = jnp.array([2], jnp.int32)
    compiled = COPY.lower(kv, ids, ids + 4, count, implementation="ffi").compile()
    assert compiled.memory_analysis().temp_size_in_bytes < kv.nbytes // 100
    address = kv.unsafe_buffer_pointer()
    assert compiled(kv, ids, ids + 4, count).unsafe_buffer_pointer() == address


@pytest.mark.parametrize(
    ("src", "dst", "count"),
    [([9, 0], [1, 2], 1), ([0, 0], [1, -1], 2), ([0, 0], [1, 2], 3), ([0, 0], [1, 2], -1)],
)
def test_pages_out_of_range_are_errors(src, dst, count):
    with pytest.raises(Exception, match=r"aqua_copy_pages: .*: got .*; allowed: "):
        run(np.zeros((9, 4), np.float32), src, dst, count, "ffi")


def test_bad_shapes_are_errors():
    kv, ids = jnp.zeros((4, 2)), jnp.zeros(3, jnp.int32)
    for arguments in (
        (kv, ids, ids[:2], ids[:1]), (kv, ids[None], ids[None], ids[:1]), (kv, ids, ids, ids[:2]),
    ):
        with pytest.raises(ValueError, match="allowed"):
            copy_pages(*arguments)
