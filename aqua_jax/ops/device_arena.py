"""Memory of a GPU that other processes can map, outside XLA's allocator.

One process makes an arena and sends its descriptor (over a Unix socket, SCM_RIGHTS); another maps
it for its own GPU, which may be the same or one that reaches it over NVLink or PCIe. Pages are
moved there as to host memory: `Segment(arena.buffer())`. Physical memory stays while anybody has
it mapped, so a lender's death takes nothing away from under a copy.

Where the driver can't export memory as descriptors it is CUDA's older IPC, as the log says once:
the calls are the same, but such memory ends with the process that made it.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import logging
import threading
from collections import Counter
from collections.abc import Sequence

from aqua_jax.closing import Closing
from aqua_jax.errors import ArenaError
from aqua_jax.ops import library

_LOG = logging.getLogger(__name__)
_WAYS = {1: "descriptors", 2: "legacy IPC"}
_open: Counter[str] = Counter()  # arenas of this process, by how they are shared
_open_lock = threading.Lock()


@functools.cache
def _native() -> ctypes.CDLL:
    with library.lowering_for("cuda"):
        native = library.symbols()
        if native is None:
            raise ArenaError(f"memory of GPUs can't be lent: {library.reason()}")
    i32, i64, u64 = ctypes.c_int32, ctypes.c_int64, ctypes.c_uint64
    out_u64 = ctypes.POINTER(u64)
    for name, result, arguments in (
        ("aqua_arena_error", ctypes.c_char_p, []),
        ("aqua_arena_create", i64, [i32, u64, out_u64, out_u64, ctypes.POINTER(i32)]),
        ("aqua_arena_import", i64, [ctypes.POINTER(i32), i32, i32, u64, out_u64]),
        ("aqua_arena_way", i32, [i64]),
        ("aqua_arena_devices", i32, []),
        ("aqua_arena_identity", i32, [i32, ctypes.c_char_p, ctypes.c_char_p]),
        ("aqua_arena_close", i32, [i64]),
        ("aqua_arena_scrub", i32, [i64, u64, u64]),
        ("aqua_arena_checksum", i32, [i64, u64, u64, out_u64]),
        ("aqua_arena_topology", i32, [i32, i32, ctypes.POINTER(i64)]),
        ("aqua_arena_memory", i32, [i32, out_u64, out_u64]),
        ("aqua_arena_unit", u64, [i32]),
        ("aqua_arena_create_row", i32, [
            i32, i32, u64, out_u64, ctypes.POINTER(i64), ctypes.POINTER(i32),
        ]),
    ):
        function = getattr(native, name)
        function.restype, function.argtypes = result, arguments
    return native


def _require(done: int, what: str) -> int:
    if not done:
        raise ArenaError(f"{what}: {_native().aqua_arena_error().decode()}")
    return done


class DeviceArena(Closing):
    """A range of GPU memory, made here (`create`) or by another process (`map`).

    Attributes:
      device: ordinal of the GPU that uses it here.
      nbytes: its size.
      address: where that GPU sees it in this process.
      fd: a descriptor of it, -1 for one that was mapped. The caller's: send it, then close it.
      way: how it is shared, "descriptors" or "legacy IPC".
    """

    def __init__(self, identity: int, device: int, nbytes: int, address: int, fd: int):
        """Not to be called: see `create` and `map`."""
        self._id, self.device, self.nbytes, self.address, self.fd = (
            identity, device, nbytes, address, fd
        )
        self.way = _WAYS.get(_native().aqua_arena_way(identity), "")
        with _open_lock:
            _open[self.way] += 1
        if self.way == "legacy IPC":
            _say_legacy()

    @classmethod
    def create(cls, nbytes: int, device: int = 0, *, claimed: int = 0) -> DeviceArena:
        """Allocates at least `nbytes` on `device`, filled with zeros.

        Args:
          nbytes: rounded up to the device's units, usually 2 MiB.
          device: ordinal of the GPU.
          claimed: bytes that XLA's allocator may still take there, and must find
            (`engine.platform.DeviceMemory.claimed`).

        Raises:
          ArenaError: there is no driver, or not so much memory beside what is claimed.
        """
        found = memory(device)
        if found is not None and nbytes > max(0, found[0] - claimed):
            raise ArenaError(
                f"an arena on GPU {device}: got {nbytes} bytes; allowed: at most "
                f"{max(0, found[0] - claimed)}, for {found[0]} of {found[1]} are free there and "
                f"XLA's allocator may take {claimed} of them (see device_memory_fraction)"
            )
        size, address, fd = ctypes.c_uint64(), ctypes.c_uint64(), ctypes.c_int32(-1)
        identity = _require(
            _native().aqua_arena_create(device, nbytes, size, address, fd),
            f"an arena of {nbytes} bytes on GPU {device}",
        )
        return cls(identity, device, size.value, address.value, fd.value)

    @classmethod
    def create_row(cls, count: int, nbytes: int, device: int = 0) -> list[DeviceArena]:
        """Allocates `count` arenas of `nbytes`, a multiple of `unit`, at consecutive addresses.

        As `create`; each may be lent, mapped and closed by itself. The addresses stay reserved
        until all of them are closed.

        Raises:
          ArenaError: there is no driver, or not so much memory, or no descriptors of it.
        """
        base = ctypes.c_uint64()
        ids, fds = (ctypes.c_int64 * count)(), (ctypes.c_int32 * count)()
        _require(
            _native().aqua_arena_create_row(device, count, nbytes, base, ids, fds),
            f"{count} arenas of {nbytes} bytes on GPU {device}",
        )
        return [
            cls(ids[i], device, nbytes, base.value + i * nbytes, fds[i]) for i in range(count)
        ]

    @classmethod
    def map(cls, fd: int, nbytes: int, device: int | Sequence[int] = 0) -> DeviceArena:
        """Maps another process's arena; the descriptor stays the caller's.

        Args:
          fd: a descriptor of it.
          nbytes: its `nbytes` there.
          device: ordinal of the GPU that will use it, or of several, one process's.

        Raises:
          ArenaError: the descriptor is no arena's, or a GPU can't reach the one it is on.
        """
        devices = [device] if isinstance(device, int) else list(device)
        ordinals = (ctypes.c_int32 * len(devices))(*devices)
        address = ctypes.c_uint64()
        identity = _require(
            _native().aqua_arena_import(ordinals, len(devices), fd, nbytes, address),
            f"mapping an arena of {nbytes} bytes for GPU {', '.join(map(str, devices))}",
        )
        return cls(identity, devices[0], nbytes, address.value, -1)

    def buffer(self) -> ctypes.Array[ctypes.c_uint8]:
        """For `Segment`: stands for the memory, which the host can't read or write."""
        self._check()
        return (ctypes.c_uint8 * self.nbytes).from_address(self.address)

    def scrub(self, offset: int = 0, nbytes: int | None = None) -> None:
        """Overwrites a range (None: to the end) with zeros, and waits.

        Raises:
          ArenaError: it was closed, or the range lies outside.
        """
        length = self.nbytes - offset if nbytes is None else nbytes
        _require(_native().aqua_arena_scrub(self._id, offset, length), "scrubbing")

    def checksum(self, offset: int, nbytes: int) -> int:
        """The checksum of a range, as `moves.poll` gives it for a move of these bytes; waits.

        Raises:
          ArenaError: it was closed, or the range lies outside.
        """
        found = ctypes.c_uint64()
        _require(_native().aqua_arena_checksum(self._id, offset, nbytes, found), "a checksum")
        return found.value

    def close(self) -> None:
        """Unmaps it. Segments over it must have been retired. Closing again does nothing."""
        if self._id:
            identity, self._id = self._id, 0
            with _open_lock:
                _open[self.way] -= 1
            _require(_native().aqua_arena_close(identity), "closing an arena")

    def _check(self) -> None:
        if not self._id:
            raise ArenaError("the arena was closed")


