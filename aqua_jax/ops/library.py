"""Loads the compiled FFI handlers and says which operations have one.

The library lies in `aqua_jax/_lib`, or where AQUA_LIBRARY_PATH points (a folder). Without it every
operation falls back to its jnp reference; that is logged once and shows in `implementations()`.
Threads: AQUA_THREADS, default the CPUs this process may run on. Instruction set: AQUA_ISA =
generic | avx2 | avx512 | avx512bf16 | amx, default and at most what the processor has.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import pathlib

import jax

_LOG = logging.getLogger(__name__)
_FILE = "libaqua_cpu.so"
# FFI target -> handler symbol. A symbol that a library lacks costs only that operation.
_TARGETS = {
    "aqua_attention": "AquaAttention",
    "aqua_copy_pages": "AquaCopyPages",
    "aqua_enqueue_moves": "AquaEnqueueMoves",
    "aqua_linear": "AquaLinear",
    "aqua_mlp": "AquaMlp",
    "aqua_qkv": "AquaQkv",
    "aqua_swiglu": "AquaSwiglu",
    "aqua_sample": "AquaSample",
}
# Operation -> the target it needs and the name of what runs without it.
_OPERATIONS = {
    "attention": ("aqua_attention", "reference"),
    "copy_pages": ("aqua_copy_pages", "reference"),
    "linear": ("aqua_linear", "xla"),
    "sample_tokens": ("aqua_sample", "reference"),
}


class _Library:
    """The loaded library, the targets it gave, and why targets are missing."""

    def __init__(self) -> None:
        self.handle: ctypes.CDLL | None = None
        self.targets: frozenset[str] = frozenset()
        self.reason = ""
        folder = os.environ.get("AQUA_LIBRARY_PATH")
        base = pathlib.Path(folder) if folder else pathlib.Path(__file__).parent.parent / "_lib"
        path = base / _FILE
        if not path.is_file():
            self.reason = f"{path} does not exist; `pip install .` builds it"
            return
        try:
            handle = ctypes.CDLL(str(path))
            handle.aqua_isa.restype = ctypes.c_char_p
        except (OSError, AttributeError) as error:
            self.reason = f"{path} cannot be used: {error}"
            return
        self.handle = handle
        found = []
        for target, symbol in _TARGETS.items():
            if not hasattr(handle, symbol):
                self.reason = f"{path} has no {symbol}: it is older than this package"
                continue
            capsule = jax.ffi.pycapsule(getattr(handle, symbol))
            jax.ffi.register_ffi_target(target, capsule, platform="cpu")
            found.append(target)
        self.targets = frozenset(found)


@functools.cache
def _library() -> _Library:
    library = _Library()
    if library.reason:
        _LOG.warning("compiled handlers are missing, using jnp references: %s", library.reason)
    return library


def available(target: str = "aqua_attention") -> bool:
    """Whether the handler `target` is loaded and registered (for the CPU platform)."""
    return target in _library().targets


def reason() -> str:
    """Why a handler is missing; empty when all are there."""
    return _library().reason


def symbols() -> ctypes.CDLL | None:
    """The library for plain C calls (which release the GIL); None without it."""
    return _library().handle


def instruction_set() -> str:
    """The instruction set that handlers use now: generic, avx2, avx512, avx512bf16 or amx.

    `none` without the library.
    """
    handle = _library().handle
    return "none" if handle is None else handle.aqua_isa().decode()


def use(target: str) -> bool:
    """Whether an operation that was not told otherwise should call `target`: loaded, and on CPU."""
    return jax.default_backend() == "cpu" and available(target)


def implementations() -> dict[str, str]:
    """What each operation runs by default: `ffi`, or the name of its fallback."""
    return {
        name: "ffi" if use(target) else fallback
        for name, (target, fallback) in _OPERATIONS.items()
    }
