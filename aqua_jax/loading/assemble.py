"""One decoder parameter at a time out of a checkpoint: fused, converted, checked, transposed.

A parameter's tensors are laid row by row into one buffer `[out, in]` (fusing q, k, v or gate, up is
then just consecutive rows) in its final dtype, a few MiB decoded at a time, so that the memory
beyond the parameters themselves is one buffer of the largest one. Where several devices share the
model, there is a buffer for each one's part instead, and the file is still read once.
"""

from __future__ import annotations

import ctypes
import dataclasses
import math
import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import ml_dtypes
import numpy as np

from aqua_jax.errors import ModelLoadError
from aqua_jax.loading.checkpoint import Checkpoint, row_blocks
from aqua_jax.models.huggingface import ParamSource
from aqua_jax.parallel.rules import Cut
from aqua_jax.parallel.shards import Shards

Transform = Callable[[str, np.ndarray], "jax.Array | np.ndarray"]
_OWN_MAPPING = 1 << 20  # bytes from which an array gets its own mapping
_ALIGNMENT = 64  # bytes: what jax needs to take a NumPy buffer over without a copy
_TILE = 128  # rows and columns of a transposed tile: 32 KiB of bf16, inside the first-level cache
# Buffers of old checkpoints that are recomputed, not learned.
_IGNORED_SUFFIXES = (
    ".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".rotary_emb.cos_cached",
    ".rotary_emb.sin_cached",
)


