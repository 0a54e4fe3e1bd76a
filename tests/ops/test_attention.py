"""Paged attention: the handler on every instruction set, the reference, and the definition."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aqua_jax.ops import library
from aqua_jax.ops.attention import AttentionMetadata, paged_attention
from tests.ops.attention_data import BF16, Case, make_case, naive, random_case
from tests.scale import scaled

SETS = ("generic", "avx2", "avx512", "avx512bf16", "amx")


def tolerance(case: Case, deterministic: bool) -> float:
    """Largest allowed error of values of size 1.

    The matrix units round q and the softmax weights to bf16 (2^-9 each); an f32 pool, and the
    row kernel, compute in f32 and only round a bf16 result.
    """
    if case.kv.dtype == BF16 and not deterministic:
        return 0.03
    return 0.016 if case.q.dtype == BF16 else 1e-5


def test_library_is_built():
    # The rest would compare the reference with itself.
    assert library.available("aqua_attention"), library.reason()
    assert library.implementations()["attention"] == "ffi"
    assert library.instruction_set() in SETS


@pytest.mark.parametrize("seed", range(scaled(4)))
def test_reference_is_the_definition(seed):
    case, options = random_case(np.random.default_rng([1, seed]))
    kv, out = case.run("reference", **options)
    expected_kv, expected = naive(case, layer=options["layer"], window=options["window"])
    np.testing.assert_array_equal(kv, expected_kv)
    np.testing.assert_allclose(
        np.asarray(out, np.float64), expected, atol=0.016 if out.dtype == BF16 else 1e-5
    )


@pytest.mark.parametrize("isa", SETS)
def test_handler_is_the_definition(isa, monkeypatch):
    monkeypatch.setenv("AQUA_ISA", isa)
    assert SETS.index(library.instruction_set()) <= SETS.index(isa)  # or less: what there is
    for seed in range(scaled(8)):
        case, options = random_case(np.random.default_rng([2, seed]))
        kv, out = case.run("ffi", **options)
        expected_kv, expected = naive(case, layer=options["layer"], window=options["window"])
        np.testing.assert_array_equal(kv, expected_kv, err_msg=f"pool of seed {seed}")
        error = np.abs(np.asarray(out, np.float64) - expected).max(initial=0)
        assert error < tolerance(case, options["deterministic"]), (seed, options)


@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_long_contexts_are_split(dtype):
    # One decode over many parts, and a prompt chunk deep in its sequence.
    rng = np.random.default_rng(3)
    case = make_case(rng, [1, 33], [3000, 1500], kv_dtype=dtype, kv_heads=1, group=4, dim=32)
    for deterministic in (False, True):
        _, out = case.run("ffi", deterministic=deterministic)
        error = np.abs(out - naive(case)[1]).max()
        assert error < tolerance(case, deterministic)


def test_padding_is_zero_and_not_written():
    rng = np.random.default_rng(4)
    case = make_case(rng, [3, 1], [20, 5], padding_rows=4, padding_seqs=2)
    for implementation in ("ffi", "reference"):
        kv, out = case.run(implementation)
        assert not out[4:].any() and out[:4].any()
        changed = (kv != case.kv).any(axis=(1, 2, 4, 5))  # [P, page_tokens]
        assert changed.sum() == 4  # one slot for each real row


def test_empty_batch_changes_nothing():
    case = make_case(np.random.default_rng(5), [], [], padding_rows=4, padding_seqs=2)
    for implementation in ("ffi", "reference"):
        kv, out = case.run(implementation)
        np.testing.assert_array_equal(kv, case.kv)
        assert not out.any()


def test_absent_pages_are_invisible():
    case = make_case(np.random.default_rng(6), [1, 1], [60, 40])
    case.page_table[0, 1] = -1
    case.page_table[1, :] = -1  # sees nothing at all
    for implementation in ("ffi", "reference"):
        kv, out = case.run(implementation)
        np.testing.assert_allclose(out, naive(case)[1], atol=1e-5)
        assert not out[1].any()
        assert (kv != case.kv).any(axis=(1, 2, 4, 5)).sum() == 1


def test_pages_before_the_window_are_not_read():
    case = make_case(np.random.default_rng(7), [1, 30], [100, 100], dim=32)
    _, expected = case.run("ffi", window=20)
    case.page_table[0, :5] = -1  # positions 80-99 are seen
    case.page_table[1, :3] = 10**6  # an id out of range would be an error where it is used
    _, out = case.run("ffi", window=20)
    np.testing.assert_array_equal(out, expected)


def test_garbage_in_unwritten_slots_stays_there():
    rng = np.random.default_rng(8)
    for dtype in (np.float32, BF16):
        case = make_case(rng, [40, 1], [40, 19], kv_dtype=dtype)
        written = np.zeros(case.kv.shape[:1] + case.kv.shape[3:4], bool)
        for s, length in enumerate(case.kv_lens):
            for at in range(length):
                written[case.page_table[s, at // 16], at % 16] = True
        assert not written.all()
        case.kv = np.where(written[:, None, None, :, None, None], case.kv, np.nan).astype(dtype)
        for implementation in ("ffi", "reference"):
            _, out = case.run(implementation)
            assert np.isfinite(np.asarray(out, np.float32)).all()


def rows_of(case: Case, seq: int, out: np.ndarray) -> np.ndarray:
    return out[case.query_starts[seq] : case.query_starts[seq + 1]]


@pytest.mark.parametrize("dtype", [np.float32, BF16])
@pytest.mark.parametrize("isa", ["generic", "avx2", "amx"])
def test_deterministic_rows_depend_on_nothing_else(dtype, isa, monkeypatch):
    """One prompt alone in one step, in chunks, token by token, and among neighbours."""
    monkeypatch.setenv("AQUA_ISA", isa)
    rng = np.random.default_rng(9)
    length = 620  # more than one of the fixed parts
    whole = make_case(rng, [length], [length], kv_heads=2, group=3, dim=48, kv_dtype=dtype)
    options = {"window": 550, "deterministic": True}
    kv, expected = whole.run("ffi", **options)

    for cut in ([600, 20], [17, 1, 602], [619, 1]):
        kv_now, at = whole.kv, 0
        for count in cut:
            neighbours = make_case(
                rng, [5, count, 1], [70, at + count, 333], kv_heads=2, group=3, dim=48,
                kv_dtype=dtype, padding_rows=2,
            )
            # The prompt's pages keep their numbers; the neighbours get pages behind them.
            first = len(whole.kv)
            table = np.full((3, whole.page_table.shape[1]), -1, np.int32)
            own = neighbours.page_table
            for s in (0, 2):
                table[s, : own.shape[1]] = np.where(own[s] >= 0, own[s] + first, -1)[
                    : table.shape[1]
                ]
            table[1] = whole.page_table[0]
            rows = slice(neighbours.query_starts[1], neighbours.query_starts[2])
            for name in ("q", "k", "v"):
                getattr(neighbours, name)[rows] = getattr(whole, name)[at : at + count]
            step = dataclasses.replace(
                neighbours, kv=np.concatenate([kv_now, neighbours.kv]), page_table=table
            )
            pool, out = step.run("ffi", **options)
            kv_now = pool[:first]
            np.testing.assert_array_equal(rows_of(step, 1, out), expected[at : at + count])
            at += count
        np.testing.assert_array_equal(kv_now, kv)


def test_pool_is_updated_in_place():
    case = make_case(np.random.default_rng(10), [20, 1], [20, 90], layers=3, page_tokens=64)

    def step(kv, q, k, v, meta):
        total = 0.0
        for layer in range(3):
            kv, out = paged_attention(
                kv, q, k, v, meta, layer=layer, scale=0.1, implementation="ffi"
            )
            total += out
        return kv, total

    big = jnp.zeros((2000, *case.kv.shape[1:]), jnp.float32)
    arrays = [jnp.array(x) for x in (case.q, case.k, case.v)]
    compiled = jax.jit(step, donate_argnums=0).lower(big, *arrays, case.meta).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < big.nbytes // 100
    address = big.unsafe_buffer_pointer()
    for _ in range(3):
        big, _ = compiled(big, *arrays, case.meta)
        assert big.unsafe_buffer_pointer() == address


BAD = {
    "page beyond the pool": ("page_table", (0, 1), 10**6),
    "position ahead": ("positions", 0, 59),
    "negative position": ("positions", 0, -1),
    "length beyond the table": ("kv_lens", 0, 10**6),
    "length below the count": ("kv_lens", 0, 2),
    "rows out of order": ("query_starts", 1, -5),
    "rows beyond the batch": ("query_starts", 2, 10**6),
    "first row not 0": ("query_starts", 0, 1),
    "more sequences than there are": ("num_seqs", 0, 3),
    "negative sequences": ("num_seqs", 0, -1),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_metadata_is_an_error(name):
    field, index, value = BAD[name]
    case = make_case(np.random.default_rng(11), [10, 1], [60, 40])
    getattr(case, field)[index] = value
    with pytest.raises(Exception, match=r"aqua_attention: \w+.*: got .*; allowed: "):
        case.run("ffi")


def test_bad_shapes_are_errors():
    case = make_case(np.random.default_rng(12), [3], [20])
    kv, q, k, v = (jnp.array(x) for x in (case.kv, case.q, case.k, case.v))
    meta = case.meta
    good = {"kv": kv, "q": q, "k": k, "v": v, "meta": meta, "layer": 0, "scale": 1.0}
    bad = [
        ({"kv": kv[:, :, 0]}, "shape of kv"),
        ({"kv": kv[:, :, :, :3]}, "page_tokens"),
        ({"kv": kv.astype(jnp.float16)}, "dtype of kv"),
        ({"q": q[:, :3]}, "shape of q"),
        ({"k": k[:2]}, "shapes of k, v"),
        ({"v": v.astype(jnp.bfloat16)}, "shapes of k, v"),
        ({"meta": dataclasses.replace(meta, positions=meta.positions[:1])}, "shapes of meta"),
        ({"layer": 1}, "layer"),
        ({"scale": 0.0}, "scale"),
        ({"window": 0}, "window"),
    ]
    for change, what in bad:
        arguments = good | change
        with pytest.raises(ValueError, match=rf"{what}: got .*; allowed: "):
            paged_attention(**arguments)


def test_metadata_is_a_pytree():
    meta = make_case(np.random.default_rng(13), [3], [20]).meta
    again = jax.tree.map(lambda x: x + 0, meta)
    assert isinstance(again, AttentionMetadata) and len(jax.tree.leaves(meta)) == 5
