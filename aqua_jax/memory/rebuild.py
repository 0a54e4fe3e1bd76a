"""Runs of bytes as JAX arrays again; `arrays.py` says what was where.

Arrays are rebuilt shard by shard, so that no device holds more than its own part. On CPU they lie
where they were copied to: memory from the system, which jax takes over without another copy.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from aqua_jax.errors import ConfigError
from aqua_jax.memory.arrays import Index, Layout, Leaf, bytes_of, index_of, whole_of
from aqua_jax.memory.copies import Span
from aqua_jax.memory.extents import ALIGN, align

# Shards below SMALL bytes are rebuilt in common buffers of at most BUFFER bytes, each of which
# stays as long as one of its arrays does. Larger ones have their own.
SMALL = 256 << 10
BUFFER = 4 << 20

Read = Callable[[list[Span]], None]


def rebuild(layout: Layout, read: Read, placements: Any = None) -> Any:
    """The tree with its content.

    Args:
      layout: its description.
      read: copies parts of the run to memory of this process.
      placements: where jax arrays go: None: where they were; a sharding or a device for all; or a
        tree of these, or None, as the layout's.

    Raises:
      ConfigError: a placement that doesn't fit, or needs parts that other processes hold.
    """
    leaves = list(layout.leaves)
    wanted = _placements(layout, placements)
    # One batch for all leaves that come back as they were, so that small ones share copies.
    plain = [
        (at, leaf) for at, leaf in enumerate(leaves)
        if isinstance(leaf, Leaf) and wanted[at] is None
    ]
    shards = [shard for _, leaf in plain for shard in leaf.shards]
    buffers = _Buffers(
        [(shard.offset, bytes_of(leaf, shard)) for _, leaf in plain for shard in leaf.shards]
    )
    read(buffers.spans)
    assert len(shards) == len(buffers.views)
    contents = iter(buffers.views)
    puts: list[np.ndarray] = []
    devices: list[Any] = []
    slots: list[tuple[int, Leaf, slice]] = []
    for at, leaf in plain:
        views = {
            shard.index: _typed(next(contents), leaf.dtype, shard.shape) for shard in leaf.shards
        }
        if leaf.sharding is None:
            leaves[at] = views[whole_of(leaf.shape)]
            continue
        first = len(puts)
        for device, index in _parts(leaf.sharding, leaf.shape):
            puts.append(views[index])
            devices.append(_single(leaf.sharding, device) if leaf.committed else None)
        slots.append((at, leaf, slice(first, len(puts))))
    arrays = _put(puts, devices)
    for at, leaf, numbers in slots:
        leaves[at] = _finish(leaf, arrays[numbers])
    for at, placement in enumerate(wanted):
        if placement is not None:
            leaves[at] = _elsewhere(leaves[at], read, placement)
    return jax.tree.unflatten(layout.treedef, leaves)


def _placements(layout: Layout, placements: Any) -> list[jax.sharding.Sharding | None]:
    """A placement for each leaf; None: as it was."""
    count = len(layout.leaves)
    if placements is None or isinstance(placements, (jax.sharding.Sharding, jax.Device)):
        given = [placements] * count
    else:
        try:
            given = layout.treedef.flatten_up_to(placements)
        except ValueError as error:
            raise ConfigError("sharding", placements, f"a tree like it: {error}") from None
    found: list[jax.sharding.Sharding | None] = []
    for leaf, placement in zip(layout.leaves, given, strict=True):
        if not isinstance(leaf, Leaf) or leaf.sharding is None:
            placement = None
        elif isinstance(placement, jax.Device):
            placement = jax.sharding.SingleDeviceSharding(placement)
        elif placement is not None and not isinstance(placement, jax.sharding.Sharding):
            raise ConfigError("sharding", placement, "a sharding, a device, or None")
        own = leaf.keys[1] if isinstance(leaf, Leaf) and leaf.keys else getattr(
            leaf, "sharding", None
        )
        as_it_was = placement == own and getattr(leaf, "committed", True)
        found.append(None if as_it_was else placement)
    return found


def _aligned(size: int) -> np.ndarray:
    """u8[size] fresh memory that jax takes over without a copy."""
    raw = np.empty(size + ALIGN, np.uint8)
    start = -raw.ctypes.data % ALIGN
    return raw[start : start + size]


def _typed(view: np.ndarray, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    return view.view(dtype).reshape(shape)


class _Buffers:
    """Fresh memory for parts of a run, neighbours together while they are small.

    Attributes:
      spans: what to read where.
      views: u8, the bytes of each part, in the order given.
    """

    def __init__(self, parts: Sequence[tuple[int, int]]) -> None:
        """Takes (offset, bytes) of each, ascending."""
        self.spans: list[Span] = []
        self.views: list[np.ndarray] = []
        first = 0
        while first < len(parts):
            start, size = parts[first]
            end, last = start + size, first + 1
            while last < len(parts) and size < SMALL:
                offset, more = parts[last]
                if more >= SMALL or offset != align(end) or offset + more - start > BUFFER:
                    break
                end, last = offset + more, last + 1
            buffer = _aligned(end - start)
            if end > start:
                self.spans.append(Span(start, buffer.ctypes.data, end - start))
            self.views += [buffer[o - start : o - start + n] for o, n in parts[first:last]]
            first = last


def _parts(
    sharding: jax.sharding.Sharding, shape: tuple[int, ...]
) -> list[tuple[jax.Device, Index]]:
    """This process's devices of a sharding, each with its part."""
    if isinstance(sharding, jax.sharding.SingleDeviceSharding):
        return [(device, whole_of(shape)) for device in sharding.device_set]
    return [
        (device, index_of(index or (), shape))
        for device, index in sharding.addressable_devices_indices_map(shape).items()
    ]