def parameter_dtype(name: str, dtype: np.dtype) -> np.dtype:
    """Dtype of one decoder parameter: matrices have `dtype`, norm scales and biases float32."""
    return dtype if name.endswith((".kernel", ".embedding")) else np.dtype(np.float32)


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Uninitialised C-contiguous array that starts on a 64-byte boundary.

    Large ones get a mapping of their own, which goes back to the system when the array goes. From
    the heap, long-lived parameters between short-lived buffers left 270 of 570 MiB as holes.
    """
    size = math.prod(shape) * dtype.itemsize
    if size >= _OWN_MAPPING:
        mapping = mmap.mmap(-1, size)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            mapping.madvise(mmap.MADV_HUGEPAGE)
        return np.frombuffer(mapping, dtype).reshape(shape)
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def trim_heap() -> None:
    """Gives freed heap memory back to the system, where the C library can (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def is_finite(values: np.ndarray) -> bool:
    """Whether a C-contiguous bfloat16 or float32 array has no NaN and no infinity.

    Compares exponent bits as integers: one pass without a float temporary, 3 GB/s where
    `np.isfinite` of bfloat16 makes 0.2 GB/s.
    """
    if values.dtype == ml_dtypes.bfloat16:
        bits = values.reshape(-1).view(np.uint16)
        return not bits.size or int((bits & np.uint16(0x7FFF)).max()) < 0x7F80
    bits = values.reshape(-1).view(np.uint32)
    return not bits.size or int((bits & np.uint32(0x7FFFFFFF)).max()) < 0x7F800000


def transposed(matrix: np.ndarray) -> np.ndarray:
    """A C-contiguous, 64-byte aligned copy of `matrix.T`, tile by tile.

    NumPy's own strided copy of bfloat16 goes through its generic casting loop and misses the cache
    on every element of a large matrix.
    """
    rows, columns = matrix.shape
    out = aligned_empty((columns, rows), matrix.dtype)
    word = np.dtype(f"u{matrix.dtype.itemsize}")
    source, target = matrix.view(word), out.view(word)
    for start in range(0, rows, _TILE):
        stop = min(rows, start + _TILE)
        for left in range(0, columns, _TILE):
            right = min(columns, left + _TILE)
            target[left:right, start:stop] = source[start:stop, left:right].T
    return out


def check_complete(
    checkpoint: Checkpoint, table: Mapping[str, ParamSource], path: str, tied: bool
) -> None:
    """Compares the checkpoint's tensors with those the decoder needs, before any is read.

    Raises:
      ModelLoadError: missing, unexpected or wrongly shaped tensors, with names and shapes.
    """
    present = set(checkpoint.names())
    expected = {
        name: shape
        for source in table.values()
        for name, shape in zip(source.names, source.shapes, strict=True)
    }
    missing = [name for name in expected if name not in present]
    if missing:
        raise ModelLoadError(
            f"{path}: {len(missing)} of {len(expected)} tensors are missing: {_some(missing)}"
        )
    for name, shape in expected.items():
        if checkpoint.shape(name) != tuple(shape):
            raise ModelLoadError(
                f"{path}: tensor {name!r}: got shape {checkpoint.shape(name)}, "
                f"expected {tuple(shape)}"
            )
        if checkpoint.dtype(name).kind not in "fV":  # ml_dtypes' floats are of kind V
            raise ModelLoadError(
                f"{path}: tensor {name!r}: got dtype {checkpoint.dtype(name)}, expected floats"
            )
    ignored = {"lm_head.weight"} if tied else set()  # a copy of the embedding
    unexpected = [
        name for name in checkpoint.names()
        if name not in expected and name not in ignored and not name.endswith(_IGNORED_SUFFIXES)
    ]
    if unexpected:
        raise ModelLoadError(
            f"{path}: {len(unexpected)} tensors that config.json has no place for: "
            f"{_some(unexpected)}"
        )


def _some(names: list[str], count: int = 4) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(map(repr, names[:count])) + more


def auto_dtype(checkpoint: Checkpoint) -> np.dtype:
    """float32 when every matrix is stored with 32 bits or more, else bfloat16."""
    matrices = [name for name in checkpoint.names() if len(checkpoint.shape(name)) == 2]
    full = bool(matrices) and all(checkpoint.is_full_precision(name) for name in matrices)
    return np.dtype(np.float32) if full else np.dtype(ml_dtypes.bfloat16)


class _Part:
    """A device's part of a parameter, while the parameter's rows go by."""

    def __init__(self, cut: Cut, shape: tuple[int, ...], dtype: np.dtype):
        """`cut` and `shape` are in the stored orientation."""
        self._cut = cut
        size = list(shape)
        size[cut.axis] = cut.size
        self.array = aligned_empty(tuple(size), dtype)
        if cut.padding:
            np.moveaxis(self.array, cut.axis, 0)[cut.size - cut.padding :] = 0

    def take(self, first: int, block: np.ndarray) -> Iterator[np.ndarray]:
        """Copies what is its own of the rows from `first` on; yields the rows it has filled."""
        end, at = first + block.shape[0], 0
        for start, stop in self._cut.ranges:
            if self._cut.axis == 1:
                self.array[first:end, at : at + stop - start] = block[:, start:stop]
            elif (low := max(start, first)) < (high := min(stop, end)):
                target = self.array[at + low - start : at + high - start]
                target[...] = block[low - first : high - first]
                yield target
            at += stop - start
        if self._cut.axis == 1:
            yield self.array[first:end]


def _stored(cut: Cut, source: ParamSource) -> Cut:
    return dataclasses.replace(cut, axis=1 - cut.axis) if source.transpose else cut


def assemble(
    checkpoint: Checkpoint, source: ParamSource, dtype: np.dtype, path: str,
    cuts: Sequence[Cut] | None = None,
) -> list[np.ndarray]:
    """Parts of one parameter as stored in Hugging Face's orientation, `[out, in]` or `[out]`.

    Args:
      checkpoint: where it is; each row is read once.
      source: its tensors.
      dtype: of the result.
      path: for messages.
      cuts: the parts, in the decoder's orientation; None: one part, which is all of it.

    Raises:
      ModelLoadError: a value is NaN or infinite, or the file ends early.
    """
    rows = sum(shape[0] for shape in source.shapes)
    shape = (rows, *source.shapes[0][1:])
    whole = [Cut(0, ((0, rows),))]
    parts = [
        _Part(cut, shape, dtype)
        for cut in (whole if cuts is None else [_stored(cut, source) for cut in cuts])
    ]
    first = 0
    for name, tensor in zip(source.names, source.shapes, strict=True):
        for start, block in row_blocks(checkpoint, name):
            with np.errstate(over="ignore", invalid="ignore"):
                filled = [rows for part in parts for rows in part.take(first + start, block)]
            if not all(map(is_finite, filled)):
                raise ModelLoadError(
                    f"{path}: tensor {name!r}: NaN or infinity (as {dtype}) in rows {start} to "
                    f"{start + block.shape[0] - 1}"
                )
        first += tensor[0]
    return [part.array for part in parts]


def take_parts(array: np.ndarray, cuts: Sequence[Cut] | None) -> list[np.ndarray]:
    """Parts of a parameter in the decoder's orientation; None: one part, which is all of it."""
    if cuts is None:
        return [array]
    parts = []
    for cut in cuts:
        along = np.moveaxis(array, cut.axis, 0)
        padding = np.zeros((cut.padding, *along.shape[1:]), array.dtype)
        ranges = [along[start:stop] for start, stop in cut.ranges]
        parts.append(np.moveaxis(np.concatenate([*ranges, padding]), 0, cut.axis))
    return parts


def finish(name: str, array: np.ndarray, transform: Transform | None) -> jax.Array | np.ndarray:
    """A finished parameter through `transform`, if given; kernels `[in, out]` in C order.

    The caller has no other reference to `array`: a transform's unaligned result is copied
    afterwards, and the source buffer need not be there at the same time.
    """
    value = array if transform is None else transform(name, array)
    if isinstance(value, np.ndarray) and value.ndim == 2 and not value.flags.c_contiguous:
        value = transposed(value.T)
    return value


def _aligned(value: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
    """What jax takes over without a copy on a CPU."""
    if isinstance(value, jax.Array):
        return value
    if value.ctypes.data % _ALIGNMENT or not value.flags.c_contiguous:
        aligned = aligned_empty(value.shape, value.dtype)
        np.copyto(aligned, value)
        value = aligned
    return value


def place(
    name: str, parts: list[np.ndarray], transform: Transform | None, shards: Shards | None
) -> jax.Array:
    """Finishes a parameter's parts one by one and puts them where they belong.

    Args:
      name: dotted.
      parts: in the decoder's orientation; the list is emptied, so that each buffer goes with its
        turn.
      transform: as `finish` takes it.
      shards: whose parts they are; None: there is one, for the default device.
    """
    done: list[jax.Array] = []
    while parts:
        value = _aligned(finish(name, parts.pop(0), transform))
        if shards is None:
            return value if isinstance(value, jax.Array) else jax.device_put(value)
        if shards.cuts(name) is None:
            return shards.everywhere(value)
        done.append(shards.place(value, len(done)))
        del value
    assert shards is not None
    return shards.join(done)


def stream(
    checkpoint: Checkpoint, table: Mapping[str, ParamSource], dtype: np.dtype, path: str,
    transform: Transform | None, shards: Shards | None = None,
) -> Iterator[tuple[str, jax.Array]]:
    """Yields (dotted name, finished parameter) for every parameter of `table`.

    With `shards` each device has its part, see `parallel.shards`.

    Raises:
      ModelLoadError: as `assemble`.
    """
    for name, source in table.items():
        cuts = None if shards is None else shards.cuts(name)
        parts = assemble(checkpoint, source, parameter_dtype(name, dtype), path, cuts)
        if source.transpose:
            parts = [part.T for part in parts]
        yield name, place(name, parts, transform, shards)
