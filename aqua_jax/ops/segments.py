"""The native copy queue's functions, and the memory it knows by id and generation.

What pages move to and from (`moves`), and what holds pages behind the pool's (`spaces`), is
registered as a `Segment`.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import weakref
from typing import Any

import jax
import numpy as np

from aqua_jax.errors import StaleHandleError
from aqua_jax.ops import library


def native() -> ctypes.CDLL:
    """The functions of the copy queue, on the platform in use.

    Raises:
      RuntimeError: the native library is missing.
    """
    return _bound(library.platform())


@functools.cache
def _bound(platform: str) -> ctypes.CDLL:
    symbols = library.symbols()
    if symbols is None or not library.available("aqua_enqueue_moves"):
        raise RuntimeError(f"moves on {platform} need the native library: {library.reason()}")
    declare(symbols)
    if jax.default_backend() == "gpu":
        # Segments are made known to the GPU that jax uses, which needn't be the first.
        symbols.aqua_moves_set_device(jax.local_devices()[0].local_hardware_id or 0)
    # The last hooks registered run first: copies end before jax drops its buffers.
    atexit.register(symbols.aqua_moves_stop)
    return symbols


def declare(symbols: ctypes.CDLL) -> None:
    """Tells ctypes the types of the copy queue's functions."""
    i32, u32, i64, u64 = ctypes.c_int32, ctypes.c_uint32, ctypes.c_int64, ctypes.c_uint64
    pointer = ctypes.c_void_p
    for name, result, arguments in (
        ("aqua_segment_register", i64, [pointer, u64]),
        ("aqua_segment_retire", i32, [i32, u32, i32]),
        ("aqua_segment_address", u64, [i32, u32]),
        ("aqua_pool_register", i64, []),
        ("aqua_pool_close", i32, [i32, u32]),
        ("aqua_moves_poll", None, [pointer, i64, pointer, pointer]),
        ("aqua_moves_finished", u64, []),
        ("aqua_moves_wait", i32, [pointer, i64, i64]),
        ("aqua_moves_drain", i32, [i64]),
        ("aqua_moves_stop", None, []),
        ("aqua_moves_set_delay", None, [u64, u32]),
        ("aqua_moves_counters", None, [pointer]),
    ):
        function = getattr(symbols, name)
        function.restype, function.argtypes = result, arguments
    if hasattr(symbols, "aqua_moves_set_device"):  # CPUs have none to choose
        symbols.aqua_moves_set_device.restype = None
        symbols.aqua_moves_set_device.argtypes = [i32]


def handle(packed: int, what: str) -> tuple[int, int]:
    """Id and generation of what was registered.

    Raises:
      RuntimeError: it wasn't.
    """
    if packed == -2:
        raise RuntimeError(f"{what}: the device can't reach this memory, or it can't be pinned")
    if packed < 0:
        raise RuntimeError(f"too many {what} are registered; retire some")
    return packed & 0xFFFFFFFF, packed >> 32


class Segment:
    """Memory that pages move to and from: registered now, until `retire`.

    Attributes:
      id: its place in the native table; reused after `retire`, with another generation.
      generation: which life of the id this is.
      nbytes: its size.
    """

    def __init__(self, buffer: Any):
        """Registers a writable buffer (mmap, memoryview, array), which is kept alive until then.

        With CUDA its address may be the host's, a GPU's or a peer's; host memory that isn't pinned
        is pinned now, which takes about as long as writing to all of it.

        Raises:
          ValueError: it is empty or read-only.
          RuntimeError: too many segments, or the device can't reach it.
        """
        memory = np.frombuffer(buffer, np.uint8)
        if not memory.flags.writeable or memory.nbytes == 0:
            raise ValueError("segment: got an empty or read-only buffer; allowed: writable memory")
        self.nbytes = memory.nbytes
        packed = native().aqua_segment_register(memory.ctypes.data, memory.nbytes)
        self.id, self.generation = handle(packed, "segments")
        # The arguments keep the memory alive until the native side has let go of it.
        self._end = weakref.finalize(self, _retire, self.id, self.generation, memory)
        self._end.atexit = False  # `aqua_moves_stop` comes first, and the process ends

    @property
    def address(self) -> int:
        """Where copies and kernels find it: with CUDA the device's view of it.

        Raises:
          StaleHandleError: it has been retired.
        """
        self.check()
        return int(native().aqua_segment_address(self.id, self.generation))

    @property
    def live(self) -> bool:
        """Whether it has not been retired."""
        return self._end.alive

    def check(self) -> None:
        """Raises StaleHandleError if it has been retired."""
        if not self.live:
            raise StaleHandleError(
                f"segment {self.id} of generation {self.generation} has been retired"
            )

    def retire(self, *, abandon: bool = False) -> None:
        """Refuses new moves, waits for those that were handed over, lets the generation pass.

        Afterwards nobody touches the memory. Moves that come later have status SEGMENT_STALE.

        Args:
          abandon: moves not begun come back as SEGMENT_STALE, so that only the copy of one group
            of pages is waited for.

        Raises:
          StaleHandleError: it was retired before.
        """
        self.check()
        kept = self._end.detach()
        native().aqua_segment_retire(self.id, self.generation, int(abandon))
        del kept

    def __enter__(self) -> Segment:
        return self

    def __exit__(self, *error: object) -> None:
        if self.live:
            self.retire()


def _retire(identity: int, generation: int, memory: np.ndarray) -> None:
    native().aqua_segment_retire(identity, generation, 0)
    del memory
