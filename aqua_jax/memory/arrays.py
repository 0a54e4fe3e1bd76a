"""JAX arrays as runs of bytes.

A tree of arrays becomes a `Layout`, its description without content, and a run of bytes in which
each distinct shard has its place: shards that are replicas of one another are there once.
`rebuild.py` makes arrays of it again.

On CPU a shard is read where it lies. Other devices send theirs to the host first.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from aqua_jax.errors import ConfigError, StoreError
from aqua_jax.memory.copies import Span
from aqua_jax.memory.extents import align

Index = tuple[tuple[int, int], ...]  # [start, stop) of each dimension


@dataclasses.dataclass(frozen=True)
class Shard:
    """A distinct part of an array.

    Attributes:
      index: which part.
      offset: where its bytes are in the run.
    """

    index: Index
    offset: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return tuple(stop - start for start, stop in self.index)


@dataclasses.dataclass(frozen=True, eq=False)
class Leaf:
    """An array without its content.

    Attributes:
      shape, dtype: of the bytes; of a key array those of its data.
      sharding: of the same; None for NumPy arrays.
      committed: whether it belongs to its devices; otherwise jax moves it to where it is used.
      weak: whether its type gives way to others in promotions.
      keys: of a key array, its implementation and its own sharding.
      shards: what there is of it in this process.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    sharding: jax.sharding.Sharding | None
    committed: bool = True
    weak: bool = False
    keys: tuple[Any, jax.sharding.Sharding] | None = None
    shards: list[Shard] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Layout:
    """A tree of arrays without their content.

    Attributes:
      treedef: its structure.
      leaves: its arrays; other leaves (numbers, text) stand for themselves.
      size: bytes of the run.
      struct: the tree with a `jax.ShapeDtypeStruct` for each array.
    """

    treedef: jax.tree_util.PyTreeDef
    leaves: tuple[Any, ...]
    size: int
    struct: Any


def layout_of(tree: Any) -> tuple[Layout, list[Any]]:
    """The layout of a tree, and for each leaf the array whose bytes count (None: no array).

    Raises:
      ConfigError: a leaf that can't be offloaded, with its place in the tree.
    """
    paths, treedef = jax.tree_util.tree_flatten_with_path(tree)
    leaves: list[Any] = []
    sources: list[Any] = []
    structs: list[Any] = []
    end = 0
    for path, value in paths:
        source: Any = value
        if isinstance(value, jax.Array):
            leaf, source = _describe(path, value)
            struct = jax.ShapeDtypeStruct(
                value.shape, value.dtype, sharding=value.sharding if leaf.committed else None
            )
        elif isinstance(value, np.ndarray):
            if value.dtype.hasobject:
                raise ConfigError(_name(path), value.dtype, "an array of numbers")
            leaf = Leaf(value.shape, value.dtype, None)
            struct = jax.ShapeDtypeStruct(value.shape, value.dtype)
        elif isinstance(value, (bool, int, float, complex, str, bytes, np.generic)):
            leaves.append(value)
            sources.append(None)
            structs.append(value)
            continue
        else:
            raise ConfigError(_name(path), value, "arrays of jax or NumPy, numbers, text")
        end = _lay_out(leaf, source, end)
        leaves.append(leaf)
        sources.append(source)
        structs.append(struct)
    return Layout(treedef, tuple(leaves), end, jax.tree.unflatten(treedef, structs)), sources


def _name(path: Any) -> str:
    return "x" + str(jax.tree_util.keystr(path))


