"""Matrix products over packed weights: parity, padding rows, bitwise independence of rows."""

from __future__ import annotations

import concurrent.futures
import os
import subprocess
import sys
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aqua_jax.ops import library
from aqua_jax.ops.linear import embed_rows, linear, pack, packed_shape, unpack
from tests.ops import matmul_data as data
from tests.scale import scaled

IMPLEMENTATIONS = ("ffi", "xla")


@pytest.fixture(params=data.instruction_sets())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every instruction set of this processor in turn."""
    monkeypatch.setenv("AQUA_ISA", request.param)
    return request.param


def run(x: Any, w: np.ndarray, dtype: type, **kwargs: Any) -> np.ndarray:
    """linear() over packed weights."""
    k, n = w.shape
    out = linear(x, jnp.asarray(pack(w, dtype)), in_features=k, out_features=n, **kwargs)
    return np.asarray(out)


def test_the_compiled_handler_is_there() -> None:
    assert library.available("aqua_linear"), library.reason()


@hypothesis.given(
    k=st.integers(1, 140), n=st.integers(1, 140), dtype=st.sampled_from(data.DTYPES),
    order=st.sampled_from("CF"), seed=st.integers(0, 99),
)  # fmt: skip
def test_pack_places_every_element_and_unpack_takes_it_back(
    k: int, n: int, dtype: type, order: str, seed: int
) -> None:
    w = np.asarray(data.normal(seed, k, n).astype(dtype), order=order)
    packed = pack(w, dtype)
    assert packed.shape == packed_shape(k, n, dtype) and packed.dtype == dtype
    i, j = np.random.default_rng(seed).integers(0, (k, n))
    per_step = 32 if dtype == jnp.bfloat16 else 16
    pair = 2 if dtype == jnp.bfloat16 else 1
    step = packed[j // 64, i // per_step, i % per_step // pair, j % 64]
    assert (step[i % 2] if pair == 2 else step) == w[i, j]
    assert np.count_nonzero(packed) == np.count_nonzero(w)  # zeros beyond k and n
    np.testing.assert_array_equal(unpack(packed, k, n), w)


def test_pack_converts_and_jax_unpacks() -> None:
    w = data.normal(0, 50, 70, dtype=np.float16)
    packed = jnp.asarray(pack(w, jnp.float32))
    np.testing.assert_array_equal(np.asarray(unpack(packed, 50, 70)), w.astype(np.float32))
    np.testing.assert_array_equal(unpack(pack(w, jnp.bfloat16), 50, 70), w.astype(jnp.bfloat16))
    with pytest.raises(ValueError, match="float16"):
        pack(w, np.float16)
    with pytest.raises(ValueError, match="matrices"):
        pack(w[0], jnp.bfloat16)


@pytest.mark.parametrize("dtype", data.DTYPES)
def test_embed_rows(dtype: type) -> None:
    table = data.normal(1, 130, 70).astype(dtype)
    tokens = np.array([0, 129, 64, 63, 64], np.int32)
    rows = embed_rows(jnp.asarray(pack(table.T, dtype)), jnp.asarray(tokens), 70)
    np.testing.assert_array_equal(np.asarray(rows), table[tokens])


@pytest.mark.parametrize("x_dtype", data.DTYPES)
@pytest.mark.parametrize("dtype", data.DTYPES)
def test_products_are_exact_to_the_last_bits_of_the_sums(
    isa: str, dtype: type, x_dtype: type
) -> None:
    for seed, (t, k, n) in enumerate(data.SHAPES):
        x, w = data.normal(seed, t, k).astype(x_dtype), data.normal(seed + 50, k, n)
        expected, terms = data.product(x, w, dtype)
        for implementation in IMPLEMENTATIONS:
            out = run(jnp.asarray(x), w, dtype, implementation=implementation)
            error = np.max(np.abs(out - expected) / terms)
            assert error < 2**-24 * max(4, k), (implementation, t, k, n)


@pytest.mark.parametrize("dtype", data.DTYPES)
def test_bias_norm_and_residual(isa: str, dtype: type) -> None:
    t, k, n, eps = 19, 150, 90, 1e-5
    x, w, scale = data.normal(0, t, k) * 3, data.normal(1, k, n), data.normal(2, k)
    bias, residual = data.normal(3, n), data.normal(4, t, n)
    normed = data.rms_norm(x, scale, eps)
    _, terms = data.product(normed, w, dtype)
    expected = normed @ w.astype(dtype).astype(np.float64) + bias + residual
    for implementation in IMPLEMENTATIONS:
        out = run(
            x, w, dtype, bias=bias, norm=(jnp.asarray(scale), eps), residual=residual,
            implementation=implementation,
        )  # fmt: skip
        # Half a unit in the last place of each normed value: 2^-9 for bf16.
        bound = 2**-9 if dtype == jnp.bfloat16 else 2**-18
        assert np.max(np.abs(out - expected) / terms) < bound, implementation


@pytest.mark.parametrize("valid", [0, 1, 20, 33, 1000, -1])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_beyond_the_valid_ones_are_zero_whatever_they_hold(
    implementation: str, valid: int
) -> None:
    x, w = data.normal(0, 33, 70), data.normal(1, 70, 130)
    residual = data.normal(2, 33, 130)
    keep = min(max(valid, 0), 33)
    whole = run(x, w, jnp.bfloat16, residual=residual, implementation=implementation)
    x[keep:] = np.nan
    rows = jnp.array([valid], jnp.int32)
    out = run(x, w, jnp.bfloat16, rows=rows, residual=residual, implementation=implementation)
    np.testing.assert_array_equal(out[:keep], whole[:keep])
    assert not out[keep:].any()


@pytest.mark.parametrize("dtype", data.DTYPES)
def test_a_row_depends_on_nothing_but_itself(isa: str, dtype: type) -> None:
    k, n, t = 300, 130, scaled(90)
    w, row = data.normal(0, k, n), data.normal(1, 1, k)
    alone = run(row, w, dtype, implementation="ffi")
    for seed, (count, at) in enumerate([(2, 1), (16, 15), (17, 16), (40, 3), (t, t - 1), (t, 50)]):
        x = data.normal(seed, count, k) * 10.0**seed
        x[(at + 1) % count] = np.inf
        x[at] = row
        out = run(x, w, dtype, implementation="ffi")
        np.testing.assert_array_equal(out[at], alone[0])
        rows = jnp.array([at + 1], jnp.int32)
        out = run(x, w, dtype, rows=rows, implementation="ffi")
        np.testing.assert_array_equal(out[at], alone[0])


def test_leading_dimensions_and_default_choice() -> None:
    x, w = data.normal(0, 6, 40), data.normal(1, 40, 50)
    packed = jnp.asarray(pack(w, jnp.float32))
    flat = linear(x, packed, in_features=40, out_features=50)
    deep = linear(x.reshape(2, 3, 40), packed, in_features=40, out_features=50)
    assert deep.shape == (2, 3, 50)
    np.testing.assert_array_equal(deep.reshape(6, 50), flat)
    by_ffi = linear(x, packed, in_features=40, out_features=50, implementation="ffi")
    np.testing.assert_array_equal(flat, by_ffi)
    plain = linear(x, jnp.asarray(w), in_features=40, out_features=50)
    unpacked = linear(x, packed, in_features=40, out_features=50, implementation="xla")
    np.testing.assert_array_equal(plain, unpacked)


def test_without_the_library_packed_weights_still_work(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = data.normal(0, 3, 40), data.normal(1, 40, 50)
    expected = run(x, w, jnp.float32, implementation="xla")
    monkeypatch.setattr(library, "available", lambda target="": False)
    monkeypatch.setattr(library, "reason", lambda: "it is not there")
    np.testing.assert_array_equal(run(x, w, jnp.float32), expected)
    with pytest.raises(ValueError, match="it is not there"):
        run(x, w, jnp.float32, implementation="ffi")


def test_misuse_is_an_error() -> None:
    x, w = jnp.zeros((2, 8)), jnp.zeros((8, 4))
    with pytest.raises(ValueError, match="'cuda'"):
        linear(x, w, in_features=8, out_features=4, implementation="cuda")
    with pytest.raises(ValueError, match="not packed"):
        linear(x, w, in_features=8, out_features=4, implementation="ffi")
    with pytest.raises(ValueError, match="in_features is 9"):
        linear(x, w, in_features=9, out_features=4)
    with pytest.raises(ValueError, match=r"w has shape \(8, 4\)"):
        linear(x, w, in_features=8, out_features=5)
    with pytest.raises(ValueError, match="w has shape"):
        linear(x, jnp.zeros((2, 1, 16, 64)), in_features=8, out_features=64)


def test_calls_from_several_threads_do_not_mix() -> None:
    w = data.normal(0, 200, 300)
    packed = jnp.asarray(pack(w, jnp.bfloat16))
    inputs = [jnp.asarray(data.normal(seed, 3 + 20 * seed, 200)) for seed in range(4)]
    call = jax.jit(
        lambda x, w: linear(x, w, in_features=200, out_features=300, implementation="ffi")
    )
    expected = [np.asarray(call(x, packed)) for x in inputs]

    def repeat(index: int) -> int:
        """Number of wrong results."""
        return sum(
            not np.array_equal(np.asarray(call(inputs[index], packed)), expected[index])
            for _ in range(scaled(50))
        )

    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        assert list(threads.map(repeat, range(4))) == [0] * 4


def test_the_number_of_threads_changes_no_bit() -> None:
    program = (
        "import jax.numpy as jnp, numpy as np\n"
        "from aqua_jax.ops.linear import linear, pack\n"
        "from tests.ops import matmul_data as data\n"
        "x, w = data.normal(0, 200, 96), data.normal(1, 96, 500)\n"
        "w = jnp.asarray(pack(w, jnp.bfloat16))\n"
        "out = linear(x, w, in_features=96, out_features=500, implementation='ffi')\n"
        "print(np.asarray(out).tobytes().hex())\n"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", program], env=os.environ | {"AQUA_THREADS": threads},
            check=True, capture_output=True, text=True, timeout=120,
        ).stdout
        for threads in ("1", "5")
    ]  # fmt: skip
    assert len(outputs[0]) > 200 * 500 * 8
    assert outputs[0] == outputs[1]
