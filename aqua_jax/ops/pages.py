"""Copies of whole pages: what copy on write needs at the head of a step."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from aqua_jax.ops import library
from aqua_jax.ops.spaces import Spaces, require_handlers

# Most copies of one call of the CUDA handler, which keeps their numbers in shared memory.
_MOST_ON_CUDA = 4096


def copy_pages(
    kv: jax.Array,
    src: jax.Array,
    dst: jax.Array,
    count: jax.Array,
    *,
    implementation: Literal["ffi", "reference"] | None = None,
    spaces: Spaces | None = None,
) -> jax.Array:
    """Copies page src[i] over page dst[i] for i < count, as if all sources were read first.

    Args:
      kv: [P, ...] the pool; updated in place when the compiled function donates it.
      src: i32[C] pages to read.
      dst: i32[C] pages to write, no two of them equal.
      count: i32[1] how many of the C pairs count; the rest is padding.
      implementation: `ffi`, `reference` (jnp, any platform), or None for the best there is.
      spaces: memory of ours that holds the pages from P on, to read and write as the pool's.

    Returns:
      The pool.

    Raises:
      ValueError: shapes don't fit together.
      RuntimeError: `ffi` was asked for, or spaces were given, and it isn't there (on GPUs: or not
        for so many copies); or, when run on a CPU, a page that doesn't exist or a space that has
        been retired. GPUs leave out such pairs.
    """
    if src.ndim != 1 or src.shape != dst.shape or count.shape != (1,):
        raise ValueError(
            f"copy_pages: shapes of src, dst, count: got {src.shape}, {dst.shape}, "
            f"{count.shape}; allowed: [C], [C], [1]"
        )
    usable = library.available("aqua_copy_pages") and (
        library.platform() != "cuda" or src.shape[0] <= _MOST_ON_CUDA
    )
    if implementation is None:
        implementation = "ffi" if usable else "reference"
    if implementation == "reference":
        require_handlers("copy_pages", spaces)
        valid = jnp.arange(src.shape[0]) < count[0]
        pages = kv.shape[0]
        sources = kv[jnp.where(valid, src, 0)]
        return kv.at[jnp.where(valid, dst, pages)].set(sources, mode="drop")
    if not usable:
        why = library.reason() or f"at most {_MOST_ON_CUDA} copies a call, not {src.shape[0]}"
        raise RuntimeError(f"copy_pages implementation 'ffi' is missing: {why}")
    call = jax.ffi.ffi_call(
        "aqua_copy_pages",
        jax.ShapeDtypeStruct(kv.shape, kv.dtype),
        input_output_aliases={0: 0},
    )
    return call(kv, src, dst, count, *(() if spaces is None else spaces.operands()))
