"""Pages in spaces behind the pool: what one big pool gives, bit for bit.

The oracle is the op itself on one pool of all pages; the same pages are then split over a smaller
pool and memory of ours. The emulated CUDA handlers run these tests too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import mmap
import os
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aqua_jax.errors import StaleHandleError
from aqua_jax.ops import library, moves
from aqua_jax.ops.attention import paged_attention
from aqua_jax.ops.moves import MoveBatch, MovePool, Part, Segment, Status
from aqua_jax.ops.pages import copy_pages
from aqua_jax.ops.spaces import MAX_SPACES, SPACE_WORDS, Space, Spaces
from tests.ops import attention_data, cuda_cases
from tests.ops.attention_data import BF16, Case, make_case
from tests.scale import scaled


@dataclasses.dataclass
class Split:
    """A pool of which only the first pages are XLA's."""

    kv: jax.Array  # [P, ...]
    spaces: Spaces
    segments: list[Segment]
    views: list[np.ndarray]  # of each space's pages

    def whole(self, kv: jax.Array) -> np.ndarray:
        """All pages, with `kv` as the pool's."""
        return np.concatenate([np.asarray(kv), *self.views])


@contextlib.contextmanager
def split(pool: np.ndarray, *ends: int) -> Iterator[Split]:
    """pool[:ends[0]] stays XLA's, pool[ends[0]:ends[1]] is space 1, and so on to the last page.

    On CPUs every other space's pages have others' bytes between them.
    """
    bounds = [*ends, len(pool)]
    segments, views, between, made = [], [], [], []
    page = -(-pool[0].nbytes // 64) * 64
    for index, (first, last) in enumerate(zip(bounds, bounds[1:], strict=False)):
        # Each at another place in a file of its own, with garbage around it.
        before, apart = 64 * (index + 1), index % 2 == 0 and library.platform() != "cuda"
        part = pool[first:last]
        stride = page + 128 if apart else pool[0].nbytes
        file = os.memfd_create("space")
        os.ftruncate(file, before + len(part) * stride + 4096)
        memory = mmap.mmap(file, 0)
        os.close(file)
        everything = np.frombuffer(memory, np.uint8)
        everything[:] = 0xA5
        rows = everything[before : before + len(part) * stride].reshape(len(part), stride)
        view = np.lib.stride_tricks.as_strided(
            rows[:, : pool[0].nbytes].reshape(-1).view(pool.dtype) if not apart
            else np.frombuffer(memory, pool.dtype, offset=before),
            part.shape, (stride, *part.strides[1:]),
        )
        view[...] = part
        between.append(rows[:, pool[0].nbytes :])
        segments.append(Segment(memory))
        views.append(view)
        made.append(Space(segments[-1], len(part), before, stride if apart else 0))
    kv = jnp.array(pool[: bounds[0]])
    spaces = Spaces.behind(kv, *made)
    assert spaces.end == len(pool)
    try:
        yield Split(kv, spaces, segments, views)
        assert all((gap == 0xA5).all() for gap in between)
    finally:
        for segment in segments:
            if segment.live:
                segment.retire()


def attend(case: Case, kv: jax.Array, spaces: Spaces | None, **options):
    options = {"layer": 0, "scale": case.q.shape[-1] ** -0.5} | options

    def step(kv, q, k, v, meta, spaces):
        return paged_attention(
            kv, q, k, v, meta, spaces=spaces, implementation="ffi", **options
        )

    arrays = [jnp.array(x) for x in (case.q, case.k, case.v)]
    return jax.jit(step, donate_argnums=0)(kv, *arrays, case.meta, spaces)


def cuts(rng: np.random.Generator, pages: int) -> list[int]:
    """Where a pool of `pages` is cut into itself and one to three spaces."""
    count = int(rng.integers(1, min(3, pages - 1) + 1))
    return sorted((1 + rng.choice(pages - 1, count, replace=False)).tolist())


@pytest.mark.parametrize("batch", range(scaled(2)))
def test_attention_is_that_of_one_pool(batch):
    for seed in range(6):
        rng = np.random.default_rng([40, batch, seed])
        cases = cuda_cases if library.platform() == "cuda" else attention_data
        case, options = cases.random_case(rng)
        kv, out = attend(case, jnp.array(case.kv), None, **options)
        with split(case.kv, *cuts(rng, len(case.kv))) as parts:
            pool, got = attend(case, parts.kv, parts.spaces, **options)
            np.testing.assert_array_equal(np.asarray(got), np.asarray(out), err_msg=f"seed {seed}")
            np.testing.assert_array_equal(parts.whole(pool), np.asarray(kv))


@pytest.mark.parametrize("dtype", [np.float32, BF16])
@pytest.mark.parametrize("deterministic", [False, True])
def test_long_decodes_and_prompts_across_spaces(dtype, deterministic):
    rng = np.random.default_rng(41)
    case = make_case(rng, [1, 50, 1], [1300, 200, 31], kv_dtype=dtype, group=4)
    case.page_table[0, 3] = -1  # absent ones stay so
    kv, out = attend(case, jnp.array(case.kv), None, deterministic=deterministic)
    with split(case.kv, 5, len(case.kv) // 2) as parts:
        pool, got = attend(case, parts.kv, parts.spaces, deterministic=deterministic)
        np.testing.assert_array_equal(np.asarray(got), np.asarray(out))
        np.testing.assert_array_equal(parts.whole(pool), np.asarray(kv))


def test_page_copies_between_any_spaces():
    rng = np.random.default_rng(42)
    step = jax.jit(
        lambda kv, src, dst, count, spaces: copy_pages(
            kv, src, dst, count, spaces=spaces, implementation="ffi"
        ),
        donate_argnums=0,
    )
    for turn in range(scaled(8)):
        pool = rng.standard_normal((12, 2, 2, 4, 1, 8), np.float32)
        dst = rng.permutation(12)[:10].astype(np.int32)
        src = rng.integers(0, 12, 10).astype(np.int32)
        if turn % 2:  # nothing but cycles
            src = rng.permutation(dst)
        count = int(rng.integers(1, 11))
        expected = pool.copy()
        expected[dst[:count]] = pool[src[:count]]
        with split(pool, 4, 9) as parts:
            arrays = (jnp.array(x) for x in (src, dst, np.array([count], np.int32)))
            kv = step(parts.kv, *arrays, parts.spaces)
            np.testing.assert_array_equal(parts.whole(kv), expected)


def only_moves(kv: jax.Array, batch: MoveBatch, spaces: Spaces) -> jax.Array:
    run = jax.jit(
        lambda kv, records, head, spaces: moves.enqueue_moves(kv, records, head, spaces=spaces),
        donate_argnums=0,
    )
    return jax.block_until_ready(run(kv, batch.moves(), batch.head(), spaces))


def test_moves_of_pages_in_any_space():
    """Whole pages, parts and checked ones, out of and into pool and spaces."""
    rng = np.random.default_rng(43)
    pool = rng.standard_normal((10, 2, 2, 4, 1, 32), np.float32)
    page = pool[0].nbytes
    stored = np.zeros(9 * page, np.uint8)
    with split(pool, 3, 7) as parts, Segment(stored) as store:
        with MovePool.of(parts.kv, parts.spaces) as queue:
            part = Part.of_tokens(parts.kv, 1, 2)
            batch = MoveBatch(16, queue)
            out = batch.copy_out(range(9), store, np.arange(9) * page, checksum=True)
            kv = only_moves(parts.kv, batch, parts.spaces)
            assert moves.drain(30)
            statuses, sums = moves.poll(out)
            assert (statuses == Status.DONE).all()
            np.testing.assert_array_equal(stored, pool[:9].reshape(-1).view(np.uint8))
            batch = MoveBatch(16, queue)
            order = rng.permutation(9)
            into = batch.copy_in(order, store, np.arange(9) * page, checksums=sums)
            late = batch.copy_in([9], store, [0], part=part)
            kv = only_moves(kv, batch, parts.spaces)
            assert moves.drain(30)
            assert (moves.poll(np.concatenate([into, late]))[0] == Status.DONE).all()
            expected = pool.copy()
            expected[order] = pool[:9]
            expected[9, :, :, 1:3] = pool[0, :, :, 1:3]
            np.testing.assert_array_equal(parts.whole(kv), expected)
            with pytest.raises(ValueError, match=r"allowed: 0 to 9"):
                MoveBatch(1, queue).copy_out([10], store, [0])


def test_moves_hold_the_space_and_a_retired_one_is_stale():
    pool = np.random.default_rng(44).standard_normal((6, 1, 2, 4, 1, 256), np.float32)
    page = pool[0].nbytes
    with split(pool, 2) as parts, Segment(np.zeros(4 * page, np.uint8)) as store:
        with MovePool.of(parts.kv, parts.spaces) as queue:
            moves.set_delay(5, 20_000)
            batch = MoveBatch(4, queue)
            first = batch.copy_out([2, 3, 4, 5], store, np.arange(4) * page)
            kv = only_moves(parts.kv, batch, parts.spaces)
            parts.segments[0].retire()  # waits for them
            moves.set_delay(0, 0)
            assert (moves.poll(first)[0] == Status.DONE).all()
            batch = MoveBatch(4, queue)
            late = batch.copy_out([0, 2], store, np.arange(2) * page)
            kv = only_moves(kv, batch, parts.spaces)
            assert moves.drain(30)
            assert moves.poll(late)[0].tolist() == [Status.DONE, Status.SEGMENT_STALE]
        with pytest.raises(StaleHandleError):
            Spaces.behind(kv, Space(parts.segments[0], 1))


def test_abandoning_a_space_drops_moves_not_begun():
    pool = np.zeros((6, 1, 2, 4, 1, 256), np.float32)
    page = pool[0].nbytes
    with split(pool, 2) as parts, Segment(np.zeros(64 * page, np.uint8)) as store:
        with MovePool.of(parts.kv, parts.spaces) as queue:
            moves.set_delay(5, 20_000)
            batch = MoveBatch(64, queue)
            tickets = [batch.copy_out([4], store, [i * page], checksum=True) for i in range(64)]
            only_moves(parts.kv, batch, parts.spaces)
            parts.segments[0].retire(abandon=True)
            moves.set_delay(0, 0)
            assert moves.drain(30)
            statuses = moves.poll(np.concatenate(tickets))[0]
            assert set(statuses) <= {Status.DONE, Status.SEGMENT_STALE}
            assert (statuses == Status.SEGMENT_STALE).any()


@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_pages_behind_the_last_space(dtype):
    """An error on a CPU; a GPU takes them for absent and leaves copies of them out."""
    case = make_case(np.random.default_rng(45), [1], [60], kv_dtype=dtype)
    absent = dataclasses.replace(case, page_table=case.page_table.copy())
    absent.page_table[0, 1] = -1
    case.page_table[0, 1] = len(case.kv)
    src, dst, count = (jnp.array(x, jnp.int32) for x in ([0, len(case.kv)], [4, 1], [2]))
    with split(case.kv, 2, 3) as parts:
        if library.platform() == "cuda":
            _, expected = attend(absent, jnp.array(case.kv), None)
            kv, out = attend(case, parts.kv, parts.spaces)
            np.testing.assert_array_equal(np.asarray(out), np.asarray(expected))
            before = parts.whole(kv)
            kv = jax.jit(copy_pages)(kv, src, dst, count, spaces=parts.spaces)
            before[4] = before[0]
            np.testing.assert_array_equal(parts.whole(kv), before)
            return
        with pytest.raises(Exception, match=r"page_table of sequence 0, entry 1.*2 spaces"):
            attend(case, parts.kv, parts.spaces)
    with split(case.kv, 2, 3) as parts:
        with pytest.raises(Exception, match=r"page of copy 1.*2 spaces"):
            jax.jit(copy_pages)(parts.kv, src, dst, count, spaces=parts.spaces)


def test_a_step_on_a_cpu_is_a_user_of_its_spaces():
    """One that comes after the memory was retired fails instead of touching it."""
    case = make_case(np.random.default_rng(46), [1], [60])
    with split(case.kv, 3) as parts:
        parts.segments[0].retire()
        with pytest.raises(Exception, match=r"space 1: segment \d+ .* has been retired"):
            attend(case, parts.kv, parts.spaces)


def test_addresses_are_operands_and_compile_nothing():
    case = make_case(np.random.default_rng(47), [1, 5], [60, 20])
    traces = 0

    @jax.jit
    def step(kv, q, k, v, meta, spaces):
        nonlocal traces
        traces += 1
        return paged_attention(kv, q, k, v, meta, layer=0, scale=1.0, spaces=spaces)[1]

    arrays = [jnp.array(x) for x in (case.q, case.k, case.v)]
    outs = []
    for _ in range(2):
        with split(case.kv, 4) as parts:
            outs.append(np.asarray(step(parts.kv, *arrays, case.meta, parts.spaces)))
    assert traces == 1
    np.testing.assert_array_equal(*outs)


def test_without_spaces_there_is_no_operand():
    kv = jnp.zeros((4, 1, 2, 4, 1, 8))
    ids, count = jnp.zeros(2, jnp.int32), jnp.zeros(1, jnp.int32)
    text = jax.jit(lambda *a: copy_pages(*a, implementation="ffi")).lower(
        kv, ids, ids, count).as_text()
    assert "stablehlo.custom_call @aqua_copy_pages(%arg0, %arg1, %arg2, %arg3)" in text


def test_references_say_that_they_cannot():
    case = make_case(np.random.default_rng(48), [1], [20])
    with split(case.kv, 2) as parts:
        with pytest.raises(RuntimeError, match=r"paged_attention: got spaces.*allowed"):
            paged_attention(
                parts.kv, case.q, case.k, case.v, case.meta, layer=0, scale=1.0,
                implementation="reference", spaces=parts.spaces,
            )
        ids = jnp.zeros(1, jnp.int32)
        with pytest.raises(RuntimeError, match=r"copy_pages: got spaces.*allowed"):
            copy_pages(
                parts.kv, ids, ids, ids, implementation="reference", spaces=parts.spaces
            )


def test_bad_spaces_are_errors():
    kv = jnp.zeros((4, 1, 2, 4, 1, 8))
    with Segment(np.zeros(4096, np.uint8)) as segment:
        start = -segment.address % 64
        good = Space(segment, 1, start)
        Spaces.behind(kv, *[good] * MAX_SPACES)
        for bad in (
            [], [good] * (MAX_SPACES + 1), [Space(segment, 0, start)],
            [Space(segment, 16, start + 64)], [Space(segment, 1, -64)],
            [Space(segment, 1, start + 1)], [Space(segment, 2**31)],
            [Space(segment, 2, start, 32)], [Space(segment, 2, start, 500)],
            [Space(segment, 2, start, 4096)], [Space(segment, 2, start, -512)],
        ):
            with pytest.raises(ValueError, match=r"got .*; allowed: "):
                Spaces.behind(kv, *bad)
    ids = jnp.zeros(1, jnp.int32)
    for table in (np.zeros(8, np.int32), np.zeros((1, 7), np.int32), np.zeros((0, 8), np.int32),
                  np.zeros((1, SPACE_WORDS), np.uint32)):
        with pytest.raises(ValueError, match=r"table of spaces: got .*; allowed: "):
            copy_pages(kv, ids, ids, ids, implementation="ffi", spaces=Spaces(table))
