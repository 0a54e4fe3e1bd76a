"""Proves the CUDA path on the GPU there is, and measures it: one command, offline, 9 minutes.

    python scripts/gpu_check.py [--out=gpu_check.json] [--only=parity,moves] [--limit_s=520]
    python scripts/gpu_check.py --gpus=2        peer copies and tensor parallelism as well
    python scripts/gpu_check.py --soak          8 minutes of engines under load: no leak of memory
    python scripts/gpu_check.py --sanitize[=memcheck,racecheck,synccheck,initcheck]
                                                compute-sanitizer on the kernels' tests instead
    python scripts/gpu_check.py --platform=cpu  every stage at tiny sizes on this machine: a test of
                                                this script, where nothing is measured

Builds `libaqua_cuda.so` in the checkout if it isn't newer than its sources (nvcc, cmake, jaxlib's
headers; no network), then runs each stage in a process of its own, with a budget: its share of the
time that is left, at most its own limit. A stage that fails, or finds a wrong byte, is printed with
its output and makes the exit status 1; the others go on. One that can't be run (a package is
missing, the time is over) says so and counts as not run. Nothing is printed that wasn't measured in
this run. On a machine without a GPU what needs none is run, and the last line says so.
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


@dataclasses.dataclass(frozen=True)
class Job:
    """A stage to come.

    Attributes:
      key: what --only calls it.
      name: in the table.
      command: what runs.
      most_s: its limit; where time is short it gets its share by this.
      read: makes rows of what it printed.
      environment: variables of its own.
      gpus: how many it needs; 0: it can run at tiny sizes on a CPU.
    """

    key: str
    name: str
    command: tuple[str, ...]
    most_s: float
    read: Callable[[str], list[dict]] | None = None
    environment: tuple[tuple[str, str], ...] = ()
    gpus: int = 1


class Check:
    """The stages of one run, under one deadline."""

    def __init__(self, limit_s: float, environment: dict[str, str]):
        self.stages: list[Stage] = []
        self._end, self._environment = time.monotonic() + limit_s, environment

    def run_all(self, jobs: list[Job], gpus: int) -> None:
        """Runs each job that so many GPUs allow, within its share of what time is left."""
        jobs = [job for job in jobs if self._possible(job, gpus)]
        for index, job in enumerate(jobs):
            share = job.most_s / sum(one.most_s for one in jobs[index:])
            self.run(
                job.name, list(job.command), most_s=min(job.most_s, self.left_s * share),
                on_gpu=gpus > 0, environment=dict(job.environment), read=job.read,
            )

    def _possible(self, job: Job, gpus: int) -> bool:
        if job.gpus <= gpus:
            return True
        if job.gpus == 1 or gpus == 0:
            self.stages.append(Stage(job.name, "not run", note=f"needs {job.gpus} GPU"))
        return False

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
        if left < 4:
            return self._add(Stage(name, "not run", note="out of time"))
        variables = {**self._environment, "PYTHONPATH": str(ROOT), **(environment or {})}
        variables["JAX_PLATFORMS"] = "cuda,cpu" if on_gpu else "cpu"
        variables["TRANSFORMERS_OFFLINE"] = variables["HF_HUB_OFFLINE"] = "1"
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


def jobs_of(platform: str, limit_s: float) -> list[Job]:
    """Every stage, in order: first what must be right, then what is measured."""
    # Two processes on one GPU, or torch beside jax: jax must not take most of it.
    third = (("XLA_CLIENT_MEM_FRACTION", "0.3"),)
    # f32 products as the other side makes them, not through TF32.
    exact = (("JAX_DEFAULT_MATMUL_PRECISION", "highest"),)
    measure = (sys.executable, "scripts/gpu_measure.py")
    bursts = (sys.executable, "scripts/gpu_bursts.py")
    engine = (sys.executable, "scripts/gpu_engine.py")
    where = (f"--platform={platform}",)

    def timed(command: tuple[str, ...], what: str, most_s: float) -> tuple[str, ...]:
        return (*command, what, *where, f"--limit_s={0.7 * most_s:.0f}")

    # Two of jax's devices where there is only a CPU.
    two = (("XLA_FLAGS", "--xla_force_host_platform_device_count=2"),) if platform == "cpu" else ()
    no_graphs = (("XLA_FLAGS", "--xla_gpu_enable_command_buffer="),)
    on = 0 if platform == "cpu" else 1
    return [
        Job("parity", "parity of ops", (*PYTEST, "tests/ops/cuda_cases.py"), 120, test_counts),
        Job("queue", "copy queue", (*PYTEST, "-k", MOVES, "tests/ops/test_moves.py"), 60,
            test_counts, gpus=on),
        Job("arenas", "arenas across processes, lender killed",
            (sys.executable, "scripts/gpu_arenas.py"), 40, json_rows, third),
        Job("engine", "engine, deterministic mode",
            (*PYTEST, "-k", "auto", "tests/engine/test_deterministic.py"), 90, test_counts),
        Job("engine", "engine, pages swapped out and in",
            (*PYTEST, "-k", "test_swapping or test_two_tiers", "tests/engine/test_paging.py"), 80,
            test_counts, gpus=on),
        Job("engine", "engine against transformers", (*PYTEST, *TRANSFORMERS), 90, test_counts,
            exact),
        Job("arenas", "the same by older IPC, nobody killed",
            (sys.executable, "scripts/gpu_arenas.py"), 30, json_rows,
            (*third, ("AQUA_LEGACY_IPC", "1"))),
        Job("killed", "lenders killed in mid-burst", timed(bursts, "killed", 80), 80, json_rows,
            gpus=on),
        Job("lent", "memory lent through a coordinator", timed(bursts, "lent", 50), 50, json_rows,
            gpus=on),
        Job("ceilings", "ceilings", (*measure, "ceilings"), 30, json_rows),
        Job("moves", "moves", (*measure, "moves"), 40, json_rows),
        Job("moves", "moves, copy engines only", (*measure, "moves"), 30, json_rows,
            (("AQUA_COPY_ENGINE_BYTES", "0"),)),
        Job("moves", "moves, kernels only", (*measure, "moves"), 30, json_rows,
            (("AQUA_COPY_ENGINE_BYTES", str(1 << 40)),)),
        Job("decode", "decode attention", (*measure, "decode"), 40, json_rows),
        Job("prefill", "prompt attention", (*measure, "prefill"), 40, json_rows),
        Job("steps", "8B-shaped model: steps, prompt, overlap", timed(engine, "steps", 120), 120,
            json_rows, gpus=on),
        Job("graphs", "the same without command buffers", timed(engine, "steps", 60), 60, json_rows,
            no_graphs),
        Job("startup", "start-up", timed(engine, "startup", 60), 60, json_rows, gpus=on),
        Job("bursts", "bursts, pool cut", timed(bursts, "bursts", 170), 170, json_rows, gpus=on),
        Job("transformers", "transformers on the same work", timed(bursts, "transformers", 70), 70,
            json_rows, third, gpus=on),
        Job("peer", "peer copies", (*measure, "peer"), 60, json_rows, gpus=2),
        Job("tensor", "tensor parallelism with paging, a lender a shard, one killed",
            timed(bursts, "tensor", 110), 110, json_rows, two, gpus=0 if platform == "cpu" else 2),
        Job("soak", "soak", (*bursts, "soak", *where, f"--limit_s={limit_s:.0f}"), limit_s + 120,
            json_rows, gpus=on),
    ]


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
    parser.add_argument("--gpus", type=int, default=1, help="2: what needs two as well")
    parser.add_argument("--limit_s", type=float, default=None,
                        help="seconds for everything; default 520, or 480 of load with --soak")
    parser.add_argument("--platform", choices=["cuda", "cpu"], default="cuda",
                        help="cpu: all that can, at tiny sizes; a test of this script")
    parser.add_argument("--soak", action="store_true", help="that alone")
    parser.add_argument("--sanitize", nargs="?", const=SANITIZERS, default="",
                        help="run these tools of compute-sanitizer instead")
    args = parser.parse_args()
    only = {"soak"} if args.soak else set(filter(None, args.only.split(",")))
    load_s = (args.limit_s or 480) if args.soak else 0.0
    check = Check(load_s + 400 if args.soak else args.limit_s or 520, dict(os.environ))
    cpu = args.platform == "cpu"
    built = LIBRARY.with_name("libaqua_cpu.so").exists() if cpu else build(check)
    probe = check.run(
        "device", [sys.executable, "-c", PROBE], most_s=90, on_gpu=not cpu,
        read=lambda text: [{"device": found} for found in re.findall(r"^found: (.*)$", text, re.M)],
    )
    gpu = bool(probe.rows) and not cpu
    if not built:
        check.stages.append(Stage("everything else", "not run", note="the build failed"))
    elif args.sanitize and gpu:
        sanitize(check, args.sanitize.split(","))
    elif gpu or cpu:
        jobs = jobs_of(args.platform, load_s)
        chosen = [job for job in jobs if job.key in only or not (only or job.key == "soak")]
        check.run_all(chosen, args.gpus if gpu else 0)
    else:
        without_gpu(check)
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