def unit(device: int) -> int:
    """Bytes that sizes of arenas are multiples of, usually 2 MiB.

    Raises:
      ArenaError: there is no such GPU.
    """
    return int(_require(_native().aqua_arena_unit(device), f"GPU {device}"))


def memory(device: int) -> tuple[int, int] | None:
    """Bytes of a GPU that nobody has, and all there are; None where they can't be asked for."""
    with library.lowering_for("cuda"):
        if library.symbols() is None:
            return None
    free, total = ctypes.c_uint64(), ctypes.c_uint64()
    if not _native().aqua_arena_memory(device, free, total):
        return None
    return free.value, total.value


@functools.cache
def _say_legacy() -> None:
    _LOG.warning(
        "memory of GPUs is shared by CUDA's older IPC: this driver can't export it as descriptors. "
        "When a lender's process ends, what it has lent ends with it"
    )


def ways() -> dict[str, int]:
    """How many arenas are open in this process, by how they are shared; for metrics."""
    with _open_lock:
        return {way: count for way, count in _open.items() if count}


def count() -> int:
    """GPUs that this process sees; ordinals are below it.

    Raises:
      ArenaError: there is no driver.
    """
    found = _native().aqua_arena_devices()
    _require(found >= 0, "GPUs")
    return int(found)


