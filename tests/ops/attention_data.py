"""Random ragged batches over a random pool, for the tests of attention."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from aqua_jax.ops.attention import AttentionMetadata, paged_attention

BF16 = ml_dtypes.bfloat16


@dataclasses.dataclass
class Case:
    """One batch, as NumPy arrays (JAX may alias them: don't write to them after use)."""

    kv: np.ndarray
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    positions: np.ndarray
    query_starts: np.ndarray
    kv_lens: np.ndarray
    page_table: np.ndarray
    num_seqs: np.ndarray

    @property
    def meta(self) -> AttentionMetadata:
        return AttentionMetadata(
            *(
                jnp.array(x)
                for x in (
                    self.positions, self.query_starts, self.kv_lens, self.page_table,
                    self.num_seqs,
                )
            )
        )

    def run(self, implementation: str, **options) -> tuple[np.ndarray, np.ndarray]:
        """Pool and result, compiled with the pool donated."""
        options = {"layer": 0, "scale": self.q.shape[-1] ** -0.5} | options
        arrays = [jnp.array(x) for x in (self.kv, self.q, self.k, self.v)]
        kv, out = _compiled(implementation, **options)(*arrays, self.meta)
        return np.asarray(kv), np.asarray(out)


@functools.cache
def _compiled(implementation: str, **options):
    """Attention as a function that compiles once for each set of shapes."""
    step = functools.partial(paged_attention, implementation=implementation, **options)
    return jax.jit(lambda *arrays: step(*arrays), donate_argnums=0)


def make_case(
    rng: np.random.Generator,
    counts: list[int],
    lens: list[int],
    *,
    layers: int = 1,
    page_tokens: int = 16,
    kv_heads: int = 2,
    group: int = 2,
    dim: int = 64,
    kv_dtype=np.float32,
    q_dtype=np.float32,
    padding_rows: int = 0,
    padding_seqs: int = 0,
) -> Case:
    """Sequence s has lens[s] tokens after this step, counts[s] of them in it."""
    rows, seqs = sum(counts) + padding_rows, len(counts) + padding_seqs
    need = [-(-n // page_tokens) for n in lens]
    pages, width = sum(need) + 2, max([*need, 1])
    table = np.full((seqs, width), -1, np.int32)
    ids = rng.permutation(pages)
    positions = np.zeros(rows, np.int32)
    starts = np.full(seqs + 1, sum(counts), np.int32)
    kv_lens = np.zeros(seqs, np.int32)
    row = used = 0
    for s, (count, length) in enumerate(zip(counts, lens, strict=True)):
        starts[s], kv_lens[s] = row, length
        positions[row : row + count] = np.arange(length - count, length)
        table[s, : need[s]] = ids[used : used + need[s]]
        row, used = row + count, used + need[s]

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    return Case(
        kv=normal(pages, layers, 2, page_tokens, kv_heads, dim).astype(kv_dtype),
        q=normal(rows, kv_heads * group, dim).astype(q_dtype),
        k=normal(rows, kv_heads, dim),
        v=normal(rows, kv_heads, dim),
        positions=positions,
        query_starts=starts,
        kv_lens=kv_lens,
        page_table=table,
        num_seqs=np.array([len(counts)], np.int32),
    )


def random_case(rng: np.random.Generator) -> tuple[Case, dict]:
    """A mix of decodes and prompt chunks, with the options to run it with."""
    seqs = int(rng.integers(1, 5))
    counts = [int(rng.choice([0, 1, 1, 2, 9, 40])) for _ in range(seqs)]
    lens = [max(1, count + int(rng.integers(0, 120))) for count in counts]
    layers = int(rng.integers(1, 3))
    case = make_case(
        rng, counts, lens,
        layers=layers,
        page_tokens=int(rng.choice([1, 4, 16, 64])),
        kv_heads=int(rng.choice([1, 2, 3])),
        group=int(rng.choice([1, 3, 4, 7])),
        dim=int(rng.choice([5, 32, 64, 80, 96, 128])),
        kv_dtype=[np.float32, BF16][rng.integers(2)],
        q_dtype=[np.float32, BF16][rng.integers(2)],
        padding_rows=max(int(rng.integers(0, 5)), int(sum(counts) == 0)),
        padding_seqs=int(rng.integers(0, 3)),
    )
    window = [None, None, 1, 7, 50][rng.integers(5)]
    return case, {
        "layer": layers - 1, "window": window, "deterministic": bool(rng.integers(3) == 0)
    }


def naive(
    case: Case, *, layer: int = 0, window: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Pool and result by the definition, one row and head at a time, in float64."""
    pool = case.kv.copy()
    page_tokens, kv_heads, dim = pool.shape[3:]
    owners = [
        (s, row)
        for s in range(int(case.num_seqs[0]))
        for row in range(case.query_starts[s], case.query_starts[s + 1])
    ]
    for s, row in owners:
        at = case.positions[row]
        page = case.page_table[s, at // page_tokens]
        if page >= 0:
            pool[page, layer, 0, at % page_tokens] = case.k[row]
            pool[page, layer, 1, at % page_tokens] = case.v[row]
    kv = np.asarray(pool, np.float64)
    out = np.zeros(case.q.shape)
    group = case.q.shape[1] // kv_heads
    for s, row in owners:
        at = case.positions[row]
        keys = np.arange(0 if window is None else max(0, at + 1 - window), at + 1)
        pages = case.page_table[s, keys // page_tokens]
        keys, pages = keys[pages >= 0], pages[pages >= 0]
        if not len(keys):
            continue
        seen = kv[pages, layer, :, keys % page_tokens]  # [C, 2, K, D]
        for h in range(case.q.shape[1]):
            q = np.asarray(case.q[row, h], np.float64)
            score = seen[:, 0, h // group] @ q * dim**-0.5
            weight = np.exp(score - score.max())
            out[row, h] = weight / weight.sum() @ seen[:, 1, h // group]
    return pool, out
