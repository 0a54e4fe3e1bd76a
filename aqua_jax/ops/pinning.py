"""Pins host memory for the copies of GPUs, piece by piece.

Copies to and from memory that isn't pinned go through a buffer of the driver's and stop the host.
Pinning takes as long as writing to the memory, so whoever grows a tier does it in a thread of its
own, before anybody is given a slot there. `Segment` takes memory whose first piece is pinned as it
is, and pins nothing itself then.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import jax

from aqua_jax.errors import ArenaError
from aqua_jax.ops import library


@functools.cache
def _native() -> ctypes.CDLL | None:
    native = library.symbols()
    if native is None or not hasattr(native, "aqua_host_pin"):
        return None
    for name in ("aqua_host_pin", "aqua_host_unpin"):
        function = getattr(native, name)
        function.restype = ctypes.c_char_p
        function.argtypes = [ctypes.c_int32, ctypes.c_void_p, ctypes.c_uint64]
    native.aqua_host_pinned.restype, native.aqua_host_pinned.argtypes = ctypes.c_uint64, []
    native.aqua_host_copy.restype = ctypes.c_char_p
    native.aqua_host_copy.argtypes = [
        ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint64
    ]
    return native


class HostPins:
    """Pins for the GPU that jax uses. Any thread may call; `memory.pinning.Pins` says what."""

    def __init__(self) -> None:
        """Where `pins()` says that there is something to pin for."""
        self._device = jax.local_devices()[0].local_hardware_id or 0

    def pin(self, address: int, nbytes: int) -> None:
        """Pins [address, address + nbytes), whole pages of the system.

        Raises:
          ArenaError: the driver refuses.
        """
        native = _native()
        assert native is not None
        why = native.aqua_host_pin(self._device, address, nbytes)
        if why is not None:
            raise ArenaError(f"{nbytes} bytes of host memory can't be pinned: {why.decode()}")

    def unpin(self, address: int, nbytes: int) -> None:
        """Undoes a `pin` of the same piece; no copy may be under way in it.

        Raises:
          ArenaError: it isn't pinned.
        """
        native = _native()
        assert native is not None
        why = native.aqua_host_unpin(self._device, address, nbytes)
        if why is not None:
            raise ArenaError(f"{nbytes} bytes of host memory can't be unpinned: {why.decode()}")


def pins() -> HostPins | None:
    """For this platform; None where copies need nothing pinned (CPUs)."""
    if library.platform() != "cuda" or _native() is None:
        return None
    return HostPins()


def copier() -> Callable[[int, int, int, int], None] | None:
    """(to, from, bytes, device): a copy between addresses of the host or a GPU, by one of jax's
    local devices, which must reach both. It waits for its end.

    None where a plain memcpy does.
    """
    if pins() is None:
        return None
    native, found = _native(), [one.local_hardware_id or 0 for one in jax.local_devices()]
    assert native is not None

    def copy(to: int, source: int, nbytes: int, device: int) -> None:
        why = native.aqua_host_copy(found[device], to, source, nbytes)
        if why is not None:
            raise ArenaError(f"a copy of {nbytes} bytes between stores: {why.decode()}")

    return copy


def pinned_bytes() -> int:
    """Bytes of host memory that are pinned now."""
    native = _native()
    return 0 if native is None else int(native.aqua_host_pinned())
