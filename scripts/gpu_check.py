"""Proves the CUDA path on the GPU there is, and measures it: one command, offline, 9 minutes.

    python scripts/gpu_check.py [--out=gpu_check.json] [--only=parity,moves] [--limit_s=520]
    python scripts/gpu_check.py --gpus=2        peer copies and tensor parallelism as well
    python scripts/gpu_check.py --soak          8 minutes of engines under load: no leak of memory
    python scripts/gpu_check.py --sanitize[=memcheck,racecheck,synccheck,initcheck]
                                                compute-sanitizer on the kernels' tests instead
    python scripts/gpu_check.py --platform=cpu  every stage at tiny sizes on this machine: a test of
                                                this script, where nothing is measured

Builds `libaqua_cuda.so` in the checkout if it isn't newer than its sources (nvcc, cmake, jaxlib's
headers; no network), then runs each stage in processes of its own, with a budget: its share of the
time that is left, at most its own limit. Stages that only prove something run beside each other,
those that measure alone. A stage that fails, hangs or finds a wrong byte is printed with its output
and makes the exit status 1; the others go on. One that can't be run (a package is missing, the time
is over) says so and counts as not run. The file is written anew after every stage. Nothing is
printed that wasn't measured in this run. On a machine without a GPU what needs none is run, and the
last line says so.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import os
import resource
import shutil
import sys

import gpu_report
from gpu_stages import ROOT, Check, Job, Stage, json_rows, test_counts

LIBRARY = ROOT / "aqua_jax" / "_lib" / "libaqua_cuda.so"
PROBE = """
import json, jax
try:
    device = jax.devices("gpu")[0]
except RuntimeError as error:
    print("none:", str(error).splitlines()[0])
else:
    print(json.dumps({"device": device.device_kind, "gpus": len(jax.devices("gpu")),
                      **{k: v for k, v in (device.memory_stats() or {}).items()
                         if k in ("bytes_limit", "bytes_in_use", "pool_bytes")}}))