def _describe(path: Any, value: jax.Array) -> tuple[Leaf, jax.Array]:
    """A leaf without shards, and the array of its bytes."""
    try:
        deleted = value.is_deleted()
        here = not deleted and bool(value.sharding.addressable_devices)
    except (AttributeError, TypeError, RuntimeError) as error:
        allowed = "a concrete array: nothing is offloaded inside jit"
        raise ConfigError(_name(path), type(value).__name__, allowed) from error
    if not here:
        allowed = "one that hasn't been deleted or donated, with a part in this process"
        raise ConfigError(_name(path), "a deleted array" if deleted else "no part of it", allowed)
    keys, source, weak = None, value, False
    if jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
        keys = jax.random.key_impl(value), value.sharding
        source = jax.random.key_data(value)
    else:
        weak = bool(value.weak_type)
    return Leaf(
        source.shape, np.dtype(source.dtype), source.sharding, value.committed, weak, keys
    ), source


def _lay_out(leaf: Leaf, source: Any, end: int) -> int:
    """Gives the leaf's shards places from `end` on; returns the new end."""
    for index in _shards(leaf, source):
        shard = Shard(index, end)
        leaf.shards.append(shard)
        end = align(end + bytes_of(leaf, shard))
    return end


def _shards(leaf: Leaf, source: Any) -> dict[Index, Any]:
    """The distinct parts of an array that this process has."""
    if leaf.sharding is None or (len(leaf.sharding.device_set) == 1 and _on_cpu(source)):
        return {whole_of(leaf.shape): source}
    shards = source.addressable_shards
    # Of replicas the first, so that they are there once.
    return {index_of(shard.index, leaf.shape): shard.data for shard in reversed(shards)}


def bytes_of(leaf: Leaf, shard: Shard) -> int:
    """How many a shard of it has."""
    return math.prod(shard.shape) * leaf.dtype.itemsize


def whole_of(shape: Sequence[int]) -> Index:
    """All of an array."""
    return tuple((0, size) for size in shape)


def index_of(slices: Sequence[slice], shape: Sequence[int]) -> Index:
    """Slices, as jax has them, as an index."""
    found = []
    for part, size in zip(slices, shape, strict=True):
        start, stop, _ = part.indices(size)
        found.append((start, stop))
    return tuple(found)


def parts_of(layout: Layout, sources: Sequence[Any], *, snapshot: bool) -> list[Any]:
    """Every shard of the run as an array of its own, in order; doesn't wait.

    Devices other than CPUs begin to send theirs to the host. The copies that jax makes there belong
    to the parts, and go with them.

    Args:
      layout: the description.
      sources: what `layout_of` returned with it.
      snapshot: copy NumPy arrays: their owner may write to them meanwhile.
    """
    found: list[Any] = []
    for leaf, source in zip(layout.leaves, sources, strict=True):
        if source is None:
            continue
        if leaf.sharding is None:
            found.append(source.copy() if snapshot else source)
            continue
        parts = _shards(leaf, source)
        for shard in leaf.shards:
            part = parts[shard.index]
            if not _on_cpu(part):
                part.copy_to_host_async()
            found.append(part)
    return found


def _on_cpu(array: Any) -> bool:
    return all(device.platform == "cpu" for device in array.sharding.device_set)


def ready(parts: Sequence[Any]) -> bool:
    """Whether every part has been computed."""
    return all(isinstance(part, np.ndarray) or part.is_ready() for part in parts)


def host_views(layout: Layout, parts: Sequence[Any]) -> list[tuple[Span, np.ndarray]]:
    """The parts' bytes in this process; waits until they are computed.

    Each comes with an array that keeps them there: a jax array that is deleted or donated
    meanwhile keeps its memory until that array goes (a donation makes a copy then).

    Raises:
      StoreError: an array was deleted before it was computed, or computing it failed.
    """
    shards = [shard for leaf in layout.leaves if isinstance(leaf, Leaf) for shard in leaf.shards]
    found = []
    for shard, part in zip(shards, parts, strict=True):
        try:
            view = np.ascontiguousarray(part)
        except RuntimeError as error:
            raise StoreError(f"an array can't be read any more: {error}") from error
        found.append((Span(shard.offset, view.ctypes.data, view.nbytes), view))
    return found
