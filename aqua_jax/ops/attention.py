"""Paged attention: writes this step's keys and values into the pool and attends, as one operation.

One operation because the pool is updated in place: a separate write, then a read, makes XLA keep
or copy the pool (gigabytes) whenever it can't prove their order.

Letters: T tokens of the step, S sequences, P pool pages, L layers, H query heads, K kv heads,
G = H / K, D head dim, C keys of one sequence (max_pages * page_tokens).
"""

from __future__ import annotations

import ctypes
import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from aqua_jax.ops import library
from aqua_jax.ops.spaces import Spaces, require_handlers

Implementation = Literal["ffi", "reference"]

# Dtypes by the number that ffi/cuda gives them; the CPU's handler has no f16.
_TYPES = {"float32": 0, "bfloat16": 1, "float16": 2}
# Rows the reference takes at once: each gathers its sequence's keys and values, C * K * D * 8
# bytes, so all rows of a long prompt together would need gigabytes.
_REFERENCE_ROWS = 16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionMetadata:
    """Which rows belong to which sequence, and where its keys and values lie. All int32.

    Sequence s < num_seqs owns rows query_starts[s]:query_starts[s+1], at consecutive positions
    that end at kv_lens[s] - 1. Rows from query_starts[num_seqs] on are padding, as are sequences
    from num_seqs on.
    """

    positions: jax.Array  # [T] position of each row in its sequence
    query_starts: jax.Array  # [S + 1]
    kv_lens: jax.Array  # [S] tokens of the sequence, this step's included
    # [S, max_pages] pages of the pool, or of spaces; negative: absent, its keys are invisible
    page_table: jax.Array
    num_seqs: jax.Array  # [1]


