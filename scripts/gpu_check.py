"""Proves the CUDA path on the GPU there is, and measures it: one command, offline, 9 minutes.

    python scripts/gpu_check.py [--out=gpu_check.json] [--only=parity,moves] [--limit_s=520]
    python scripts/gpu_check.py --gpus=2        peer copies as well
    python scripts/gpu_check.py --sanitize[=memcheck,racecheck,synccheck,initcheck]
                                                compute-sanitizer on the kernels' tests instead

Builds `libaqua_cuda.so` in the checkout if it isn't newer than its sources (nvcc, cmake, jaxlib's
headers; no network), then runs each stage in a process of its own. A stage that fails, or finds a
wrong byte, is printed with its output and makes the exit status 1; one that can't be run (a package
is missing, the time is over) says so and counts as not run. Nothing is printed that wasn't measured
in this run. On a machine without a GPU what needs none is run, and the last line says so.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable

ROOT = pathlib.Path(__file__).resolve().parents[1]
LIBRARY = ROOT / "aqua_jax" / "_lib" / "libaqua_cuda.so"
PROBE = """
import jax
try:
    print("found:", jax.devices("gpu")[0].device_kind)
except RuntimeError as error:
    print("none:", str(error).splitlines()[0])
"""
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
# What of tests/ops/test_moves.py is about CPUs: processes that end, XLA's own scratch memory.
MOVES = "not test_a_process_ends and not test_in_place"
TRANSFORMERS = ["-k", "engine", "tests/parity"]
SANITIZERS = "memcheck,racecheck,synccheck,initcheck"
SANITIZED = "definition or merged or long_prompt or nonsense or copies or absent"


@dataclasses.dataclass
class Stage:
    """What a stage did. `status`: ok, failed, not run."""

    name: str
    status: str
    seconds: float = 0.0
    note: str = ""
    rows: list[dict] = dataclasses.field(default_factory=list)


class Check:
    """The stages of one run, under one deadline."""

    def __init__(self, limit_s: float, environment: dict[str, str]):
        self.stages: list[Stage] = []
        self._end, self._environment = time.monotonic() + limit_s, environment

    @property
    def left_s(self) -> float:
        """Seconds until the deadline."""
        return self._end - time.monotonic()

    def run(
        self, name: str, command: list[str], *, most_s: float, on_gpu: bool = True,
        environment: dict[str, str] | None = None,
        read: Callable[[str], list[dict]] | None = None,
    ) -> Stage:
        """Runs a command for at most `most_s` seconds; `read` makes rows of what it printed."""
        left = min(most_s, self.left_s)
        print(f"== {name}", flush=True)
        if left < 5:
            return self._add(Stage(name, "not run", note="out of time"))
        variables = {**self._environment, "PYTHONPATH": str(ROOT), **(environment or {})}
        variables["JAX_PLATFORMS"] = "cuda,cpu" if on_gpu else "cpu"
        started = time.monotonic()
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=left
            )
            output, code = done.stdout + done.stderr, done.returncode
        except FileNotFoundError as error:
            return self._add(Stage(name, "not run", note=str(error)))
        except subprocess.TimeoutExpired as error:
            said = (error.stdout or b"") + (error.stderr or b"")
            output = said.decode(errors="replace") if isinstance(said, bytes) else str(said)
            output, code = f"{output}\nnot done after {left:.0f} s", 124
        stage = Stage(name, "ok" if code == 0 else "failed", time.monotonic() - started)
        missing = re.search(r"^(?:E +)?ModuleNotFoundError: (.*)$", output, re.M)
        if code and missing:
            stage.status, stage.note = "not run", missing[1]
        elif code:
            stage.note = f"exit status {code}"
            print(output[-6000:], flush=True)
        if read is not None:
            stage.rows = read(output)
        return self._add(stage)

    def _add(self, stage: Stage) -> Stage:
        self.stages.append(stage)
        print(f"   {stage.status} {stage.seconds:.1f} s {stage.note}", flush=True)
        return stage


def json_rows(output: str) -> list[dict]:
    """The JSON objects among the lines of an output."""
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


def test_counts(output: str) -> list[dict]:
    """How many tests passed and failed, from pytest's last line."""
    found = {what: int(n) for n, what in re.findall(r"(\d+) (passed|failed|error)", output)}
    return [found] if found else []


def build(check: Check) -> bool:
    """Builds the library if it is missing or older than a source."""
    sources = [p for p in (ROOT / "ffi").rglob("*") if p.is_file()] + [ROOT / "CMakeLists.txt"]
    newest = max(p.stat().st_mtime for p in sources)
    cpu = LIBRARY.with_name("libaqua_cpu.so")
    if all(p.exists() and p.stat().st_mtime > newest for p in (LIBRARY, cpu)):
        print("== build\n   the libraries are newer than their sources", flush=True)
        return True
    if shutil.which("cmake") is None:
        check.stages.append(Stage("build", "failed", note="there is no cmake"))
        return LIBRARY.exists()
    folder = str(ROOT / "build" / "gpu_check")
    environment = {"AQUA_REQUIRE_CUDA": "1"}
    check.run(
        "configure", ["cmake", "-S", ".", "-B", folder, f"-DPython_EXECUTABLE={sys.executable}"],
        most_s=60, on_gpu=False, environment=environment,
    )
    jobs = str(os.cpu_count() or 2)
    command = ["cmake", "--build", folder, "--target", "dev", "--parallel", jobs]
    check.run("build", command, most_s=300, on_gpu=False, environment=environment)
    return LIBRARY.exists() and check.stages[-1].status == "ok"


