"""The few CUDA driver calls that measuring copies needs, through ctypes and nothing else."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable

_PLACE = ctypes.c_uint64  # CUdeviceptr; with unified addressing the host's as well
# The calls' arguments, as cuda.h has them; tests/ops/test_cuda_interfaces.py compares.
CALLS: dict[str, list[type]] = {
    "cuInit": [ctypes.c_uint],
    "cuDeviceGet": [ctypes.POINTER(ctypes.c_int), ctypes.c_int],
    "cuDeviceGetName": [ctypes.c_char_p, ctypes.c_int, ctypes.c_int],
    "cuDeviceGetCount": [ctypes.POINTER(ctypes.c_int)],
    "cuDevicePrimaryCtxRetain": [ctypes.POINTER(ctypes.c_void_p), ctypes.c_int],
    "cuCtxSetCurrent": [ctypes.c_void_p],
    "cuGetErrorString": [ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)],
    "cuDriverGetVersion": [ctypes.POINTER(ctypes.c_int)],
    "cuMemGetInfo_v2": [ctypes.POINTER(ctypes.c_size_t), ctypes.POINTER(ctypes.c_size_t)],
    "cuMemAlloc_v2": [ctypes.POINTER(_PLACE), ctypes.c_size_t],
    "cuMemFree_v2": [_PLACE],
    "cuMemHostAlloc": [ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t, ctypes.c_uint],
    "cuMemFreeHost": [ctypes.c_void_p],
    "cuStreamCreate": [ctypes.POINTER(ctypes.c_void_p), ctypes.c_uint],
    "cuStreamSynchronize": [ctypes.c_void_p],
    "cuMemcpyAsync": [_PLACE, _PLACE, ctypes.c_size_t, ctypes.c_void_p],
}


class Driver:
    """libcuda in the primary context of one GPU, which jax uses as well.

    Raises:
      OSError: there is no driver.
      RuntimeError: a call failed.
    """

    def __init__(self, ordinal: int = 0):
        self._lib = ctypes.CDLL("libcuda.so.1")
        for name, arguments in CALLS.items():
            function = getattr(self._lib, name)
            function.restype, function.argtypes = ctypes.c_int, arguments
        self._call("cuInit", 0)
        self.device = ctypes.c_int()
        self._call("cuDeviceGet", ctypes.byref(self.device), ordinal)
        context = ctypes.c_void_p()
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), self.device)
        self._call("cuCtxSetCurrent", context)

    def _call(self, name: str, *arguments: object) -> None:
        status = getattr(self._lib, name)(*arguments)
        if status != 0:
            text = ctypes.c_char_p()
            self._lib.cuGetErrorString(status, ctypes.byref(text))
            why = (text.value or b"?").decode()
            raise RuntimeError(f"{name}: {why} ({status})")

    def name(self) -> str:
        """What the GPU is called."""
        text = ctypes.create_string_buffer(256)
        self._call("cuDeviceGetName", text, 256, self.device)
        return text.value.decode()

    def version(self) -> str:
        """The newest CUDA that the driver knows."""
        number = ctypes.c_int()
        self._call("cuDriverGetVersion", ctypes.byref(number))
        return f"{number.value // 1000}.{number.value % 1000 // 10}"

    def count(self) -> int:
        """How many GPUs there are."""
        number = ctypes.c_int()
        self._call("cuDeviceGetCount", ctypes.byref(number))
        return number.value

    def free_bytes(self) -> int:
        """Device memory that nobody has."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value

    def allocate(self, nbytes: int) -> ctypes.c_uint64:
        """Device memory."""
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(nbytes))
        return address

    def free(self, address: ctypes.c_uint64) -> None:
        """Gives `allocate`'s back."""
        self._call("cuMemFree_v2", address)

    def allocate_host(self, nbytes: int) -> ctypes.c_uint64:
        """Pinned host memory."""
        address = ctypes.c_void_p()
        self._call("cuMemHostAlloc", ctypes.byref(address), ctypes.c_size_t(nbytes), 1)
        return ctypes.c_uint64(address.value or 0)

    def free_host(self, address: ctypes.c_uint64) -> None:
        """Gives `allocate_host`'s back."""
        self._call("cuMemFreeHost", ctypes.c_void_p(address.value))

    def stream(self) -> ctypes.c_void_p:
        """A stream that doesn't wait for others."""
        stream = ctypes.c_void_p()
        self._call("cuStreamCreate", ctypes.byref(stream), 1)
        return stream

    def copy(
        self, to: ctypes.c_uint64, source: ctypes.c_uint64, nbytes: int, stream: ctypes.c_void_p
    ) -> None:
        """Enqueues a copy between any two places."""
        self._call("cuMemcpyAsync", to, source, ctypes.c_size_t(nbytes), stream)

    def wait(self, stream: ctypes.c_void_p) -> None:
        """Until all that is on the stream is done."""
        self._call("cuStreamSynchronize", stream)


def median_seconds(run: Callable[[], None], repeat: int) -> float:
    """Of `repeat` runs, after one that doesn't count."""
    run()
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def copy_ceilings(nbytes: int = 1 << 30, repeat: int = 7) -> dict[str, float]:
    """GB/s (10^9) of plain copies of `nbytes`.

    `device` counts bytes read and written, as memory sees them; the others count them once. `both`
    is the sum of two directions at the same time.
    """
    driver = Driver()
    device = [driver.allocate(nbytes) for _ in range(2)]
    host = [driver.allocate_host(nbytes) for _ in range(2)]
    streams = [driver.stream() for _ in range(2)]

    def rate(times: float, *pairs: tuple[ctypes.c_uint64, ctypes.c_uint64]) -> float:
        def run() -> None:
            for (to, source), stream in zip(pairs, streams, strict=False):
                driver.copy(to, source, nbytes, stream)
            for stream in streams:
                driver.wait(stream)

        return times * nbytes / median_seconds(run, repeat) / 1e9

    found = {
        "device": rate(2, (device[0], device[1])),
        "to_host": rate(1, (host[0], device[0])),
        "from_host": rate(1, (device[1], host[1])),
        "both": rate(2, (host[0], device[0]), (device[1], host[1])),
    }
    for memory in device:
        driver.free(memory)
    for memory in host:
        driver.free_host(memory)
    return found
