"""`scripts/gpu_check.py` from start to end, as far as a CPU goes."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pathlib
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def script():
    """The script as a module, with those that it is made of as `stages` and `report`."""
    sys.path.insert(0, str(ROOT / "scripts"))  # as for a script that is run
    try:
        module = importlib.import_module("gpu_check")
        module.stages = importlib.import_module("gpu_stages")
        module.report = importlib.import_module("gpu_report")
    finally:
        sys.path.remove(str(ROOT / "scripts"))
    return module


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def test_every_stage_is_there(script):
    for platform in ("cuda", "cpu"):
        jobs = script.jobs_of(platform, 0.0)
        assert len({job.name for job in jobs}) == len(jobs)
        files = [part for job in jobs for part in job.command if part.endswith(".py")]
        assert all((ROOT / part).is_file() for part in files), files
    # What shares the GPU must leave room for each other, XLA taking its share at the start.
    shares = [dict(job.environment).get("XLA_CLIENT_MEM_FRACTION", "0.25")
              for job in script.jobs_of("cuda", 0.0) if job.beside]
    assert sum(sorted(map(float, shares))[-script.BESIDE:]) < 0.9


def test_stages_fit_into_nine_minutes(script, monkeypatch):
    """However long each takes: budgets are shares of what is left."""
    clock, spent = [0.0], {}
    monkeypatch.setattr(script.stages.time, "monotonic", lambda: clock[0])
    check = script.Check(520, {})

    def run(name, command, *, most_s, **others):
        spent[name] = most_s
        clock[0] += most_s  # one after the other, and each to the end

    monkeypatch.setattr(check, "run", run)
    jobs = [job for job in script.jobs_of("cuda", 0.0) if job.key != "soak"]
    check.run_all(jobs, 2)
    assert set(spent) == {job.name for job in jobs}
    assert clock[0] <= 520.001 and min(spent.values()) > 5


def test_a_stage_that_fails_or_hangs_does_not_end_the_others(script, tmp_path):
    """Nor does what it has started live on, or what it has printed get lost."""
    left = tmp_path / "left"
    child = f"import time; time.sleep(20); open({str(left)!r}, 'w')"
    check = script.Check(60, dict(os.environ))
    run = [
        ("fails", "print('{\"x\": 1}'); raise SystemExit(3)", 20),
        ("hangs", "import subprocess, sys, time; print('{\"x\": 2}'); print('{\"x\"', end='', "
         f"flush=True); subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)", 5),
        ("lacks", "import nothing_like_that", 20),
        ("works", "print('{\"x\": 3}')", 20),
    ]
    jobs = [script.Job(name, name, python(code), most, script.json_rows, gpus=0)
            for name, code, most in run]
    jobs += [
        script.Job("needs", "needs", python("1"), 20, gpus=1),
        script.Job("nobody", "nobody", ("/no/such/program",), 20, gpus=0),
    ]
    started = time.monotonic()
    check.run_all(jobs, 0)
    assert time.monotonic() - started < 20
    found = {stage.name: (stage.status, stage.rows) for stage in check.stages}
    assert found == {
        "needs": ("not run", []), "fails": ("failed", [{"x": 1}]), "hangs": ("failed", [{"x": 2}]),
        "lacks": ("not run", []), "works": ("ok", [{"x": 3}]), "nobody": ("not run", []),
    }
    notes = {stage.name: stage.note for stage in check.stages}
    assert notes["lacks"] == "No module named 'nothing_like_that'"
    assert notes["fails"] == "exit status 3" and "not done after" in notes["hangs"]
    pattern = f"{child[:40]}".encode()
    commands = []
    for process in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            commands.append(process.read_bytes())
    assert not any(pattern in command and str(left).encode() in command for command in commands)


def test_a_hanging_stage_says_where_it_was(script, capsys):
    check = script.Check(60, dict(os.environ))
    check.run("stuck", list(python("def inside():\n  import time; time.sleep(60)\ninside()")),
              most_s=4.5)
    assert "in inside" in capsys.readouterr().out


def test_stages_that_measure_nothing_run_beside_each_other(script):
    code = "import time; time.sleep(1.5); print('{\"x\": 1}')"
    jobs = [script.Job(name, name, python(code), 20, script.json_rows, gpus=0, beside=True)
            for name in "abcd"]
    check, started = script.Check(60, dict(os.environ)), time.monotonic()
    check.run_all(jobs, 0, beside=4)
    assert time.monotonic() - started < 4 * 1.5
    assert sorted(stage.name for stage in check.stages if stage.rows) == list("abcd")


@pytest.mark.parametrize(("said", "why"), [
    ("E   ModuleNotFoundError: No module named 'torch'\n1 error in 2 s", "No module named 'torch'"),
    ("E   ModuleNotFoundError: No module named 'torch'\n1 failed, 3 passed in 2 s", ""),
    ("\nno tests ran in 0.01s\n", "no test can be run here (is torch missing?)"),
    ("1 failed in 2 s", ""),
])
def test_what_is_missing_is_told_from_what_fails(script, said, why):
    assert script.stages.why_not_run(script.stages.Ended(1, said, "")) == why


ROWS = {
    "ceilings": [{"device": 3000.0, "to_host": 50.0, "from_host": 52.0, "both": 90.0}],
    "moves": [
        {"where": where, "page_bytes": page, "way": way, "gb_s": rate}
        for where, page, way, rate in (
            ("host", 64 << 10, "out", 1.0), ("host", 1 << 20, "out", 46.0),
            ("host", 1 << 20, "in", 48.0), ("host", 1 << 20, "out+in", 72.0),
            ("arena on the same GPU", 1 << 20, "out", 1400.0),
            ("host", 1 << 20, "out with checksum", 2.0),
        )
    ],
    "moves, kernels only": [
        {"where": "host", "page_bytes": 1 << 20, "way": "out", "gb_s": 1.0}
    ],
    "8B-shaped model: steps, prompt, overlap": [
        {"what": "decode step", "batch": 1, "of_roofline": 0.8},
        {"what": "prefill", "of_product": 0.4},
        {"what": "decode beside paging", "where": "arena on the same GPU", "slowdown": 0.2,
         "of_read_rate": 0.16},
    ],
}


def test_what_is_asked_is_compared_with_what_was_measured(script):
    """By hand: the worst of what counts, and nothing where nothing was measured."""
    stages = [script.Stage(name, "ok", rows=rows) for name, rows in ROWS.items()]
    found = {bar.what: (bar.worst, bar.met) for bar in script.report.bars(stages)}
    assert len(found) == 10
    assert found["page moves of 1 MiB and up, of the copy ceiling"] == (0.8, False)
    assert found["pinned host, one way, GB/s"] == (46.0, True)
    assert found["pinned host, both ways, GB/s"] == (72.0, False)
    assert found["decode step, 8B, batch 1 and 64, of the roofline"] == (0.8, True)
    assert found["prompt of 2048 tokens, of the bf16 product's rate"] == (0.4, False)
    worst, met = found["decode slowed by paging to an arena, less paged bytes / read rate"]
    assert abs(worst - 0.04) < 1e-9 and met is True
    unmeasured = [what for what, (worst, met) in found.items() if worst is None and met is None]
    assert len(unmeasured) == 4
    shown = script.report.table(stages, True)
    assert shown.count("not measured") == 4 and shown.count("MISSED") == 3
    assert "asked" not in script.report.table(stages, False)


def test_rows_of_a_kind_stand_below_each_other(script):
    lines = script.stages.row_lines([
        {"what": "a", "gb_s": 1.25}, {"what": "longer", "gb_s": 1000.0}, {"x": 1},
    ])
    assert lines == ["what    gb_s", "a       1.25", "longer  1e+03", "x=1"]


def test_it_runs(tmp_path):
    """One stage with an engine: steps, a prompt, paging beside them; written as it goes."""
    out = tmp_path / "folder" / "out.json"
    done = subprocess.run(
        [sys.executable, "scripts/gpu_check.py", "--platform=cpu", "--only=steps",
         f"--out={out}", "--limit_s=200"],
        cwd=ROOT, capture_output=True, text=True, timeout=240,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "no GPU: nothing measured" in done.stdout
    report = json.loads(out.read_text())
    assert report["device"] is None and "jax" in report["versions"]
    assert report["complete"] is True and report["bars"] == []
    rows = [row for stage in report["stages"] for row in stage["rows"]]
    what = [row.get("what") for row in rows]
    assert what.count("decode step") == 2 and "prefill" in what
    beside = next(row for row in rows if row["what"] == "decode beside paging")
    assert beside["paged_gb_s"] > 0 and beside["step_ms"] > 0


def test_unknown_stages_are_refused():
    done = subprocess.run(
        [sys.executable, "scripts/gpu_check.py", "--platform=cpu", "--only=parity,nothing"],
        cwd=ROOT, capture_output=True, text=True,
    )
    assert done.returncode == 2 and "got nothing; allowed: parity, engine" in done.stderr


def test_the_file_has_what_there_is_after_each_stage(script, tmp_path):
    """Whoever ends the whole check loses no stage that had ended."""
    out = tmp_path / "out.json"
    stages, seen = [], []
    for name in ("one", "two"):
        stages.append(script.Stage(name, "ok"))
        script.report.write(str(out), {"device": None}, stages, False, False)
        report = json.loads(out.read_text())
        seen.append((report["complete"], [stage["name"] for stage in report["stages"]]))
    assert seen == [(False, ["one"]), (False, ["one", "two"])]
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]