def correctness(check: Check, wanted: Callable[[str], bool]) -> None:
    """Ops, moves, lending and engine, for exactness."""
    if wanted("parity"):
        check.run("parity of ops", [*PYTEST, "tests/ops/cuda_cases.py"], most_s=180,
                  read=test_counts)
    if wanted("queue"):
        check.run("copy queue", [*PYTEST, "-k", MOVES, "tests/ops/test_moves.py"], most_s=90,
                  read=test_counts)
    if wanted("arenas"):
        # Two processes on one GPU: jax must not take most of it.
        check.run(
            "arenas across processes", [sys.executable, "scripts/gpu_arenas.py"], most_s=60,
            environment={"XLA_CLIENT_MEM_FRACTION": "0.3", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.3"},
            read=json_rows,
        )
    if wanted("engine"):
        check.run(
            "engine, deterministic mode",
            [*PYTEST, "-k", "auto", "tests/engine/test_deterministic.py"], most_s=150,
            read=test_counts,
        )
        check.run(
            "engine, pages swapped out and in",
            [*PYTEST, "-k", "test_swapping or test_two_tiers", "tests/engine/test_paging.py"],
            most_s=120, read=test_counts,
        )
        # f32 products as the other side makes them, not through TF32.
        check.run(
            "engine against transformers", [*PYTEST, *TRANSFORMERS], most_s=120, read=test_counts,
            environment={"JAX_DEFAULT_MATMUL_PRECISION": "highest"},
        )


def measurements(check: Check, wanted: Callable[[str], bool], gpus: int) -> None:
    """Rates, each in a process of its own."""
    measure = [sys.executable, "scripts/gpu_measure.py"]
    for what, most_s in (("ceilings", 60), ("moves", 90), ("decode", 90), ("prefill", 90)):
        if wanted(what):
            check.run(what, [*measure, what], most_s=most_s, read=json_rows)
    if wanted("moves"):
        for way, limit in (("copy engines only", "0"), ("kernels only", str(1 << 40))):
            check.run(f"moves, {way}", [*measure, "moves"], most_s=60, read=json_rows,
                      environment={"AQUA_COPY_ENGINE_BYTES": limit})
    if wanted("peer") and gpus > 1:
        check.run("peer", [*measure, "peer"], most_s=60, read=json_rows)


def sanitize(check: Check, tools: list[str]) -> None:
    """Our kernels (by name) under each of compute-sanitizer's tools."""
    for left, tool in zip(range(len(tools), 0, -1), tools, strict=True):
        check.run(
            f"compute-sanitizer {tool}",
            ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9",
             "--kernel-name", "kernel_substring=aqua", *PYTEST, "-k", SANITIZED,
             "tests/ops/cuda_cases.py"],
            most_s=check.left_s / left, read=test_counts,
            environment={"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "AQUA_TEST_SCALE": "1"},
        )


def without_gpu(check: Check) -> None:
    """What needs no GPU: the library and lowering, the kernels emulated."""
    check.run("library, lowering, machine code", [*PYTEST, "tests/ops/test_cuda_build.py"],
              most_s=200, on_gpu=False, read=test_counts)
    check.run("kernels emulated on the CPU", [*PYTEST, "tests/ops/test_cuda_emulated.py"],
              most_s=400, on_gpu=False, read=test_counts)


def versions() -> dict[str, str]:
    """Of what matters, where installed."""
    found = {"python": sys.version.split()[0]}
    for name in ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "flax", "numpy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def table(stages: list[Stage]) -> str:
    """Every stage, and under it its rows."""
    lines = []
    for stage in stages:
        lines.append(f"{stage.name:36} {stage.status:8} {stage.seconds:7.1f} s  {stage.note}")
        for row in stage.rows:
            shown = [
                f"{key}={value:.3g}" if isinstance(value, float) else f"{key}={value}"
                for key, value in row.items()
            ]
            lines.append("    " + "  ".join(shown))
    return "\n".join(lines)


def main() -> int:
    """Runs everything; the exit status."""
    parser = argparse.ArgumentParser(description="Checks and measures the CUDA path.")
    parser.add_argument("--out", default="gpu_check.json", help="where the JSON goes")
    parser.add_argument("--only", default="", help="stages, separated by commas")
    parser.add_argument("--gpus", type=int, default=1, help="2: peer copies as well")
    parser.add_argument("--limit_s", type=float, default=520, help="seconds for everything")
    parser.add_argument("--sanitize", nargs="?", const=SANITIZERS, default="",
                        help="run these tools of compute-sanitizer instead")
    args = parser.parse_args()
    only = set(filter(None, args.only.split(",")))
    check = Check(args.limit_s, dict(os.environ))
    built = build(check)
    probe = check.run(
        "device", [sys.executable, "-c", PROBE], most_s=90,
        read=lambda text: [{"device": found} for found in re.findall(r"^found: (.*)$", text, re.M)],
    )
    gpu = bool(probe.rows)
    if not built:
        check.stages.append(Stage("everything else", "not run", note="the build failed"))
    elif not gpu:
        without_gpu(check)
    elif args.sanitize:
        sanitize(check, args.sanitize.split(","))
    else:
        def wanted(name: str) -> bool:
            return not only or name in only

        correctness(check, wanted)
        measurements(check, wanted, args.gpus)
    report = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": probe.rows[0]["device"] if gpu else None,
        "versions": versions(),
        "stages": [dataclasses.asdict(stage) for stage in check.stages],
    }
    pathlib.Path(args.out).write_text(json.dumps(report, indent=1) + "\n")
    print("\n" + table(check.stages))
    failed = [stage.name for stage in check.stages if stage.status == "failed"]
    print(f"failed: {', '.join(failed) or 'nothing'}; written to {args.out}")
    if not gpu:
        print("no GPU: nothing measured")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
