"""`scripts/gpu_check.py` from start to end, as far as a CPU goes."""

from __future__ import annotations

import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def script():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "scripts" / "gpu_check.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module  # for its dataclasses
    spec.loader.exec_module(module)
    return module


def test_stages_fit_into_nine_minutes(script):
    """However long each takes: budgets are shares of what is left."""
    for platform in ("cuda", "cpu"):
        jobs = script.jobs_of(platform, 0.0)
        assert len({job.name for job in jobs}) == len(jobs)
        files = [part for job in jobs for part in job.command if part.endswith(".py")]
        assert all((ROOT / part).is_file() for part in files), files
    spent, jobs = 0.0, [job for job in script.jobs_of("cuda", 0.0) if job.key != "soak"]
    for index, job in enumerate(jobs):
        left = 520 - spent
        spent += min(job.most_s, left * job.most_s / sum(one.most_s for one in jobs[index:]))
    assert spent <= 520.001


def test_a_stage_that_fails_or_hangs_does_not_end_the_others(script, tmp_path):
    check = script.Check(60, {})
    run = [sys.executable, "-c"]
    jobs = [
        script.Job("a", "fails", (*run, "print('{\"x\": 1}'); raise SystemExit(3)"), 20,
                   script.json_rows, gpus=0),
        script.Job("b", "hangs", (*run, "print('{\"x\": 2}', flush=True); import time; "
                                  "time.sleep(60)"), 5, script.json_rows, gpus=0),
        script.Job("c", "lacks", (*run, "import nothing_like_that"), 20, gpus=0),
        script.Job("d", "works", (*run, "print('{\"x\": 3}')"), 20, script.json_rows, gpus=0),
        script.Job("e", "needs", (*run, "1"), 20, gpus=1),
    ]
    check.run_all(jobs, 0)
    found = {stage.name: (stage.status, stage.rows) for stage in check.stages}
    assert found == {
        "needs": ("not run", []), "fails": ("failed", [{"x": 1}]), "hangs": ("failed", [{"x": 2}]),
        "lacks": ("not run", []), "works": ("ok", [{"x": 3}]),
    }
    assert "works" in script.table(check.stages) and "x=3" in script.table(check.stages)


def test_it_runs(tmp_path):
    """One stage with an engine: steps, a prompt, paging beside them."""
    out = tmp_path / "out.json"
    done = subprocess.run(
        [sys.executable, "scripts/gpu_check.py", "--platform=cpu", "--only=steps",
         f"--out={out}", "--limit_s=200"],
        cwd=ROOT, capture_output=True, text=True, timeout=240,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "no GPU: nothing measured" in done.stdout
    report = json.loads(out.read_text())
    assert report["device"] is None and "jax" in report["versions"]
    rows = [row for stage in report["stages"] for row in stage["rows"]]
    what = [row.get("what") for row in rows]
    assert what.count("decode step") == 2 and "prefill" in what
    beside = next(row for row in rows if row["what"] == "decode beside paging")
    assert beside["paged_gb_s"] > 0 and beside["step_ms"] > 0
