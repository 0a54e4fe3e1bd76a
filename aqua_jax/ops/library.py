"""Loads the compiled FFI handlers and says which operations have one.

There is a library per platform, `libaqua_cpu.so` and `libaqua_cuda.so`, in `aqua_jax/_lib` or where
AQUA_LIBRARY_PATH points (a folder). Without it every operation falls back to its jnp reference;
that is logged once and shows in `implementations()`. Threads: AQUA_THREADS, default the CPUs this
process may run on. Instruction set: AQUA_ISA = generic | avx2 | avx512 | avx512bf16 | amx, default
and at most what the processor has.

Questions are about the platform that programs are made for: jax's default backend, or inside
`lowering_for(platform)` that one. Both libraries load anywhere: `libaqua_cuda.so` needs no driver.
"""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
import dataclasses
import functools
import logging
import os
import pathlib
from collections.abc import Iterator

import jax

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class _Kind:
    """What the library of a platform is called and has."""

    file: str
    registered_as: str  # jax's name of the platform
    targets: dict[str, str]  # FFI target -> handler; one that is missing costs that operation only
    proof: str  # a function that only our library has


_KINDS = {
    "cpu": _Kind(
        "libaqua_cpu.so", "cpu",
        {
            "aqua_attention": "AquaAttention",
            "aqua_copy_pages": "AquaCopyPages",
            "aqua_enqueue_moves": "AquaEnqueueMoves",
            "aqua_linear": "AquaLinear",
            "aqua_mlp": "AquaMlp",
            "aqua_qkv": "AquaQkv",
            "aqua_swiglu": "AquaSwiglu",
            "aqua_sample": "AquaSample",
        },
        "aqua_isa",
    ),
    # Matmuls and sampling are XLA's there.
    "cuda": _Kind(
        "libaqua_cuda.so", "CUDA",
        {
            "aqua_attention": "AquaAttention",
            "aqua_copy_pages": "AquaCopyPages",
            "aqua_enqueue_moves": "AquaEnqueueMoves",
        },
        "aqua_attention_workspace",
    ),
}
# Operation -> the target it needs and the name of what runs without it.
_OPERATIONS = {
    "attention": ("aqua_attention", "reference"),
    "copy_pages": ("aqua_copy_pages", "reference"),
    "linear": ("aqua_linear", "xla"),
    "sample_tokens": ("aqua_sample", "reference"),
}
_lowering: contextvars.ContextVar[str | None] = contextvars.ContextVar("lowering", default=None)


def platform() -> str:
    """The platform that programs are made for: `cpu`, `cuda`, or another of jax's names."""
    backend = _lowering.get() or jax.default_backend()
    return "cuda" if backend == "gpu" else backend


@contextlib.contextmanager
def lowering_for(platform: str) -> Iterator[None]:
    """What is traced inside is for `platform` (`cpu` or `cuda`), whatever devices there are.

    For `jax.export(..., platforms=[platform])` on a machine without such a device.
    """
    if platform not in _KINDS:
        raise ValueError(f"platform: got {platform!r}; allowed: {', '.join(_KINDS)}")
    token = _lowering.set(platform)
    try:
        yield
    finally:
        _lowering.reset(token)


class _Library:
    """A loaded library, the targets it gave, and why targets are missing."""

    def __init__(self, platform: str) -> None:
        self.handle: ctypes.CDLL | None = None
        self.targets: frozenset[str] = frozenset()
        self.reason = ""
        kind = _KINDS.get(platform)
        if kind is None:
            self.reason = f"there are no handlers for the platform {platform}"
            return
        folder = os.environ.get("AQUA_LIBRARY_PATH")
        base = pathlib.Path(folder) if folder else pathlib.Path(__file__).parent.parent / "_lib"
        path = base / kind.file
        if not path.is_file():
            needs = " where nvcc is found" if platform == "cuda" else ""
            self.reason = f"{path} does not exist; `pip install .` builds it{needs}"
            return
        try:
            handle = ctypes.CDLL(str(path))
            getattr(handle, kind.proof)
        except (OSError, AttributeError) as error:
            self.reason = f"{path} cannot be used: {error}"
            return
        self.handle = handle
        if platform == "cuda":
            handle.aqua_kernels_preload.restype = ctypes.c_char_p
            handle.aqua_kernels_preload.argtypes = [ctypes.c_int32]
        found = []
        for target, symbol in kind.targets.items():
            if not hasattr(handle, symbol):
                self.reason = f"{path} has no {symbol}: it is older than this package"
                continue
            capsule = jax.ffi.pycapsule(getattr(handle, symbol))
            jax.ffi.register_ffi_target(target, capsule, platform=kind.registered_as)
            found.append(target)
        self.targets = frozenset(found)


@functools.cache
def _library(platform: str) -> _Library:
    library = _Library(platform)
    if library.reason:
        _LOG.warning("compiled handlers are missing, using jnp references: %s", library.reason)
    return library


def available(target: str = "aqua_attention") -> bool:
    """Whether the handler `target` is loaded and registered for this platform."""
    found = platform()
    if found == "cuda" and _lowering.get() is None and _library(found).targets:
        _load_kernels()
    return target in _library(found).targets


@functools.cache
def _load_kernels() -> None:
    """Loads our kernels onto every GPU that jax uses, before a program of ours is made.

    Otherwise the driver would load each at its first launch, which may be inside a graph that XLA
    captures, where loading isn't allowed.
    """
    handle = _library("cuda").handle
    if jax.default_backend() != "gpu" or handle is None:
        return  # the handlers are emulated
    for device in jax.local_devices():
        why = handle.aqua_kernels_preload(device.local_hardware_id or 0)
        if why is not None:
            _LOG.warning("kernels can't be loaded onto %s now: %s", device, why.decode())


def reason() -> str:
    """Why a handler is missing; empty when all that this platform has are there."""
    return _library(platform()).reason


def symbols() -> ctypes.CDLL | None:
    """This platform's library for plain C calls (which release the GIL); None without it."""
    return _library(platform()).handle


def instruction_set() -> str:
    """The instruction set that CPU handlers use now: generic, avx2, avx512, avx512bf16 or amx.

    `none` without the library.
    """
    handle = _library("cpu").handle
    if handle is None:
        return "none"
    handle.aqua_isa.restype = ctypes.c_char_p
    return handle.aqua_isa().decode()


def use(target: str) -> bool:
    """Whether an operation that was not told otherwise should call `target`."""
    return available(target)


def implementations() -> dict[str, str]:
    """What each operation runs by default: `ffi`, or the name of its fallback."""
    return {
        name: "ffi" if use(target) else fallback
        for name, (target, fallback) in _OPERATIONS.items()
    }