"""
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
# What of tests/ops/test_moves.py is about CPUs: processes that end, XLA's own scratch memory.
MOVES = "not test_a_process_ends and not test_in_place"
# Every architecture, and what is special about some; more take longer to compile than to run.
FAMILIES = ("llama-1]", "llama3-1]", "llama_yarn-1]", "llama_mqa-1]", "llama_biases-1]",
            "smollm2-1]", "mistral_window-1]", "ministral_mixed-1]", "qwen2-1]", "qwen3-1]")
TWO_DEVICES = "matches_transformers and -2]"
SANITIZERS = "memcheck,racecheck,synccheck,initcheck"
SANITIZED = "definition or merged or long_prompt or nonsense or copies or absent"
SANITIZER = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
# Stages that measure nothing run so many at a time on a GPU, given cores for each.
BESIDE, CORES_EACH = 4, 4


def build(check: Check) -> bool:
    """Builds the library if it is missing or older than a source."""
    sources = [p for p in (ROOT / "ffi").rglob("*") if p.is_file()] + [ROOT / "CMakeLists.txt"]
    newest = max(p.stat().st_mtime for p in sources)
    cpu = LIBRARY.with_name("libaqua_cpu.so")
    if all(p.exists() and p.stat().st_mtime > newest for p in (LIBRARY, cpu)):
        print("== build: the libraries are newer than their sources", flush=True)
        return True
    if shutil.which("cmake") is None:
        check.add(Stage("build", "failed", note="there is no cmake"))
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
    # Several processes on one GPU, or torch beside jax: jax must not take most of it.
    part = (("XLA_CLIENT_MEM_FRACTION", "0.1"),)
    third = (("XLA_CLIENT_MEM_FRACTION", "0.3"),)
    # f32 products as the other side makes them, not through TF32.
    exact = (("JAX_DEFAULT_MATMUL_PRECISION", "highest"),)
    measure = (sys.executable, "scripts/gpu_measure.py")
    bursts = (sys.executable, "scripts/gpu_bursts.py")
    engine = (sys.executable, "scripts/gpu_engine.py")
    arenas = (sys.executable, "scripts/gpu_arenas.py")
    where = (f"--platform={platform}",)

    def timed(command: tuple[str, ...], what: str, most_s: float) -> tuple[str, ...]:
        return (*command, what, *where, f"--limit_s={0.7 * most_s:.0f}")

    # Two of jax's devices where there is only a CPU.
    two = (("XLA_FLAGS", "--xla_force_host_platform_device_count=2"),) if platform == "cpu" else ()
    no_graphs = (("XLA_FLAGS", "--xla_gpu_enable_command_buffer="),)
    cpu = platform == "cpu"
    on = 0 if cpu else 1
    families = f"matches_transformers and ({' or '.join(FAMILIES)})"
    against = "tests/parity/test_engine.py"
    proofs = [
        Job("parity", "parity of ops", (*PYTEST, "tests/ops/cuda_cases.py"), 120, test_counts,
            part),
        Job("engine", "engine against transformers", (*PYTEST, "-k", families, against), 120,
            test_counts, (*exact, *part), gpus=on),
        Job("engine", "engine, deterministic mode",
            (*PYTEST, "-k", "auto", "tests/engine/test_deterministic.py"), 120, test_counts, part,
            gpus=on),
        Job("engine", "engine, pages swapped out and in",
            (*PYTEST, "-k", "test_swapping or test_two_tiers", "tests/engine/test_paging.py"), 120,
            test_counts, (*exact, *part), gpus=on),
        Job("queue", "copy queue", (*PYTEST, "-k", MOVES, "tests/ops/test_moves.py"), 60,
            test_counts, part, gpus=on),
        Job("arenas", "arenas across processes, lender killed", arenas, 40, json_rows, part),
        Job("arenas", "the same by older IPC, nobody killed", arenas, 40, json_rows,
            (*part, ("AQUA_LEGACY_IPC", "1"))),
        Job("killed", "lenders killed in mid-burst", timed(bursts, "killed", 100), 100, json_rows,
            gpus=on),
        Job("lent", "memory lent through a coordinator", timed(bursts, "lent", 80), 80, json_rows,
            gpus=on),
    ]
    measured = [
        Job("ceilings", "ceilings", (*measure, "ceilings"), 30, json_rows),
        Job("moves", "moves", (*measure, "moves"), 40, json_rows),
        Job("decode", "decode attention", (*measure, "decode"), 40, json_rows),
        Job("prefill", "prompt attention", (*measure, "prefill"), 30, json_rows),
        Job("steps", "8B-shaped model: steps, prompt, overlap", timed(engine, "steps", 130), 130,
            json_rows, gpus=on),
        Job("bursts", "bursts, pool cut", timed(bursts, "bursts", 130), 130, json_rows, gpus=on),
        Job("startup", "start-up", timed(engine, "startup", 60), 60, json_rows, gpus=on),
        Job("transformers", "transformers on the same work", timed(bursts, "transformers", 70), 70,
            json_rows, third, gpus=on),
        Job("moves", "moves, copy engines only", (*measure, "moves"), 20, json_rows,
            (("AQUA_COPY_ENGINE_BYTES", "0"),)),
        Job("moves", "moves, kernels only", (*measure, "moves"), 20, json_rows,
            (("AQUA_COPY_ENGINE_BYTES", str(1 << 40)),)),
        Job("graphs", "decode steps without command buffers", timed(engine, "decode", 60), 60,
            json_rows, no_graphs),
        Job("peer", "peer copies", (*measure, "peer"), 60, json_rows, gpus=2),
        Job("tensor", "two devices against transformers", (*PYTEST, "-k", TWO_DEVICES, against),
            90, test_counts, exact, gpus=0 if cpu else 2),
        Job("tensor", "tensor parallelism with paging, a lender a shard, one killed",
            timed(bursts, "tensor", 110), 110, json_rows, (*two, *exact), gpus=0 if cpu else 2),
        Job("soak", "soak", (*bursts, "soak", *where, f"--limit_s={limit_s:.0f}"), limit_s + 120,
            json_rows, gpus=on),
    ]
    return [dataclasses.replace(job, beside=True) for job in proofs] + measured


def sanitize(check: Check, tools: list[str]) -> None:
    """Our kernels (by name) under each of compute-sanitizer's tools."""
    for left, tool in zip(range(len(tools), 0, -1), tools, strict=True):
        check.run(
            f"compute-sanitizer {tool}",
            [SANITIZER, "--tool", tool, "--error-exitcode", "9",
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
    jobs, cpu = jobs_of(args.platform, load_s), args.platform == "cpu"
    if unknown := only - {job.key for job in jobs}:
        known = ", ".join(dict.fromkeys(job.key for job in jobs))
        parser.error(f"--only: got {', '.join(sorted(unknown))}; allowed: {known}")
    # A process that is told to say where it is says so by aborting.
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    header = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": None, "versions": gpu_report.versions(),
        "missing packages": gpu_report.missing_packages(),
    }
    print(*(f"{name}: {text}" for name, text in header["versions"].items()), sep="; ")
    if header["missing packages"]:
        print("missing packages:", *header["missing packages"])

    def write(complete: bool = False) -> None:
        on_gpu = header["device"] is not None
        gpu_report.write(args.out, header, check.stages, complete, on_gpu)

    limit_s = load_s + 400 if args.soak else args.limit_s or 520
    check = Check(limit_s, dict(os.environ), lambda stage: write())
    built = LIBRARY.with_name("libaqua_cpu.so").exists() if cpu else build(check)
    probe = check.run(
        "device", [sys.executable, "-c", PROBE], most_s=90, on_gpu=not cpu, read=json_rows
    )
    gpu = bool(probe.rows) and not cpu
    if gpu:
        header["device"] = probe.rows[0]["device"]
    if not built:
        check.add(Stage("everything else", "not run", note="the build failed"))
    elif args.sanitize and gpu:
        sanitize(check, args.sanitize.split(","))
    elif gpu or cpu:
        chosen = [job for job in jobs if job.key in only or not (only or job.key == "soak")]
        there = min(args.gpus, probe.rows[0]["gpus"]) if gpu else 0
        if there < args.gpus and gpu:
            check.add(Stage("two GPUs", "not run", note=f"there is {there}"))
        beside = max(1, min(BESIDE, (os.cpu_count() or 1) // CORES_EACH)) if gpu else 1
        check.run_all(chosen, there, beside)
    else:
        without_gpu(check)
    write(complete=True)
    print("\n" + gpu_report.table(check.stages, gpu))
    failed = [stage.name for stage in check.stages if stage.status == "failed"]
    print(f"failed: {', '.join(failed) or 'nothing'}; written to {args.out}")
    if not gpu:
        print("no GPU: nothing measured")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
