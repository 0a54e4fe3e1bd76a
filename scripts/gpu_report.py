"""What a GPU check found: against what is asked of an H100, as a table, as a file.

Every figure is of rows that this run's stages printed; what none printed is "not measured".
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterable

from gpu_stages import ROOT, Stage

MIB = 1 << 20
# What the stages import, by the name of the import.
PACKAGES = (
    "jax", "flax", "numpy", "ml_dtypes", "absl", "tokenizers", "orbax", "jinja2", "tqdm",
    "sortedcontainers", "pytest", "hypothesis", "torch", "transformers", "safetensors", "gguf",
    "grpc", "google.protobuf", "prometheus_client",
)
VERSIONS = (
    "jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda13-pjrt", "jax-cuda12-plugin", "flax", "numpy",
    "torch", "transformers", "pytest", "nvidia-cudnn-cu13", "nvidia-nccl-cu13",
)


@dataclasses.dataclass(frozen=True)
class Bar:
    """A figure that is asked for. `worst`: of what was measured; None: nothing was."""

    what: str
    asked: str
    worst: float | None
    met: bool | None


def missing_packages() -> list[str]:
    """Of what stages import."""

    def there(name: str) -> bool:
        try:
            return importlib.util.find_spec(name) is not None
        except ModuleNotFoundError:  # the package that it is in
            return False

    return [name for name in PACKAGES if not there(name)]


def _said(*command: str) -> str:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def versions() -> dict[str, str]:
    """Of what matters, where it is there."""
    found = {"python": sys.version.split()[0], "kernel": os.uname().release}
    for name in VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    nvcc = [line for line in _said("nvcc", "--version").splitlines() if "release" in line]
    gpu = _said("nvidia-smi", "--query-gpu=driver_version,memory.total", "--format=csv,noheader")
    found |= {
        name: text for name, text in (
            ("nvcc", nvcc[0].split("release ")[-1] if nvcc else ""),
            ("driver, memory", gpu.splitlines()[0] if gpu else ""),
            ("commit", _said("git", "rev-parse", "--short", "HEAD")),
        ) if text
    }
    return found


def _bar(what: str, asked: str, values: Iterable[float], most: float | None = None,
         least: float | None = None) -> Bar:
    found = list(values)
    if not found:
        return Bar(what, asked, None, None)
    if least is not None:
        worst = min(found)
        return Bar(what, asked, worst, worst >= least)
    assert most is not None
    worst = max(found)
    return Bar(what, asked, worst, worst <= most)


def bars(stages: Iterable[Stage]) -> list[Bar]:
    """What is asked of an H100, and what this run measured of it."""
    by_stage = {stage.name: stage.rows for stage in stages}
    rows = [row for found in by_stage.values() for row in found]
    ceilings = next((row for row in rows if {"to_host", "both"} <= set(row)), None)
    # Moves as they are, not those of the stages that force one way of copying.
    moves = [row for row in by_stage.get("moves", []) if row.get("page_bytes", 0) >= MIB]

    def rates(where: str, ways: tuple[str, ...]) -> list[dict]:
        return [row for row in moves if row["where"] == where and row["way"] in ways]

    of_ceiling: list[float] = []
    if ceilings is not None:
        limits = {"out": "to_host", "in": "from_host", "out+in": "both"}
        of_ceiling = [row["gb_s"] / ceilings[limits[row["way"]]]
                      for row in rates("host", tuple(limits))]
        # The device's counts bytes read and bytes written. Calling takes longer than copies there.
        of_ceiling += [2 * row.get("copying_gb_s", row["gb_s"]) / ceilings["device"]
                       for row in rates("arena on the same GPU", tuple(limits))]

    def figures(key: str, chosen: Callable[[dict], bool]) -> list[float]:
        return [row[key] for row in rows if key in row and chosen(row)]

    def named(what: str) -> Callable[[dict], bool]:
        return lambda row: row.get("what") == what

    def beside(where: str) -> list[dict]:
        return [row for row in rows
                if named("decode beside paging")(row) and row["where"].startswith(where)]

    half = [row for row in rows if str(row.get("what", "")).startswith("burst, pool for 1/2")
            and str(row.get("policy", "")).startswith("fair")]
    return [
        _bar("page moves of 1 MiB and up, of the copy ceiling", ">= 0.9", of_ceiling, least=0.9),
        _bar("pinned host, one way, GB/s", ">= 45",
             [row["gb_s"] for row in rates("host", ("out", "in"))], least=45),
        _bar("pinned host, both ways, GB/s", ">= 75",
             [row["gb_s"] for row in rates("host", ("out+in",))], least=75),
        _bar("decode attention, batch 64, context 2048, of reading", ">= 0.85",
             figures("of_reading", lambda r: (r["batch"], r["context"]) == (64, 2048)), least=0.85),
        _bar("decode step, 8B, batch 1 and 64, of the roofline", ">= 0.75",
             [row["of_roofline"] for row in by_stage.get("8B-shaped model: steps, prompt, overlap",
                                                         []) if "of_roofline" in row], least=0.75),
        _bar("prompt of 2048 tokens, of the bf16 product's rate", ">= 0.5",
             figures("of_product", named("prefill")), least=0.5),
        _bar("decode slowed by paging to the host", "<= 0.05",
             [row["slowdown"] for row in beside("host")], most=0.05),
        _bar("decode slowed by paging to an arena, less paged bytes / read rate", "<= 0.05",
             [row["slowdown"] - row["of_read_rate"] for row in beside("arena")], most=0.05),
        _bar("burst with half the pool, TTFT p99 against fcfs, times better", ">= 5",
             [row["ttft_p99_better"] for row in half], least=5),
        _bar("burst with half the pool, tokens/s of fcfs", ">= 0.95",
             [row["tok_s_of_fcfs"] for row in half], least=0.95),
    ]


def table(stages: Iterable[Stage], on_gpu: bool) -> str:
    """A line a stage; with a GPU what was asked and what was measured."""
    lines = [
        f"{stage.name:52} {stage.status:8} {stage.seconds:7.1f} s  {stage.note}".rstrip()
        for stage in stages
    ]
    if on_gpu:
        lines += ["", f"{'asked of an H100':72} {'asked':8} {'worst':>8}"]
        for bar in bars(stages):
            worst = "not measured" if bar.worst is None else f"{bar.worst:8.3g}"
            met = {None: "", True: "  met", False: "  MISSED"}[bar.met]
            lines.append(f"{bar.what:72} {bar.asked:8} {worst}{met}")
    return "\n".join(lines)


def write(path: str, header: dict, stages: list[Stage], complete: bool, on_gpu: bool) -> None:
    """The file, at once in its new state."""
    report = {
        **header, "complete": complete, "stages": [dataclasses.asdict(stage) for stage in stages],
        "bars": [dataclasses.asdict(bar) for bar in bars(stages)] if on_gpu else [],
    }
    target = pathlib.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(target.name + ".new")
    fresh.write_text(json.dumps(report, indent=1, default=str) + "\n")
    fresh.replace(target)
