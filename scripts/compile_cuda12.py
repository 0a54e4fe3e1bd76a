"""Compiles ffi/cuda with CUDA 12, whose nvcc PyPI doesn't have: clang and NVIDIA's own packages.

    python scripts/compile_cuda12.py [--clang=clang++-19] [--folder=build/cuda12] [--jobs=2]

Fetches headers, libdevice and ptxas of CUDA 12.9 with pip into `folder` (or takes those that are
there: nothing is fetched twice), then compiles, to nothing that is kept:

- each .cu file to machine code for sm_80 and sm_90, by clang and ptxas 12.9
- each .cu file to host code, by clang
- each .cc file, by the C++ compiler (CXX, or c++), with warnings as errors

and prints a line for each. Exit status 1 if one fails. Where there is an nvcc of CUDA 12 the
ordinary build is the better test; this one says that headers, PTX and types agree with CUDA 12, not
that anything runs, and clang's registers are not nvcc's.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import pathlib
import shutil
import subprocess
import sys

import jax

ROOT = pathlib.Path(__file__).resolve().parents[1]
SOURCES = ROOT / "ffi" / "cuda"
PACKAGES = (
    "nvidia-cuda-nvcc-cu12==12.9.86", "nvidia-cuda-runtime-cu12==12.9.79",
    "nvidia-cuda-cccl-cu12==12.9.27",
)
ARCHITECTURES = ("sm_80", "sm_90")


def toolkit(folder: pathlib.Path) -> pathlib.Path:
    """A directory laid out as clang expects CUDA's, made of the packages."""
    packages, found = folder / "packages", folder / "toolkit"
    if not (packages / "nvidia" / "cuda_cccl").exists():
        subprocess.run(
            [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target",
             str(packages), *PACKAGES],
            check=True,
        )
    if found.exists():
        shutil.rmtree(found)
    (found / "include").mkdir(parents=True)
    nvidia = packages / "nvidia"
    for name in ("cuda_cccl", "cuda_nvcc", "cuda_runtime"):
        for path in (nvidia / name / "include").iterdir():
            target = found / "include" / path.name
            if not target.exists():
                target.symlink_to(path)
    for name in ("bin", "nvvm"):
        (found / name).symlink_to(nvidia / "cuda_nvcc" / name)
    (nvidia / "cuda_nvcc" / "bin" / "ptxas").chmod(0o755)
    # clang includes this header of cuRAND's in every file; nothing of it is used here.
    (found / "include" / "curand_mtgp32_kernel.h").write_text("")
    # By the first clang knows a CUDA directory, by the second its version.
    (found / "lib64").symlink_to(nvidia / "cuda_runtime" / "lib")
    (found / "version.json").write_text('{"cuda": {"version": "12.9.0"}}\n')
    return found


def commands(cuda: pathlib.Path, clang: str) -> list[tuple[str, list[str]]]:
    """What is compiled, and how."""
    xla = ["-isystem", jax.ffi.include_dir()]
    device = [
        clang, "-x", "cuda", "-std=c++17", "-O3", f"--cuda-path={cuda}",
        "-Wno-unknown-cuda-version", *xla, "-c", "-o", os.devnull,
    ]
    found = []
    for path in sorted(SOURCES.glob("*.cu")):
        for architecture in ARCHITECTURES:
            found.append((f"{path.name} for {architecture}", [
                *device, "--cuda-device-only", f"--cuda-gpu-arch={architecture}", str(path),
            ]))
        found.append((f"{path.name} for the host", [*device, "--cuda-host-only", str(path)]))
    host = [os.environ.get("CXX") or shutil.which("c++") or "g++", "-std=c++17", "-O2", "-Wall",
            "-Wextra", "-Werror", "-isystem", str(cuda / "include"), *xla, "-c", "-o", os.devnull]
    found += [(path.name, [*host, str(path)]) for path in sorted(SOURCES.glob("*.cc"))]
    return found


def main() -> int:
    """Compiles everything; the exit status."""
    parser = argparse.ArgumentParser(description="Compiles ffi/cuda with CUDA 12.")
    parser.add_argument("--clang", default="clang++-19", help="a clang++ that knows CUDA")
    parser.add_argument("--folder", default=str(ROOT / "build" / "cuda12"),
                        help="where CUDA's packages are put")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 2, help="at the same time")
    args = parser.parse_args()
    clang = shutil.which(args.clang)
    if clang is None:
        print(f"clang: got {args.clang!r}, which isn't there; allowed: a clang++ of LLVM 19 or "
              "newer (Debian: apt-get install clang-19)", file=sys.stderr)
        return 1
    cuda = toolkit(pathlib.Path(args.folder).resolve())

    def compiled(job: tuple[str, list[str]]) -> bool:
        name, command = job
        done = subprocess.run(command, capture_output=True, text=True)
        print(f"{'ok    ' if done.returncode == 0 else 'FAILED'} {name}", flush=True)
        if done.returncode:
            print(done.stderr[-4000:], flush=True)
        return done.returncode == 0

    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        results = list(pool.map(compiled, commands(cuda, clang)))
    print(f"{sum(results)} of {len(results)} compiled with CUDA 12.9")
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
