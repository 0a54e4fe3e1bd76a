"""The CUDA handlers on a CPU: their sources compiled as plain C++ with a CUDA emulation.

A pytest plugin (`-p tests.ops.emulated_cuda`) that makes a process use them wherever ops would
use the CPU's. Every thread of a block, barrier, matrix instruction and asynchronous copy is
emulated (ffi/tests/cuda_emulation), so the tests of the ops see the kernels' real arithmetic and
synchronisation; what stays unseen is the PTX in ffi/cuda/device.cuh and the hardware.

With AQUA_EMULATED_SANITIZE=1 they are compiled with the address and undefined-behaviour sanitizers,
which see each access outside an array of XLA's and each 16-byte access that isn't aligned. Such a
library needs `preloads()` in LD_PRELOAD.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import fcntl
import hashlib
import os
import pathlib
import subprocess

import jax

from aqua_jax.ops import library

ROOT = pathlib.Path(__file__).resolve().parents[2]
FFI = ROOT / "ffi"
FILE = "libaqua_cuda_emulated.so"
SANITIZE = os.environ.get("AQUA_EMULATED_SANITIZE") == "1"
# Not of stacks: threads of a block share one, and leave functions without an end.
SANITIZERS = [
    "-g", "-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=undefined",
    "-fno-omit-frame-pointer", "--param", "asan-stack=0",
]
DRIVERS = ("arena.cc", "driver.cc", "legacy_ipc.cc", "topology.cc")


def sources() -> list[pathlib.Path]:
    """What is compiled."""
    emulation = FFI / "tests" / "cuda_emulation"
    cuda = [p for p in (FFI / "cuda").iterdir() if p.suffix in (".cc", ".cu")]
    needs_driver = {FFI / "cuda" / name for name in DRIVERS}
    shared = (FFI / "common").glob("moves_*.cc")
    return sorted({*cuda, *emulation.glob("*.cc"), *shared} - needs_driver)


def build() -> pathlib.Path:
    """The folder of the emulated library, compiled if its sources have changed."""
    digest = hashlib.sha256()
    for path in sorted([*FFI.rglob("*.h"), *FFI.rglob("*.cuh"), *sources()]):
        digest.update(path.read_bytes())
    name = digest.hexdigest()[:16] + ("-sanitized" if SANITIZE else "")
    folder = ROOT / ".pytest_cache" / "emulated" / name
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / FILE).exists():
            _compile(folder)
    return folder


def _compile(folder: pathlib.Path) -> None:
    flags = [
        os.environ.get("CXX", "c++"), "-std=c++17", "-O1", "-fPIC", "-DAQUA_EMULATE", "-pthread",
        "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas",
        "-I", str(FFI / "tests" / "cuda_emulation"), "-isystem", jax.ffi.include_dir(),
        *(SANITIZERS if SANITIZE else []),
    ]

    plain = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}  # the compiler's own

    def one(path: pathlib.Path) -> pathlib.Path:
        out = folder / (path.stem + ".o")
        command = [*flags, "-x", "c++", "-c", str(path), "-o", str(out)]
        done = subprocess.run(command, capture_output=True, text=True, env=plain)
        assert done.returncode == 0, done.stderr
        return out

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(one, sources()))
    fresh = folder / (FILE + ".new")
    link = [
        flags[0], "-shared", "-pthread", *(SANITIZERS[1:2] if SANITIZE else []), "-Wl,-Bsymbolic",
        *map(str, objects), "-o", str(fresh),
    ]
    subprocess.run(link, check=True, env=plain)
    fresh.rename(folder / FILE)


def preloads() -> str:
    """The sanitizers' libraries, for LD_PRELOAD."""
    compiler = os.environ.get("CXX", "c++")
    return ":".join(
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    )


def pytest_configure() -> None:
    """Use the emulated handlers in this process."""
    os.environ["AQUA_LIBRARY_PATH"] = str(build())
    real = library._KINDS["cuda"]
    library._KINDS["cuda"] = dataclasses.replace(real, file=FILE, registered_as="cpu")
    library.platform = lambda: "cuda"  # in every thread
