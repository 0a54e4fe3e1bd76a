"""Memory of which parts are lent: extents one after another, from one address that never changes.

An engine's pages beyond its reserve lie here. What is to be lent are whole extents, each a memfd of
its own: a borrower gets the descriptor of one extent and can reach nothing else. The address range
is reserved once and extents are mapped into it at fixed places, so a page's address is the base and
its number, whatever is lent. Lending changes no mapping: who owns a page stops using it.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import Protocol

from aqua_jax.closing import Closing
from aqua_jax.errors import ArenaError, ConfigError, StaleHandleError
from aqua_jax.memory.arena import PAGE, sealed_file

_PROT_NONE, _MAP_FIXED, _MAP_NORESERVE = 0x0, 0x10, 0x4000
_MADV_POPULATE_WRITE = 23  # Linux 5.14
_FAILED = ctypes.c_void_p(-1).value
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def _mapped(address: int | None, size: int, protection: int, flags: int, fd: int) -> int:
    found = _libc.mmap(address, size, protection, flags, fd, 0)
    if found in (None, _FAILED):
        raise ArenaError(f"cannot map {size} bytes: {os.strerror(ctypes.get_errno())}")
    return int(found)


class Lendable(Protocol):
    """Memory that can be lent: an `Arena`, an extent of a `LendableMemory`, a device's.

    Attributes:
      size: bytes.
      kind: of memory: "host", "cuda".
      device: that it is on, by a name that all processes know; "" for the host's.
    """

    size: int
    kind: str
    device: str

    @property
    def fd(self) -> int:
        """The descriptor to lend out; it stays its owner's."""

    def scrub(self, offset: int, size: int) -> None:
        """Overwrites with zeros."""


class LentMemory(Lendable, Protocol):
    """What a `Lender` owns: whole pages, zeroed, that can be taken from the system and returned."""

    def vacate(self, offset: int, size: int) -> None:
        """Returns a part to the system, where parts can be returned."""

    def occupy(self, offset: int, size: int) -> None:
        """Takes a vacated part again, zeroed."""

    def close(self) -> None:
        """Ends it; borrowers' mappings stay valid."""


class Extent:
    """A part that is lent as a whole.

    Attributes:
      address: where it starts in this process.
      size: bytes, whole pages.
    """

    kind, device = "host", ""

    def __init__(self, address: int, size: int, name: str) -> None:
        """Allocates it and maps it at `address`, inside a range that is reserved.

        Raises:
          ConfigError: the memory isn't there.
          ArenaError: it can't be mapped.
        """
        self.address, self.size = address, size
        self._fd = sealed_file(size, name)
        try:
            _mapped(
                address, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | _MAP_FIXED,
                self._fd,
            )
        except ArenaError:
            os.close(self._fd)
            raise
        # A forked child must not write to what is lent. Advice: older kernels may not know the
        # other, and first use faults pages in.
        _libc.madvise(address, size, mmap.MADV_DONTFORK)
        _libc.madvise(address, size, _MADV_POPULATE_WRITE)

    @property
    def fd(self) -> int:
        """The descriptor to lend out; it stays the extent's.

        Raises:
          StaleHandleError: closed.
        """
        if self._fd < 0:
            raise StaleHandleError("the extent is closed")
        return self._fd

    def scrub(self, offset: int, size: int) -> None:
        """Overwrites with zeros.

        Raises:
          ArenaError: not in the extent.
        """
        if self._fd < 0 or offset < 0 or size < 0 or offset + size > self.size:
            raise ArenaError(f"{size} bytes at {offset} are not in an extent of {self.size}")
        ctypes.memset(self.address + offset, 0, size)

    def close(self) -> None:
        """Closes the descriptor; may be repeated."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class LendableMemory(Closing):
    """Extents of equal size at consecutive addresses, all of them allocated.

    Attributes:
      base: where the first one starts; constant.
      size: bytes of all.
      extents: in order.
    """

    def __init__(self, extents: int, extent_bytes: int, name: str = "aqua-kv") -> None:
        """
        Args:
          extents: how many, >= 1.
          extent_bytes: of each, whole pages.
          name: shown in /proc/PID/maps.

        Raises:
          ConfigError: the memory isn't there, or sizes that can't be.
        """
        if extents < 1 or extent_bytes < PAGE or extent_bytes % PAGE:
            raise ConfigError(
                "extent_bytes", extent_bytes, f"a multiple of {PAGE}, for at least one extent"
            )
        self.size = extents * extent_bytes
        self.extents: list[Extent] = []
        self.base = 0
        try:
            self.base = _mapped(
                None, self.size, _PROT_NONE,
                mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE, -1,
            )
            for index in range(extents):
                self.extents.append(Extent(self.base + index * extent_bytes, extent_bytes, name))
        except ArenaError as error:
            self.close()
            raise ConfigError("bytes", self.size, f"what can be mapped ({error})") from error
        except ConfigError:
            self.close()
            raise

    @property
    def closed(self) -> bool:
        """Whether `close` has been called."""
        return not self.base

    def close(self) -> None:
        """Unmaps everything; nobody may use it any more. May be repeated.

        What borrowers hold stays theirs as long as they have it mapped.
        """
        for extent in self.extents:
            extent.close()
        if self.base:
            _libc.munmap(self.base, self.size)
            self.base = 0
