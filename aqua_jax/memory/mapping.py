"""Memory of a device that another process lends, as its borrower maps it: once, for all leases.

The rooms without jax don't know how: whoever has a device brings a `Mapper` for its kind
(`engine.device_mapping` for GPUs). What can't be mapped here is left to others, and the log says
why, once for each device.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Hashable
from typing import Protocol

from aqua_jax.errors import ArenaError, StoreError

_log = logging.getLogger(__name__)


class Mapped(Protocol):
    """A mapping of a lender's whole arena; `ops.device_arena.DeviceArena` for GPUs.

    Attributes:
      way: how it is shared, in words.
    """

    way: str

    @property
    def address(self) -> int:
        """Where it starts, as this process's devices see it."""

    def close(self) -> None:
        """Unmaps it. No copy may be under way."""


class Mapper(Protocol):
    """Maps memory of one kind for this process's devices."""

    def map(self, fd: int, size: int, device: str) -> Mapped:
        """Maps an arena; the descriptor stays the caller's.

        Args:
          fd: of the memory.
          size: bytes of all of it.
          device: that it is on, as its lender has said.

        Raises:
          ArenaError: it can't be reached from here, or isn't what it should be.
        """


class DeviceRange:
    """What ranges of a device's memory have in common, as leases have them: only devices read and
    write them, and a part can't be unmapped by itself."""

    def read(self, offset: int, size: int) -> bytes:
        """The host can't read it.

        Raises:
          StoreError: always.
        """
        raise StoreError("the host cannot read a device's memory")

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """The host can't write to it.

        Raises:
          StoreError: always.
        """
        raise StoreError("the host cannot write to a device's memory")

    def disconnect(self, offset: int, size: int) -> None:
        """Nothing: a mapping ends as a whole."""


class Part(DeviceRange):
    """A range of a mapping that several leases may share; it ends with the last of them."""

    def __init__(self, shared: _Shared, offset: int, size: int) -> None:
        """Use `Mappings.part`."""
        self._shared, self._offset = shared, offset
        self.size, self.closed = size, False

    @property
    def address(self) -> int:
        """Where it starts, as this process's devices see it."""
        return self._shared.mapped.address + self._offset

    @property
    def way(self) -> str:
        """How it is shared, in words."""
        return self._shared.mapped.way

    def close(self) -> None:
        """Ends it; with the last one the memory is unmapped. May be repeated."""
        if not self.closed:
            self.closed = True
            self._shared.drop()


class _Shared:
    """A mapping and how many leases lie in it; under the lock of its `Mappings`."""

    def __init__(self, owner: Mappings, key: Hashable, mapped: Mapped, size: int) -> None:
        self._owner, self._key = owner, key
        self.mapped, self.size, self.users = mapped, size, 0

    def drop(self) -> None:
        self._owner._drop(self._key, self)


class Mappings:
    """What one process has mapped of others' devices, by arena. Any thread may call."""

    def __init__(self, mappers: dict[str, Mapper] | None = None) -> None:
        """
        Args:
          mappers: by kind of memory; without one for a kind none of that can be borrowed.
        """
        self.mappers = dict(mappers or {})
        self._lock = threading.Lock()
        self._shared: dict[Hashable, _Shared] = {}
        self._said: set[tuple[str, str]] = set()

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of memory that can be mapped."""
        return tuple(self.mappers)

    def part(
        self, key: Hashable, fd: int, total: int, offset: int, size: int, *, kind: str, device: str
    ) -> Part:
        """A range of an arena, which is mapped if it isn't already.

        Args:
          key: names the arena.
          fd: of its memory; the caller's.
          total: its bytes.
          offset: where the range starts.
          size: of the range.
          kind: of memory.
          device: that it is on.

        Raises:
          ArenaError: it can't be mapped here, or there is no such range in it.
        """
        if offset < 0 or size < 1 or offset + size > total:
            raise ArenaError(f"{size} bytes at {offset} are not in an arena of {total}")
        with self._lock:
            found = self._shared.get(key)
            if found is None:
                found = self._map(key, fd, total, kind, device)
            if found.size != total:
                raise ArenaError(f"an arena of {total} bytes was mapped with {found.size}")
            found.users += 1
        return Part(found, offset, size)

    def _map(self, key: Hashable, fd: int, total: int, kind: str, device: str) -> _Shared:
        mapper = self.mappers.get(kind)
        try:
            if mapper is None:
                raise ArenaError(f"this process maps no memory of the kind {kind}")
            found = _Shared(self, key, mapper.map(fd, total, device), total)
        except ArenaError as error:
            if (kind, device) not in self._said:
                self._said.add((kind, device))
                _log.warning(
                    "memory that is lent of %s can't be used: %s; pages go to the host's memory",
                    device or kind, error,
                )
            raise
        self._shared[key] = found
        return found

    def _drop(self, key: Hashable, shared: _Shared) -> None:
        with self._lock:
            shared.users -= 1
            if shared.users:
                return
            del self._shared[key]
            try:
                shared.mapped.close()
            except ArenaError:
                # Addresses are lost, nothing else: the memory is the lender's in any case.
                _log.exception("a lender's memory can't be unmapped")
