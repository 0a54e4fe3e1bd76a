"""Matrix products against weights that stand in a layout made for the matrix units.

`pack` writes a matrix [k, n] as panels of 64 output columns. Inside a panel come steps of 64 bytes
per row of the left operand (32 bf16 or 16 f32 values of k), and inside a step the 16 lines that
AMX tiles, AVX512-BF16 and plain vectors all read as they are (it is oneDNN's BA16a64b2a, and
BA16a64b for f32):

    bf16  [ceil(n/64), ceil(k/32), 16, 64, 2]    element [j//64, i//32, i%32//2, j%64, i%2]
    f32   [ceil(n/64), ceil(k/16), 16, 64]       element [j//64, i//16, i%16,    j%64]

What is beyond k and n is zero. A panel is contiguous, so the products of few rows, which wait for
memory, read the weights once and in order.

Two implementations: "ffi" (C++ kernels, ffi/cpu/linear*.cc; packed weights on a CPU) and "xla"
(anything; packed weights are unpacked first, so it is the oracle and no competitor there). With
"ffi" a row's result depends bitwise on nothing but the row and the weights: not on how many rows
there are, where it stands, or on `rows`.

Legend: T rows, k input features, n output features, V vocabulary.
"""

from __future__ import annotations

import math
import mmap
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aqua_jax.ops import library

PANEL = 64  # output columns of a panel
LINES = 16  # lines of a step
_PACK_PANELS = 8  # that `pack` takes at a time, so that it reads rows in runs of 1 KiB
_HUGE_PAGE = 2 * 1024 * 1024  # bytes

Norm = tuple[jax.Array, float]  # RMSNorm before the product: scale f32 [k], eps


