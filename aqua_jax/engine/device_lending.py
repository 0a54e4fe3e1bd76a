"""A GPU's memory to lend.

For a process that does nothing else with it (`aqua-jax lend --device`): in segments, each allocated
and given back by itself, for memory of a GPU can't be returned in parts. jax is not started, so no
share of the GPU goes to XLA's allocator. And for an engine that lends pages it doesn't need: the
same as extents at consecutive addresses, outside XLA's share.
"""

from __future__ import annotations

import os
import re

from aqua_jax.errors import ArenaError, ConfigError
from aqua_jax.ops import device_arena
from aqua_jax.ops.device_arena import DeviceArena

SEGMENT = 1 << 30
# Left free on the GPU: contexts of this process and of others, what libraries take.
_MARGIN = 512 << 20


class GpuSegment:
    """Memory of a GPU in one piece, as lenders want it; `memory.lendable.LentMemory`.

    Attributes:
      size: bytes.
      kind: of memory.
      device: the GPU's UUID.
      way: how it is shared (`ops.device_arena`).
    """

    kind = "cuda"

    def __init__(self, arena: DeviceArena, device: str) -> None:
        """
        Args:
          arena: made here, with its descriptor; owned.
          device: the GPU's UUID.
        """
        self._arena = arena
        self.size, self.device, self.way = arena.nbytes, device, arena.way

    @property
    def fd(self) -> int:
        """The descriptor to lend out; it stays the segment's."""
        return self._arena.fd

    def scrub(self, offset: int, size: int) -> None:
        """Overwrites with zeros, on the GPU; waits.

        Raises:
          ArenaError: not in the segment, or the driver refuses.
        """
        self._arena.scrub(offset, size)

    def vacate(self, offset: int, size: int) -> None:
        """Nothing: the GPU gets a segment back as a whole, by `close`."""

    def occupy(self, offset: int, size: int) -> None:
        """Zeroes a part that was vacated.

        Raises:
          ArenaError: as `scrub`.
        """
        self.scrub(offset, size)

    def close(self) -> None:
        """Gives it back to the GPU, as soon as no borrower has it mapped; may be repeated."""
        if self._arena.fd >= 0:
            os.close(self._arena.fd)
            self._arena.fd = -1
        self._arena.close()


class LendableGpuMemory:
    """Extents of equal size at consecutive addresses of a GPU; as `memory.lendable.LendableMemory`.

    Attributes:
      base: where the first one starts; constant.
      size: bytes of all.
      extents: in order.
    """

    def __init__(self, extents: int, extent_bytes: int, ordinal: int) -> None:
        """
        Args:
          extents: how many, >= 1.
          extent_bytes: of each, a multiple of `device_arena.unit`.
          ordinal: of the GPU.

        Raises:
          ConfigError: field `bytes`: the memory isn't there.
        """
        self.size = extents * extent_bytes
        try:
            device = device_arena.identity(ordinal).uuid
            arenas = DeviceArena.create_row(extents, extent_bytes, ordinal)
        except ArenaError as error:
            raise ConfigError("bytes", self.size, f"what the GPU can give ({error})") from error
        self.base = arenas[0].address
        self.extents = [GpuSegment(arena, device) for arena in arenas]

    @property
    def closed(self) -> bool:
        """Whether `close` has been called."""
        return not self.base

    def close(self) -> None:
        """Gives it back to the GPU; nobody here may use it any more. May be repeated."""
        if self.base:
            self.base = 0
            for extent in self.extents:
                extent.close()


class Gpu:
    """A GPU that this process lends memory of.

    Attributes:
      identity: its names.
    """

    def __init__(self, device: str) -> None:
        """
        Args:
          device: such as cuda:1, counted as the driver does.

        Raises:
          ConfigError: field `device`: no such name, no driver, or no such GPU.
        """
        named = re.fullmatch(r"cuda:(\d{1,3})", device)
        if named is None:
            raise ConfigError("device", device, "cuda:0, cuda:1, ...; empty: the host's memory")
        self.ordinal = int(named[1])
        try:
            there = device_arena.count()
            if self.ordinal >= there:
                raise ConfigError(
                    "device", device, f"cuda:0 to cuda:{there - 1}, the GPUs of this machine"
                    if there else "empty, the host's memory: there is no GPU"
                )
            self.identity = device_arena.identity(self.ordinal)
        except ArenaError as error:
            raise ConfigError(
                "device", device, f"empty, the host's memory: there is no GPU to use here ({error})"
            ) from error

    def segments(self, size: int, most: int = SEGMENT) -> list[GpuSegment]:
        """Allocates at least `size` bytes, zeroed, in pieces of `most` at most.

        Raises:
          ConfigError: field `bytes`: the GPU hasn't so much free.
        """
        memory = device_arena.memory(self.ordinal)
        room = 0 if memory is None else max(0, memory[0] - _MARGIN)
        if size > room:
            raise ConfigError(
                "bytes", size, f"at most {room}: what is free on cuda:{self.ordinal}, less "
                f"{_MARGIN} for contexts"
            )
        found: list[GpuSegment] = []
        try:
            while size > 0:
                arena = DeviceArena.create(min(size, most), self.ordinal)
                found.append(GpuSegment(arena, self.identity.uuid))
                size -= arena.nbytes
        except ArenaError as error:
            for one in found:
                one.close()
            raise ConfigError("bytes", size, f"what the driver can give ({error})") from error
        return found
