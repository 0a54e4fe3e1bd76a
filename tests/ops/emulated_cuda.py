"""The CUDA handlers on a CPU: their sources compiled as plain C++ with a CUDA emulation.

A pytest plugin (`-p tests.ops.emulated_cuda`) that makes a process use them wherever ops would
use the CPU's. Every thread of a block, barrier, matrix instruction and asynchronous copy is
emulated (ffi/tests/cuda_emulation), so the tests of the ops see the kernels' real arithmetic and
synchronisation; what stays unseen is the PTX in ffi/cuda/device.cuh and the hardware.
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
    folder = ROOT / ".pytest_cache" / "emulated" / digest.hexdigest()[:16]
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
    ]

    def one(path: pathlib.Path) -> pathlib.Path:
        out = folder / (path.stem + ".o")
        command = [*flags, "-x", "c++", "-c", str(path), "-o", str(out)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return out

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(one, sources()))
    fresh = folder / (FILE + ".new")
    link = [flags[0], "-shared", "-pthread", "-Wl,-Bsymbolic", *map(str, objects), "-o", str(fresh)]
    subprocess.run(link, check=True)
    fresh.rename(folder / FILE)


def pytest_configure() -> None:
    """Use the emulated handlers in this process."""
    os.environ["AQUA_LIBRARY_PATH"] = str(build())
    real = library._KINDS["cuda"]
    library._KINDS["cuda"] = dataclasses.replace(real, file=FILE, registered_as="cpu")
    library.platform = lambda: "cuda"  # in every thread