def _single(sharding: jax.sharding.Sharding, device: jax.Device) -> Any:
    """The placement of one device's part: the device, and its kind of memory if not the usual."""
    kind = sharding.memory_kind
    if kind is None or kind == device.default_memory().kind:
        return device
    return jax.sharding.SingleDeviceSharding(device, memory_kind=kind)


def _put(arrays: list[np.ndarray], devices: list[Any]) -> list[jax.Array]:
    """`device_put` in as few calls as can be: 1,000 small arrays take 15 ms in one, 31 one by one.

    The buffers are the arrays' own afterwards.
    """
    found: list[Any] = [None] * len(arrays)
    loose = [at for at, device in enumerate(devices) if device is None]
    bound = [at for at, device in enumerate(devices) if device is not None]
    if loose:
        for at, array in zip(loose, jax.device_put([arrays[at] for at in loose]), strict=True):
            found[at] = array
    if bound:
        same = len({devices[at] for at in bound}) == 1
        where = devices[bound[0]] if same else [devices[at] for at in bound]
        put = jax.device_put([arrays[at] for at in bound], where)
        for at, array in zip(bound, put, strict=True):
            found[at] = array
    return found


@functools.lru_cache(maxsize=256)
def _weakener(shape: tuple[int, ...], dtype: np.dtype, sharding: Any) -> Any:
    """The identity, compiled for a weak type: the public way to make an array of one."""
    struct = jax.ShapeDtypeStruct(shape, dtype, weak_type=True, sharding=sharding)
    return jax.jit(lambda x: x).lower(struct).compile()


def _finish(leaf: Leaf, parts: list[jax.Array]) -> jax.Array:
    """The array of its parts, one on each device."""
    assert leaf.sharding is not None
    array = parts[0]
    if leaf.committed and array.sharding != leaf.sharding:
        array = jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, parts)
    if leaf.weak:
        array = _weakener(leaf.shape, leaf.dtype, leaf.sharding if leaf.committed else None)(array)
    if leaf.keys is not None:
        implementation, sharding = leaf.keys
        array = jax.random.wrap_key_data(array, impl=implementation)
        if leaf.committed and array.sharding != sharding:
            array = jax.device_put(array, sharding)
    return array


def _elsewhere(leaf: Leaf, read: Read, sharding: jax.sharding.Sharding) -> jax.Array:
    """The array under another sharding, put together on the host part by part."""
    if leaf.keys is not None:
        # Shardings of keys and of their data differ in rank; keys are small.
        own = rebuild_one(leaf, read)
        return jax.device_put(own, sharding)
    try:
        parts = _parts(sharding, leaf.shape)
        sharding.shard_shape(leaf.shape)
    except (ValueError, IndexError) as error:
        raise ConfigError("sharding", sharding, f"one for {leaf.shape}: {error}") from None
    views = {index: _assemble(leaf, read, index) for index in dict.fromkeys(i for _, i in parts)}
    arrays = _put(
        [views[index] for _, index in parts], [_single(sharding, device) for device, _ in parts]
    )
    return _finish(dataclasses.replace(leaf, sharding=sharding, committed=True), arrays)


def rebuild_one(leaf: Leaf, read: Read) -> jax.Array:
    """One array where it was."""
    layout = Layout(jax.tree.structure(0), (leaf,), 0, None)
    array: jax.Array = rebuild(layout, read)
    return array


def _within(part: Sequence[tuple[int, int]], whole: Index) -> tuple[slice, ...]:
    """A part of an array as slices of a larger part."""
    return tuple(
        slice(low - start, high - start)
        for (low, high), (start, _) in zip(part, whole, strict=True)
    )


def _assemble(leaf: Leaf, read: Read, index: Index) -> np.ndarray:
    """The part `index` of an array, from the shards that meet it."""
    for shard in leaf.shards:
        if shard.index == index:
            buffers = _Buffers([(shard.offset, bytes_of(leaf, shard))])
            read(buffers.spans)
            return _typed(buffers.views[0], leaf.dtype, shard.shape)
    shape = tuple(stop - start for start, stop in index)
    size = math.prod(shape)
    part = _typed(_aligned(size * leaf.dtype.itemsize), leaf.dtype, shape)
    found = 0
    for shard in leaf.shards:
        shared = [
            (max(a, c), min(b, d)) for (a, b), (c, d) in zip(index, shard.index, strict=True)
        ]
        if size == 0 or any(low >= high for low, high in shared):
            continue
        buffers = _Buffers([(shard.offset, bytes_of(leaf, shard))])
        read(buffers.spans)
        source = _typed(buffers.views[0], leaf.dtype, shard.shape)
        part[_within(shared, index)] = source[_within(shared, shard.index)]
        found += math.prod(high - low for low, high in shared)
    if found < size:
        raise ConfigError(
            "sharding", index, "parts that this process offloaded; others hold the rest"
        )
    return part
