"""Memory with a known address, really there, that can be lent to another process.

A lender's arena is a memfd: a file without a name, so nothing can be left behind. It is allocated
in full and sealed against shrinking, for touching a page that a truncation took away, or that an
overcommitted system can't find, kills the process that touches it. A borrower maps its part from a
descriptor and trusts nothing about it: size and seals are checked, and every page is faulted in
before use.

The mapping outlives the lender's process, so losing a lender never makes an address invalid.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
from collections.abc import Iterator

from aqua_jax.closing import Closing
from aqua_jax.errors import ArenaError, ConfigError, StaleHandleError

PAGE = mmap.PAGESIZE
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
# Left to the rest of the system. A memfd has no limit of its own: allocating too much is no error,
# the kernel ends some process instead. So room is looked at before each step of an allocation.
MARGIN = 256 << 20
STEP = 64 << 20

_MADV_POPULATE_WRITE = 23  # Linux 5.14; the mmap module doesn't name it
_MAP_FIXED, _MAP_NORESERVE = 0x10, 0x4000
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
]


def round_up(size: int) -> int:
    """`size` as a whole number of the operating system's pages."""
    return -(-size // PAGE) * PAGE


def available_memory() -> int:
    """Bytes that can be allocated now without hurting others; huge if the system doesn't say."""
    with contextlib.suppress(OSError, ValueError), open("/proc/meminfo", encoding="ascii") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 2**62


def _check_size(size: int) -> int:
    """`size` rounded up, if it fits.

    Raises:
      ConfigError: it doesn't.
    """
    room = max(0, available_memory() - MARGIN) // PAGE * PAGE
    if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= room:
        raise ConfigError("bytes", size, f"1 to {room} (the memory available now)")
    return round_up(size)


def _steps(offset: int, size: int) -> Iterator[tuple[int, int]]:
    """(offset, bytes) of an allocation's steps, while there is room for what is left of it.

    Raises:
      OSError: there is no more: others have taken it meanwhile.
    """
    end = offset + size
    while offset < end:
        if end - offset > available_memory() - MARGIN:
            raise OSError(errno.ENOMEM, f"{end - offset} bytes no longer fit into memory")
        step = min(STEP, end - offset)
        yield offset, step
        offset += step


def _reserve(fd: int, offset: int, size: int) -> None:
    for at, step in _steps(offset, size):
        os.posix_fallocate(fd, at, step)


def sealed_file(size: int, name: str) -> int:
    """The descriptor of memory that can be lent: without a name, zeroed, allocated in full, sealed.

    Args:
      size: bytes, rounded up to whole pages.
      name: shown in /proc/PID/maps.

    Raises:
      ConfigError: the memory isn't there.
    """
    size = _check_size(size)
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        _reserve(fd, 0, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    except OSError as error:
        os.close(fd)
        raise ConfigError("bytes", size, f"what the system can give ({error})") from error
    return fd


class Arena(Closing):
    """A mapped range of memory.

    Made by `create`, `anonymous` or `adopt`. Offsets are in bytes from the arena's own start; sizes
    are whole pages of the operating system.

    After `close` every use raises `StaleHandleError`; `close` may be called again. Whoever copies
    by address ends that before closing. A `view` that is still referenced keeps its memory valid,
    and mapped, until it goes.
    """

    kind, device, way = "host", "", "descriptors"  # what lenders say of it, how it is shared

    def __init__(self, mapping: mmap.mmap, size: int, fd: int = -1) -> None:
        """Use the class methods.

        Args:
          mapping: of `size` bytes; owned.
          fd: descriptor to lend out, owned; -1: there is none.
        """
        self._mapping: mmap.mmap | None = mapping
        self._fd = fd
        self.size = size
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))

    @classmethod
    def create(cls, size: int, name: str = "aqua", *, huge_pages: bool = False) -> Arena:
        """Memory that can be lent: zeroed, allocated in full, sealed.

        Args:
          size: bytes, rounded up to whole pages.
          name: shown in /proc/PID/maps.
          huge_pages: advise the system to use them.

        Raises:
          ConfigError: the memory isn't there.
        """
        size = _check_size(size)
        fd = sealed_file(size, name)
        try:
            mapping = _map(fd, 0, size, huge_pages=huge_pages)
        except (OSError, ArenaError) as error:
            os.close(fd)
            raise ConfigError("bytes", size, f"what the system can give ({error})") from error
        return cls(mapping, size, fd)

    @classmethod
    def anonymous(
        cls, size: int, *, huge_pages: bool = False, present: int | None = None
    ) -> Arena:
        """Memory of this process alone, zeroed.

        Args:
          size: bytes, rounded up to whole pages.
          huge_pages: advise the system to use them.
          present: bytes from the start on that are allocated now; the rest must be, by `populate`,
            before it is used. None: all.

        Raises:
          ConfigError: the memory isn't there.
        """
        size = _check_size(size)
        mapping = None
        try:
            mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            _advise(mapping, huge_pages)
            for at, step in _steps(0, size if present is None else min(size, round_up(present))):
                _populate(mapping, at, step)
        except OSError as error:
            if mapping is not None:
                mapping.close()
            raise ConfigError("bytes", size, f"what the system can give ({error})") from error
        return cls(mapping, size)

    @classmethod
    def adopt(cls, fd: int, offset: int, size: int) -> Arena:
        """Maps a part of somebody else's arena.

        Args:
          fd: the descriptor received; it stays the caller's to close.
          offset: where the part starts; whole pages.
          size: of the part in bytes; whole pages.

        Raises:
          ArenaError: the descriptor isn't sealed memory, or is too small, or can't be mapped.
        """
        if offset < 0 or size < 1 or offset % PAGE or size % PAGE:
            raise ArenaError(f"cannot map {size} bytes at {offset}: not whole pages of {PAGE}")
        try:
            seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
            length, there = os.fstat(fd).st_size, os.fstat(fd).st_blocks * 512
        except OSError as error:
            raise ArenaError(f"the descriptor is not shared memory ({error})") from error
        if seals & SEALS != SEALS:
            raise ArenaError(
                f"the memory has seals {seals:#x}; needed: {SEALS:#x}, so that it can't shrink"
            )
        if offset + size > length:
            raise ArenaError(f"the memory has {length} bytes; needed: {offset + size}")
        # A lender that lends less than before has holes, but not where it lends.
        if size > there or (there < length and size > available_memory() - MARGIN):
            raise ArenaError(f"the memory is not all there: {there} bytes of {length}")
        try:
            mapping = _map(fd, offset, size, huge_pages=False)
        except OSError as error:
            raise ArenaError(f"cannot map {size} bytes at {offset} ({error})") from error
        return cls(mapping, size)

    @property
    def closed(self) -> bool:
        """Whether `close` has been called."""
        return self._mapping is None

    @property
    def address(self) -> int:
        """Where the arena starts in this process."""
        self._open()
        return self._address

    @property
    def fd(self) -> int:
        """The descriptor to lend out; it stays the arena's.

        Raises:
          ArenaError: this memory can't be lent.
        """
        self._open()
        if self._fd < 0:
            raise ArenaError("this memory can't be lent: it has no descriptor")
        return self._fd

    def _open(self) -> mmap.mmap:
        if self._mapping is None:
            raise StaleHandleError("the arena is closed")
        return self._mapping

    def _check(self, offset: int, size: int) -> mmap.mmap:
        mapping = self._open()
        if offset < 0 or size < 0 or offset + size > self.size:
            raise ArenaError(f"{size} bytes at {offset} are not in an arena of {self.size}")
        return mapping

    def _check_pages(self, offset: int, size: int) -> mmap.mmap:
        mapping = self._check(offset, size)
        if offset % PAGE or size % PAGE:
            raise ArenaError(f"{size} bytes at {offset} are not whole pages of {PAGE}")
        return mapping

    def read(self, offset: int, size: int) -> bytes:
        """A copy of `size` bytes."""
        return self._check(offset, size)[offset : offset + size]

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Copies `data` in."""
        mapping = self._check(offset, len(data))
        mapping[offset : offset + len(data)] = bytes(data)

    def view(self, offset: int, size: int) -> memoryview:
        """The memory itself, writable; see the class about closing."""
        return memoryview(self._check(offset, size))[offset : offset + size]

    def scrub(self, offset: int, size: int) -> None:
        """Overwrites with zeros, other Python threads running meanwhile."""
        self._check(offset, size)
        ctypes.memset(self._address + offset, 0, size)

    def vacate(self, offset: int, size: int) -> None:
        """Returns pages of a lendable arena to the system; what they held is gone everywhere.

        `occupy` must have them back before anybody uses them.
        """
        if size:
            self._check_pages(offset, size).madvise(mmap.MADV_REMOVE, offset, size)

    def occupy(self, offset: int, size: int) -> None:
        """Allocates vacated pages again, zeroed.

        Raises:
          ArenaError: the memory isn't there now.
        """
        mapping = self._check_pages(offset, size)
        try:
            _reserve(self.fd, offset, size)
            _populate(mapping, offset, size)
        except OSError as error:
            raise ArenaError(f"cannot take {size} bytes from the system ({error})") from error

    def populate(self, offset: int, size: int) -> None:
        """Allocates pages of private memory that are not there yet; others stay as they are.

        Raises:
          ArenaError: the memory isn't there now.
        """
        mapping = self._check_pages(offset, size)
        try:
            for at, step in _steps(offset, size):
                _populate(mapping, at, step)
        except OSError as error:
            raise ArenaError(f"cannot take {size} bytes from the system ({error})") from error

    def disconnect(self, offset: int, size: int) -> None:
        """Puts private memory where pages of a lent arena were mapped.

        What lies there is the lender's again: a copy that comes too late reads zeros and writes to
        memory that nobody reads. The address stays valid, so such a copy doesn't end the process.
        """
        self._check_pages(offset, size)
        if not size:
            return
        result = _libc.mmap(
            self._address + offset, size, mmap.PROT_READ | mmap.PROT_WRITE,
            mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED | _MAP_NORESERVE, -1, 0,
        )
        if result != self._address + offset:
            raise ArenaError(f"cannot unmap {size} bytes: {os.strerror(ctypes.get_errno())}")

    def close(self) -> None:
        """Unmaps the memory and closes the descriptor."""
        mapping, self._mapping = self._mapping, None
        if mapping is not None:
            # Views still alive: their memory is unmapped with the last of them.
            with contextlib.suppress(BufferError):
                mapping.close()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _map(fd: int, offset: int, size: int, *, huge_pages: bool) -> mmap.mmap:
    mapping = mmap.mmap(fd, size, flags=mmap.MAP_SHARED, offset=offset)
    try:
        # A forked child that outlives us must not go on writing to memory that was lent to us.
        mapping.madvise(mmap.MADV_DONTFORK)
        _advise(mapping, huge_pages)
        _populate(mapping, 0, size)
    except OSError:
        mapping.close()
        raise
    return mapping


def _advise(mapping: mmap.mmap, huge_pages: bool) -> None:
    if huge_pages:
        with contextlib.suppress(OSError):  # advice: kernels without them say EINVAL
            mapping.madvise(mmap.MADV_HUGEPAGE)


def _populate(mapping: mmap.mmap, offset: int, size: int) -> None:
    """Faults pages in for writing, without changing them."""
    try:
        mapping.madvise(_MADV_POPULATE_WRITE, offset, size)
    except OSError as error:
        if error.errno != errno.EINVAL:  # an older kernel, where first use faults them in
            raise
