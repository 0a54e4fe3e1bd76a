"""Cases for the CUDA handlers, wherever they run: on a GPU, or emulated on a CPU.

Not collected by name: tests/ops/test_cuda_emulated.py runs them with `-p tests.ops.emulated_cuda`,
scripts/gpu_check.py on the GPU there is.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aqua_jax.ops import library
from aqua_jax.ops.pages import copy_pages
from tests.ops.attention_data import BF16, Case, make_case, naive
from tests.scale import scaled

F16 = np.float16
DTYPES = [np.float32, BF16, F16]
COPY = jax.jit(functools.partial(copy_pages, implementation="ffi"), donate_argnums=0)


def tolerance(case: Case) -> float:
    """Largest allowed error of values of size 1.

    A 16-bit pool rounds q and the softmax weights to its dtype (2^-9 or 2^-12 each); an f32 pool
    computes in f32, and only a 16-bit result is rounded.
    """
    if case.kv.dtype == np.float32:
        return 1e-5 if case.q.dtype == np.float32 else 0.016
    return 0.004 if case.kv.dtype == case.q.dtype == F16 else 0.03


def random_case(rng: np.random.Generator) -> tuple[Case, dict]:
    """A mix of decodes and prompt chunks of shapes that the kernels treat differently."""
    seqs = int(rng.integers(1, 5))
    counts = [int(rng.choice([0, 1, 1, 2, 9, 40])) for _ in range(seqs)]
    lens = [max(1, count + int(rng.integers(0, 350))) for count in counts]
    layers = int(rng.integers(1, 3))
    case = make_case(
        rng, counts, lens,
        layers=layers,
        page_tokens=int(rng.choice([1, 4, 16, 64, 128])),
        kv_heads=int(rng.choice([1, 2, 3])),
        group=int(rng.choice([1, 3, 4, 7, 8, 17])),
        dim=int(rng.choice([8, 32, 64, 80, 96, 128, 136, 256])),
        kv_dtype=DTYPES[rng.integers(3)],
        q_dtype=DTYPES[rng.integers(3)],
        padding_rows=max(int(rng.integers(0, 5)), int(sum(counts) == 0)),
        padding_seqs=int(rng.integers(0, 3)),
    )
    window = [None, None, 1, 7, 50, 130][rng.integers(6)]
    return case, {
        "layer": layers - 1, "window": window, "deterministic": bool(rng.integers(3) == 0)
    }


def error_of(case: Case, out: np.ndarray, expected: np.ndarray) -> float:
    assert np.isfinite(np.asarray(out, np.float64)).all()
    return float(np.abs(np.asarray(out, np.float64) - expected).max(initial=0))


def test_handlers_are_those_of_cuda():
    assert library.platform() == "cuda"
    assert library.implementations()["attention"] == "ffi", library.reason()


@pytest.mark.parametrize("batch", range(scaled(3)))
def test_attention_is_the_definition(batch):
    for seed in range(8):
        case, options = random_case(np.random.default_rng([20, batch, seed]))
        kv, out = case.run("ffi", **options)
        expected_kv, expected = naive(case, layer=options["layer"], window=options["window"])
        np.testing.assert_array_equal(kv, expected_kv, err_msg=f"pool of seed {seed}")
        assert error_of(case, out, expected) < tolerance(case), (seed, options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("deterministic", [False, True])
def test_many_parts_are_merged(dtype, deterministic):
    """Decodes of many parts beside a prompt chunk deep in its sequence."""
    rng = np.random.default_rng(21)
    case = make_case(rng, [1, 33, 1], [3000, 700, 131], kv_dtype=dtype, kv_heads=1, group=4, dim=64)
    for window in (None, 900):
        _, out = case.run("ffi", deterministic=deterministic, window=window)
        assert error_of(case, out, naive(case, window=window)[1]) < tolerance(case)


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_a_long_prompt_alone(dim):
    """Several tiles of rows and blocks of keys, causal edges inside all of them."""
    rng = np.random.default_rng(22)
    case = make_case(rng, [150], [200], kv_dtype=BF16, kv_heads=2, group=2, dim=dim)
    _, out = case.run("ffi")
    assert error_of(case, out, naive(case)[1]) < tolerance(case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_poison_that_no_query_may_see(dim, dtype):
    """Each head size, with all that no query may see poisoned: other pages, slots not written yet,
    keys before the window. A product with a zero weight would show it as well."""
    rng = np.random.default_rng(31)
    case = make_case(
        rng, [1, 20, 1], [300, 75, 129], dim=dim, kv_heads=2, group=5, kv_dtype=dtype,
        page_tokens=16, padding_rows=1,
    )
    case.page_table[1, 1] = -1
    for window, deterministic in ((None, False), (40, False), (40, True)):
        seen = np.zeros(case.kv.shape[:1] + case.kv.shape[3:4], bool)
        for s, length in enumerate(case.kv_lens):
            count = int(case.query_starts[s + 1] - case.query_starts[s])
            first = 0 if window is None else max(0, int(length) - count + 1 - window)
            for at in range(first, int(length)):
                page = case.page_table[s, at // 16]
                if page >= 0:
                    seen[page, at % 16] = True
        expected = naive(case, window=window)[1]
        poisoned = dataclasses.replace(
            case, kv=np.where(seen[:, None, None, :, None, None], case.kv, np.nan).astype(dtype)
        )
        _, out = poisoned.run("ffi", window=window, deterministic=deterministic)
        assert error_of(case, out, expected) < tolerance(case), (window, deterministic)


def rows_of(case: Case, seq: int, out: np.ndarray) -> np.ndarray:
    return out[case.query_starts[seq] : case.query_starts[seq + 1]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 90])
def test_deterministic_rows_depend_on_nothing_else(dtype, window):
    """One prompt alone in one step, in chunks, and among neighbours: equal to the last bit."""
    rng = np.random.default_rng(23)
    length = 150
    whole = make_case(rng, [length], [length], kv_heads=2, group=3, dim=64, kv_dtype=dtype)
    options = {"window": window, "deterministic": True}
    kv, expected = whole.run("ffi", **options)
    for cut in ([130, 20], [17, 1, 132], [149, 1]):
        kv_now, at = whole.kv, 0
        for count in cut:
            around = make_case(
                rng, [5, count, 1], [70, at + count, 133], kv_heads=2, group=3, dim=64,
                kv_dtype=dtype, padding_rows=2,
            )
            # The prompt's pages keep their numbers; the neighbours get pages behind them.
            first = len(whole.kv)
            table = np.full((3, whole.page_table.shape[1]), -1, np.int32)
            for s in (0, 2):
                own = around.page_table[s]
                table[s, : len(own)] = np.where(own >= 0, own + first, -1)[: table.shape[1]]
            table[1] = whole.page_table[0]
            rows = slice(around.query_starts[1], around.query_starts[2])
            for name in ("q", "k", "v"):
                getattr(around, name)[rows] = getattr(whole, name)[at : at + count]
            step = dataclasses.replace(
                around, kv=np.concatenate([kv_now, around.kv]), page_table=table
            )
            pool, out = step.run("ffi", **options)
            kv_now = pool[:first]
            np.testing.assert_array_equal(rows_of(step, 1, out), expected[at : at + count])
            at += count
        np.testing.assert_array_equal(kv_now, kv)


@pytest.mark.parametrize("dtype", DTYPES)
def test_padding_is_zero_and_not_written(dtype):
    case = make_case(
        np.random.default_rng(24), [3, 1], [20, 5], padding_rows=4, padding_seqs=2, kv_dtype=dtype
    )
    kv, out = case.run("ffi")
    assert not out[4:].any() and out[:4].any()
    changed = (kv != case.kv).any(axis=(1, 2, 4, 5))  # [P, page_tokens]
    assert changed.sum() == 4  # one slot for each real row


def test_an_empty_batch_changes_nothing():
    case = make_case(np.random.default_rng(25), [], [], padding_rows=4, padding_seqs=2)
    kv, out = case.run("ffi")
    np.testing.assert_array_equal(kv, case.kv)
    assert not out.any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_absent_pages_are_invisible(dtype):
    case = make_case(np.random.default_rng(26), [1, 1, 5], [60, 40, 60], kv_dtype=dtype)
    case.page_table[0, 1] = -1
    case.page_table[1, :] = -1  # sees nothing at all
    case.page_table[2, 2] = -1
    for deterministic in (False, True):
        kv, out = case.run("ffi", deterministic=deterministic)
        assert error_of(case, out, naive(case)[1]) < tolerance(case)
        assert not out[1].any()
        assert (kv != case.kv).any(axis=(1, 2, 4, 5)).sum() == 6


@pytest.mark.parametrize("dtype", DTYPES)
def test_pages_before_the_window_are_not_read(dtype):
    case = make_case(np.random.default_rng(27), [1, 30], [100, 100], dim=32, kv_dtype=dtype)
    _, expected = case.run("ffi", window=20)
    case.page_table[0, :5] = -1  # positions 80-99 are seen
    case.page_table[1, :3] = 10**6
    _, out = case.run("ffi", window=20)
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_garbage_in_unwritten_slots_stays_there(dtype):
    case = make_case(np.random.default_rng(28), [40, 1], [40, 19], kv_dtype=dtype)
    written = np.zeros(case.kv.shape[:1] + case.kv.shape[3:4], bool)
    for s, length in enumerate(case.kv_lens):
        for at in range(length):
            written[case.page_table[s, at // 16], at % 16] = True
    assert not written.all()
    _, expected = case.run("ffi")
    case.kv = np.where(written[:, None, None, :, None, None], case.kv, np.nan).astype(dtype)
    _, out = case.run("ffi")
    np.testing.assert_array_equal(out, expected)


BAD = {
    "page beyond the pool": ("page_table", (0, 1), 10**6),
    "length beyond the table": ("kv_lens", 0, 10**6),
    "length below the count": ("kv_lens", 0, 2),
    "negative length": ("kv_lens", 0, -3),
    "rows out of order": ("query_starts", 1, -5),
    "rows beyond the batch": ("query_starts", 1, 10**6),
    "more sequences than there are": ("num_seqs", 0, 3),
    "negative sequences": ("num_seqs", 0, -1),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_nonsense_touches_nothing_else(name, dtype):
    """It can't be an error on a device; it must not reach beyond the arrays or the sequence."""
    field, index, value = BAD[name]
    case = make_case(np.random.default_rng(29), [10, 1], [60, 40], kv_dtype=dtype)
    before = case.kv.copy()
    _, expected = case.run("ffi")
    getattr(case, field)[index] = value
    kv, out = case.run("ffi")
    assert np.isfinite(np.asarray(out, np.float32)).all()
    others = np.ones(len(kv), bool)
    others[np.concatenate([case.page_table[0][:4], case.page_table[1][:3]]) % len(kv)] = False
    np.testing.assert_array_equal(kv[others], before[others])
    if field in ("page_table", "kv_lens"):
        np.testing.assert_array_equal(rows_of(case, 1, out), expected[10:])