def packed_shape(k: int, n: int, dtype: jax.typing.DTypeLike) -> tuple[int, ...]:
    """Shape of `pack`'s result for a [k, n] matrix.

    Raises:
      ValueError: dtype is neither bfloat16 nor float32.
    """
    panels = -(-n // PANEL)
    if jnp.dtype(dtype) == jnp.bfloat16:
        return panels, -(-k // (2 * LINES)), LINES, PANEL, 2
    if jnp.dtype(dtype) == jnp.float32:
        return panels, -(-k // LINES), LINES, PANEL
    raise ValueError(f"dtype is {jnp.dtype(dtype).name}; packed weights are bfloat16 or float32")


def is_packed(w: Any) -> bool:
    """Whether `w` has the rank of a packed matrix."""
    return w.ndim in (4, 5)


def pack(w: np.ndarray, dtype: jax.typing.DTypeLike) -> np.ndarray:
    """The packed layout of a matrix.

    Goes over blocks of columns: beside the result it needs 512 of them, so a view of a
    memory-mapped file streams through. Hand the result to `jax.device_put`, which takes its memory
    over; `jnp.asarray` copies it. A tied head is `pack(embedding.T, dtype)`.

    Args:
      w: [k, n], any float dtype and any strides.
      dtype: bfloat16 or float32.

    Raises:
      ValueError: w is not a matrix, or the dtype is another one.
    """
    if w.ndim != 2:
        raise ValueError(f"w has shape {w.shape}; only matrices can be packed")
    k, n = w.shape
    shape = packed_shape(k, n, dtype)
    out = _zeros(shape, jnp.dtype(dtype))
    paired = len(shape) == 5
    # Bits, since numpy handles 16-bit integers many times faster than a registered dtype.
    bits = np.uint16 if paired else np.uint32
    block = np.zeros((shape[1] * LINES * (2 if paired else 1), _PACK_PANELS * PANEL), bits)
    lanes = out.reshape(-1).view(np.uint32).reshape(shape[0], shape[1] * LINES, PANEL)
    for first in range(0, shape[0], _PACK_PANELS):
        columns = np.asarray(w[:, first * PANEL : (first + _PACK_PANELS) * PANEL], dtype=out.dtype)
        if columns.shape[1] < block.shape[1]:
            block[:] = 0
        block[:k, : columns.shape[1]] = columns.view(bits)
        for index in range(first, min(first + _PACK_PANELS, shape[0])):
            panel = block[:, (index - first) * PANEL :][:, :PANEL]
            if paired:  # two k to a 32-bit lane, the first in the lower half
                np.left_shift(panel[1::2], 16, out=lanes[index], dtype=np.uint32)
                lanes[index] |= panel[0::2]
            else:
                lanes[index] = panel
    return out


def _zeros(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """A zeroed array that `jax.device_put` takes over without a copy, in huge pages if it is large.

    Reading 98 MB of weights on two threads took 8.0 core-ms in 4 KiB pages and 6.6 in 2 MiB ones.
    An array of more than 1 MiB may keep up to 2 MiB more resident than it holds.
    """
    size = math.prod(shape) * dtype.itemsize
    huge = hasattr(mmap, "MADV_HUGEPAGE") and size > _HUGE_PAGE // 2
    alignment = _HUGE_PAGE if huge else 64
    memory: Any
    if huge:
        memory = mmap.mmap(-1, size + alignment, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
    else:
        memory = np.zeros(size + alignment, np.uint8)
    data = np.frombuffer(memory, np.uint8)
    start = -data.ctypes.data % alignment
    return data[start : start + size].view(dtype).reshape(shape)


def unpack(packed: Any, k: int, n: int) -> Any:
    """The matrix [k, n] that was packed; numpy in, numpy out, and jax likewise."""
    order = (1, 2, 4, 0, 3) if packed.ndim == 5 else (1, 2, 0, 3)
    padded_n = packed.shape[0] * PANEL
    return packed.transpose(order).reshape(packed.size // padded_n, padded_n)[:k, :n]


def embed_rows(packed: jax.Array, tokens: jax.Array, d: int) -> jax.Array:
    """Rows of the embedding table of which `packed` is the transpose.

    Args:
      packed: `pack(embedding.T)`, embedding [V, d].
      tokens: i32 [T], each in [0, V).
      d: features.

    Returns:
      [T, d] in the weights' dtype.
    """
    rows = packed[tokens // PANEL, :, :, tokens % PANEL]  # [T, steps, 16] (+ [2])
    return rows.reshape(tokens.shape[0], -1)[:, :d]


def optional(array: jax.Array | None, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The operand a handler takes for "absent": no elements."""
    return jnp.zeros((0,), dtype) if array is None else array.astype(dtype)


def use_ffi(implementation: str | None, target: str, supported: bool, why_not: str) -> bool:
    """Whether an op takes its C++ implementation.

    Args:
      implementation: what the caller asked for: None (whatever is fastest), "ffi" or "xla".
      target: the handler's name.
      supported: whether the arguments suit the C++ implementation.
      why_not: what is wrong with them otherwise.

    Raises:
      ValueError: an unknown implementation, or "ffi" where it can't run.
    """
    if implementation not in (None, "ffi", "xla"):
        raise ValueError(f"implementation is {implementation!r}; allowed: None, 'ffi', 'xla'")
    if implementation == "xla":
        return False
    on_cpu = library.platform() == "cpu"
    if implementation == "ffi":
        if not library.available(target):
            raise ValueError(f"implementation 'ffi' can't be used: {library.reason()}")
        if not (supported and on_cpu):
            raise ValueError(
                "implementation 'ffi' can't be used: "
                + (why_not if on_cpu else "the platform is no CPU")
            )
        return True
    return supported and on_cpu and library.available(target)


def rms_norm(x: jax.Array, norm: Norm) -> jax.Array:
    """x [..., k] -> f32 [..., k], each row divided by its root mean square and scaled."""
    scale, eps = norm
    x = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(mean_square + eps) * scale


def zero_beyond(out: jax.Array, rows: jax.Array | None) -> jax.Array:
    """out [T, n] with the rows from `rows` (i32 [1]) on set to 0."""
    if rows is None:
        return out
    return jnp.where(jnp.arange(out.shape[0])[:, None] < rows[0], out, 0)


def _xla(
    x: jax.Array,
    w: jax.Array,
    in_features: int,
    out_features: int,
    bias: jax.Array | None,
    norm: Norm | None,
    residual: jax.Array | None,
    rows: jax.Array | None,
) -> jax.Array:
    """The product through XLA: x [T, k] -> f32 [T, n]."""
    if is_packed(w):
        w = unpack(w, in_features, out_features)
    if norm is not None:
        x = rms_norm(x, norm)
    x = x.astype(w.dtype)
    # XLA's single-row product on a CPU takes 121 ms in a 110M model where two rows take 12.
    alone = x.shape[0] == 1
    if alone:
        x = jnp.concatenate([x, jnp.zeros_like(x)])
    out = jax.lax.dot_general(x, w, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    if alone:
        out = out[:1]
    if bias is not None:
        out = out + bias
    if residual is not None:
        out = out + residual
    return zero_beyond(out, rows)


def linear(
    x: jax.Array,
    w: jax.Array,
    *,
    in_features: int,
    out_features: int,
    bias: jax.Array | None = None,
    rows: jax.Array | None = None,
    norm: Norm | None = None,
    residual: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """`rms_norm(x) @ w + bias + residual`, in f32, with what is absent left out.

    Args:
      x: [..., k], f32 or bf16; rounded to the weights' dtype (after the norm).
      w: [k, n] or packed, bf16 or f32. Sums are f32 either way.
      in_features: k.
      out_features: n.
      bias: f32 [n].
      rows: i32 [1], how many leading rows (of x flattened to [T, k]) count; the others come out
        as 0 and cost next to nothing with "ffi". None: all.
      norm: scale f32 [k] and eps of an RMSNorm of x; inside the C++ op it costs no extra pass.
      residual: f32 [..., n].
      implementation: None (the fastest that can run), "ffi" or "xla".

    Returns:
      f32 [..., n].

    Raises:
      ValueError: shapes that don't fit, an unknown implementation, or "ffi" where it can't run.
    """
    if x.shape[-1] != in_features:
        raise ValueError(f"x has {x.shape[-1]} features; in_features is {in_features}")
    expected = (
        packed_shape(in_features, out_features, w.dtype)
        if is_packed(w)
        else (in_features, out_features)
    )
    if w.shape != expected:
        raise ValueError(f"w has shape {w.shape}; {in_features} x {out_features} needs {expected}")
    leading = x.shape[:-1]
    count = math.prod(leading)
    flat = x.reshape(count, in_features)
    added = None if residual is None else residual.reshape(count, out_features)
    if not use_ffi(implementation, "aqua_linear", is_packed(w), "the weights are not packed"):
        out = _xla(flat, w, in_features, out_features, bias, norm, added, rows)
        return out.reshape(*leading, out_features)
    if flat.dtype not in (jnp.bfloat16, jnp.float32):
        flat = flat.astype(jnp.float32)
    out = jax.ffi.ffi_call(
        "aqua_linear", jax.ShapeDtypeStruct((count, out_features), jnp.float32)
    )(
        flat,
        w,
        optional(bias, jnp.float32),
        optional(None if norm is None else norm[0], jnp.float32),
        optional(added, jnp.float32),
        optional(rows, jnp.int32),
        norm_eps=np.float32(0.0 if norm is None else norm[1]),
    )
    return out.reshape(*leading, out_features)