@dataclasses.dataclass(frozen=True)
class Identity:
    """What names a GPU for all processes of a machine.

    Attributes:
      uuid: such as GPU-01234567-89ab-cdef-0123-456789abcdef.
      bus: its PCI address, such as 0000:3b:00.0.
    """

    uuid: str
    bus: str

    @property
    def domain(self) -> str:
        """Where it is, from the outside in, for the coordinator's idea of near and far."""
        node = "-1"
        with contextlib.suppress(OSError):
            with open(f"/sys/bus/pci/devices/{self.bus}/numa_node", encoding="ascii") as file:
                node = file.read().strip()
        return f"numa{node}/{self.bus}" if int(node) >= 0 else self.bus


def identity(device: int) -> Identity:
    """The names of a GPU of this process.

    Raises:
      ArenaError: there is no such GPU.
    """
    digits, bus = ctypes.create_string_buffer(33), ctypes.create_string_buffer(32)
    _require(_native().aqua_arena_identity(device, digits, bus), f"GPU {device}")
    text, ends = digits.value.decode(), (8, 12, 16, 20, 32)
    parts = [text[a:b] for a, b in zip((0, *ends), ends, strict=False)]
    return Identity("GPU-" + "-".join(parts), bus.value.decode().lower())


def ordinal_of(uuid: str) -> int | None:
    """Which of this process's GPUs that is; None: it doesn't see it.

    Raises:
      ArenaError: there is no driver.
    """
    return next((n for n in range(count()) if identity(n).uuid == uuid), None)


@dataclasses.dataclass(frozen=True)
class Link:
    """How one GPU reaches another's memory.

    Attributes:
      reaches: whether it can without going through the host.
      nvlinks: NVLink links in use between them; 0: PCIe, or not known.
      nominal_mb_s: what such links should do one way, 0 if not known. To rank by, not to rely on.
    """

    reaches: bool
    nvlinks: int
    nominal_mb_s: int


def link(device: int, peer: int) -> Link:
    """How `device` reaches memory of `peer`, from the driver and, if it is there, NVML.

    Raises:
      ArenaError: there are no such GPUs.
    """
    out = (ctypes.c_int64 * 3)()
    _require(_native().aqua_arena_topology(device, peer, out), f"GPUs {device} and {peer}")
    return Link(bool(out[0]), out[1], out[2])