def run_copies(pool: np.ndarray, src: list[int], dst: list[int], count: int) -> np.ndarray:
    arrays = [jnp.array(x, jnp.int32) for x in (src, dst, [count])]
    return np.asarray(COPY(jnp.array(pool), *arrays))


@pytest.mark.parametrize("shape", [(12, 8), (12, 3), (12, 2, 2, 16, 2, 32)])
def test_page_copies_read_all_sources_first(shape):
    """Chains, fans and cycles of copies, in random order, and plain ones."""
    rng = np.random.default_rng(30)
    for turn in range(scaled(30)):
        pool = rng.standard_normal(shape, np.float32)
        count = int(rng.integers(0, 11))
        dst = rng.permutation(shape[0])[:10].tolist()
        src = rng.integers(0, shape[0], 10).tolist()
        if turn % 3 == 0:  # nothing but cycles
            src = rng.permutation(dst).tolist()
        expected = pool.copy()
        expected[dst[:count]] = pool[src[:count]]
        np.testing.assert_array_equal(run_copies(pool, src, dst, count), expected)


def test_page_copies_outside_the_pool_are_left_out():
    pool = np.arange(40.0, dtype=np.float32).reshape(5, 8)
    copied = run_copies(pool, [0, -1, 7, 1], [3, 2, 1, 99], 1000)
    expected = pool.copy()
    expected[3] = pool[0]
    np.testing.assert_array_equal(copied, expected)