def paged_attention(
    kv: jax.Array,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    meta: AttentionMetadata,
    *,
    layer: int,
    scale: float,
    window: int | None = None,
    deterministic: bool = False,
    implementation: Implementation | None = None,
    spaces: Spaces | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Writes k, v into their pages of `layer`, then attends causally over the pages.

    Args:
      kv: [P, L, 2, page_tokens, K, D], f32 or bf16, on GPUs also f16; page_tokens a power of two.
        Updated in place when the compiled function donates it and reads it nowhere after this
        call.
      q: [T, H, D], of any of these dtypes; H a multiple of K.
      k: [T, K, D], likewise; rounded to kv's dtype.
      v: as k.
      meta: the ragged batch.
      layer: which layer of the pool.
      scale: factor of the scores, > 0.
      window: a query sees itself and window - 1 tokens before; None: all before.
      deterministic: a row's result is the same to the last bit whatever else is in the batch and
        however its prompt was cut into steps. On CPUs, rows may go through matrix units without
        it, with q and the softmax weights rounded to bf16 when kv is bf16; on GPUs that holds for
        16-bit pools in either mode, and it gives up splitting a long decode's keys.
      implementation: `ffi`, `reference` (jnp, any platform; deterministic only as far as XLA is),
        or None for the best there is.
      spaces: memory of ours that holds the pages from P on; None: there are only the pool's.

    Returns:
      kv, and the result [T, H, D] in q's dtype. Padding rows, and rows that see no key, are 0.

    Raises:
      ValueError: shapes, dtypes or static arguments don't fit together.
      RuntimeError: `ffi` was asked for, or spaces were given, and it isn't there or has no kernel
        for these shapes; or, when run on a CPU, metadata points outside pool and spaces or
        contradicts itself, or a space has been retired (the donated pool is lost then: check on the
        host). A GPU can't tell: pages that don't exist count as absent, and sequences that
        contradict themselves are skipped, their rows 0.
    """
    _check(kv, q, k, v, meta, layer, scale, window)
    results = [jax.ShapeDtypeStruct(kv.shape, kv.dtype), jax.ShapeDtypeStruct(q.shape, q.dtype)]
    usable, missing = library.available("aqua_attention"), library.reason()
    if usable and library.platform() == "cuda":
        # Scratch memory is a result there: what allocates can't be part of a command buffer.
        workspace = _workspace_bytes(kv, q, meta, deterministic)
        results.append(jax.ShapeDtypeStruct((workspace,), jnp.uint8))
        usable, missing = workspace > 0, f"no kernel for a pool {kv.dtype}{kv.shape}"
    if implementation is None:
        implementation = "ffi" if usable else "reference"
    if implementation == "reference":
        require_handlers("paged_attention", spaces)
        return _reference(kv, q, k, v, meta, layer, scale, window)
    if not usable:
        raise RuntimeError(f"attention implementation 'ffi' is missing: {missing}")
    call = jax.ffi.ffi_call("aqua_attention", results, input_output_aliases={0: 0})
    kv, out, *_ = call(
        kv, q, k, v,
        meta.positions, meta.query_starts, meta.kv_lens, meta.page_table, meta.num_seqs,
        *(() if spaces is None else spaces.operands()),
        layer=np.int64(layer), scale=np.float32(scale), window=np.int64(window or 0),
        deterministic=bool(deterministic),
    )
    return kv, out


def no_kernel_for(
    kv_dtype: Any, heads: int, kv_heads: int, head_dim: int, page_tokens: int
) -> str:
    """Why the compiled handler of this platform can't take such a pool; empty if it can."""
    if not library.available("aqua_attention"):
        return library.reason() or f"the platform {library.platform()} has no aqua_attention"
    if library.platform() != "cuda":
        return ""
    name = jnp.dtype(kv_dtype).name
    if _ask_workspace(name, 1, heads, 1, page_tokens, kv_heads, head_dim, False):
        return ""
    return (f"no kernel for {heads} heads over {kv_heads} of {head_dim} elements, "
            f"{name}, {page_tokens} tokens a page")


def _workspace_bytes(
    kv: jax.Array, q: jax.Array, meta: AttentionMetadata, deterministic: bool
) -> int:
    """Scratch memory of the CUDA handler for these shapes; 0 if it has no kernel for them."""
    _, _, _, page_tokens, kv_heads, dim = kv.shape
    return _ask_workspace(
        kv.dtype.name, *q.shape[:2], meta.kv_lens.shape[0], page_tokens, kv_heads, dim,
        deterministic,
    )


def _ask_workspace(dtype: str, *shape_and_mode: int) -> int:
    """shape_and_mode: tokens, heads, seqs, page_tokens, kv_heads, head_dim, deterministic."""
    native = library.symbols()
    assert native is not None
    ask = native.aqua_attention_workspace
    ask.restype = ctypes.c_int64
    ask.argtypes = [ctypes.c_int32, *[ctypes.c_int64] * 6, ctypes.c_int32]
    return ask(_TYPES[dtype], *shape_and_mode)


def _check(
    kv: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, meta: AttentionMetadata,
    layer: int, scale: float, window: int | None,
) -> None:
    def require(ok: bool, what: str, got: object, allowed: str) -> None:
        if not ok:
            raise ValueError(f"paged_attention: {what}: got {got}; allowed: {allowed}")

    types = [name for name in _TYPES if name != "float16" or library.platform() == "cuda"]
    for name, array in (("kv", kv), ("q", q), ("k", k), ("v", v)):
        require(array.dtype.name in types, f"dtype of {name}", array.dtype, " or ".join(types))
    require(kv.ndim == 6 and kv.shape[2] == 2, "shape of kv", kv.shape,
            "[P, L, 2, page_tokens, K, D]")
    _, layers, _, page_tokens, kv_heads, dim = kv.shape
    require(page_tokens & (page_tokens - 1) == 0, "page_tokens", page_tokens, "a power of two")
    require(q.ndim == 3 and q.shape[2] == dim and q.shape[1] % kv_heads == 0, "shape of q",
            q.shape, f"[T, a multiple of {kv_heads}, {dim}]")
    rows = (q.shape[0], kv_heads, dim)
    require(k.shape == rows and v.shape == rows and k.dtype == v.dtype, "shapes of k, v",
            (k.shape, v.shape), f"{rows}, of one dtype")
    seqs = meta.kv_lens.shape[0]
    require(
        meta.positions.shape == (q.shape[0],) and meta.query_starts.shape == (seqs + 1,)
        and meta.page_table.ndim == 2 and meta.page_table.shape[0] == seqs
        and meta.num_seqs.shape == (1,),
        "shapes of meta", jax.tree.map(jnp.shape, meta),
        "positions [T], query_starts [S + 1], kv_lens [S], page_table [S, max_pages], "
        "num_seqs [1]",
    )
    require(0 <= layer < layers, "layer", layer, f"0 to {layers - 1}")
    require(scale > 0, "scale", scale, "> 0")
    require(window is None or window >= 1, "window", window, "None or >= 1")


def _reference(
    kv: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, meta: AttentionMetadata,
    layer: int, scale: float, window: int | None,
) -> tuple[jax.Array, jax.Array]:
    pages, _, _, page_tokens, kv_heads, dim = kv.shape
    rows, heads, _ = q.shape
    index = jnp.arange(meta.query_starts.shape[0])
    starts = jnp.where(index <= meta.num_seqs[0], meta.query_starts, jnp.iinfo(jnp.int32).max)
    row = jnp.arange(rows)
    valid = row < meta.query_starts[meta.num_seqs[0]]
    seq = jnp.clip(jnp.searchsorted(starts, row, side="right") - 1, 0, meta.kv_lens.shape[0] - 1)

    page = meta.page_table[seq, meta.positions // page_tokens]
    page = jnp.where(valid & (page >= 0), page, pages)  # out of range: dropped
    slot = meta.positions % page_tokens
    kv = kv.at[page, layer, 0, slot].set(k.astype(kv.dtype), mode="drop")
    kv = kv.at[page, layer, 1, slot].set(v.astype(kv.dtype), mode="drop")

    def one_row(arg: tuple[jax.Array, jax.Array, jax.Array, jax.Array]) -> jax.Array:
        q_row, seq_row, position, row_valid = arg
        table = meta.page_table[seq_row]
        both = kv[jnp.maximum(table, 0), layer].astype(jnp.float32)  # [pages, 2, tokens, K, D]
        keys = both[:, 0].reshape(-1, kv_heads, dim)
        values = both[:, 1].reshape(-1, kv_heads, dim)
        at = jnp.arange(keys.shape[0])
        visible = (at <= position) & jnp.repeat(table >= 0, page_tokens) & row_valid
        if window is not None:
            visible &= at > position - window
        grouped = q_row.astype(jnp.float32).reshape(kv_heads, heads // kv_heads, dim)
        # Slots nobody wrote may hold anything, so zero what is not visible: 0 * nan is nan.
        keys = jnp.where(visible[:, None, None], keys, 0.0)
        values = jnp.where(visible[:, None, None], values, 0.0)
        score = jnp.einsum("kgd,ckd->kgc", grouped, keys, precision="highest") * scale
        score = jnp.where(visible, score, -jnp.inf)
        weight = jax.nn.softmax(score, axis=-1, where=visible)
        result = jnp.einsum("kgc,ckd->kgd", weight, values, precision="highest")
        return jnp.where(visible.any(), result, 0.0).reshape(heads, dim).astype(q.dtype)

    out = jax.lax.map(
        one_row, (q, seq, meta.positions, valid), batch_size=min(rows, _REFERENCE_ROWS)
    )
    return kv, out
