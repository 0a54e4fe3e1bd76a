"""Stages of a check: each a command with a limit, whose end is the end of all that it started.

What a stage printed before its end counts, however it ended.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import json
import os
import pathlib
import re
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable

ROOT = pathlib.Path(__file__).resolve().parents[1]
SHOWN = 6000  # characters of the output of a stage that failed
# Seconds for a process that was told to say where it is, and for one that was killed to be gone: a
# driver may hold it.
_TELL_S, _GONE_S = 3, 15
_LEAST_S = 4  # less isn't worth a start


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
      beside: whether it measures nothing, and may run beside others that don't.
    """

    key: str
    name: str
    command: tuple[str, ...]
    most_s: float
    read: Callable[[str], list[dict]] | None = None
    environment: tuple[tuple[str, str], ...] = ()
    gpus: int = 1
    beside: bool = False


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a command ended. `code`: 124 where it was stopped."""

    code: int
    out: str
    err: str
    note: str = ""


def run_limited(command: list[str], environment: dict[str, str], limit_s: float) -> Ended:
    """Runs a command for so long at most, and ends all that it has started when it ends.

    Python is asked where it was before it is killed; the answer is in `err`.

    Raises:
      FileNotFoundError: there is no such program.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(
            command, cwd=ROOT, env={**environment, "PYTHONFAULTHANDLER": "1"}, stdout=out,
            stderr=err, stdin=subprocess.DEVNULL, start_new_session=True,
        )
        code, note = 124, ""
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            note = f"not done after {limit_s:.0f} s"
            process.send_signal(signal.SIGABRT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_TELL_S)
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            try:
                process.wait(_GONE_S)
            except subprocess.TimeoutExpired:
                note = f"{note}; killed, and not gone"
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    return Ended(code, *texts, note)


def why_not_run(ended: Ended) -> str:
    """What is missing, if that is why a stage has no result; empty if it failed at something."""
    text = ended.out + ended.err
    missing = re.search(r"^(?:E +)?ModuleNotFoundError: (.*)$", text, re.M)
    if missing and not re.search(r"\b[1-9]\d* (passed|failed)\b", text):
        return missing[1]
    if re.search(r"\bno tests (ran|collected)\b", text) and not re.search(r"\berrors?\b", text):
        return "no test can be run here (is torch missing?)"
    return ""


class Check:
    """The stages of one run, under one deadline. Stages may be added from several threads."""

    def __init__(
        self, limit_s: float, environment: dict[str, str],
        added: Callable[[Stage], None] = lambda stage: None,
    ):
        """
        Args:
          limit_s: for all of them.
          environment: of every stage.
          added: called with each stage when it has ended.
        """
        self.stages: list[Stage] = []
        self._end, self._environment, self._added = time.monotonic() + limit_s, environment, added
        self._lock = threading.Lock()

    @property
    def left_s(self) -> float:
        """Seconds until the deadline."""
        return self._end - time.monotonic()

    def run_all(self, jobs: list[Job], gpus: int, beside: int = 1) -> None:
        """Runs each job that so many GPUs allow, within its share of what time is left.

        Jobs that run beside each other may have half of it, if they need it.

        Args:
          jobs: in order.
          gpus: there are.
          beside: how many of those that may run beside each other do, at most.
        """
        todo = [job for job in jobs if self._possible(job, gpus)]
        while todo:
            group = [todo[0]]
            while beside > 1 and group[0].beside and len(group) < len(todo) and (
                todo[len(group)].beside
            ):
                group.append(todo[len(group)])
            todo = todo[len(group):]
            # Together they take as long as the longest, or as all of them in so many rows.
            wanted = max(max(job.most_s for job in group), sum(j.most_s for j in group) / beside)
            share = self.left_s * wanted / (wanted + sum(job.most_s for job in todo))
            if len(group) > 1:  # what must be right, before what is measured
                share = max(share, self.left_s / 2)
            end = time.monotonic() + min(wanted, share)
            with concurrent.futures.ThreadPoolExecutor(min(beside, len(group))) as pool:
                for done in [pool.submit(self._run_job, job, end, gpus) for job in group]:
                    done.result()

    def _run_job(self, job: Job, end: float, gpus: int) -> None:
        self.run(
            job.name, list(job.command), most_s=min(job.most_s, end - time.monotonic()),
            on_gpu=gpus > 0, environment=dict(job.environment), read=job.read,
        )

    def _possible(self, job: Job, gpus: int) -> bool:
        if job.gpus <= gpus:
            return True
        if job.gpus == 1 or gpus == 0:
            self.add(Stage(job.name, "not run", note=f"needs {job.gpus} GPU"))
        return False

    def run(
        self, name: str, command: list[str], *, most_s: float, on_gpu: bool = True,
        environment: dict[str, str] | None = None,
        read: Callable[[str], list[dict]] | None = None,
    ) -> Stage:
        """Runs a command for at most `most_s` seconds; `read` makes rows of what it printed."""
        left = min(most_s, self.left_s)
        if left < _LEAST_S:
            return self.add(Stage(name, "not run", note="out of time"))
        variables = {**self._environment, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        variables |= {"JAX_PLATFORMS": "cuda,cpu" if on_gpu else "cpu"}
        variables |= {"TRANSFORMERS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", **(environment or {})}
        started = time.monotonic()
        try:
            ended = run_limited(command, variables, left)
        except (FileNotFoundError, PermissionError) as error:
            return self.add(Stage(name, "not run", note=str(error)))
        stage = Stage(name, "ok", time.monotonic() - started)
        said = ""
        if ended.code:
            stage.note = why_not_run(ended)
            stage.status = "not run" if stage.note else "failed"
            stage.note = stage.note or ended.note or f"exit status {ended.code}"
            said = (ended.out + ended.err)[-SHOWN:] if stage.status == "failed" else ""
        if read is not None:
            stage.rows = read(ended.out)
        return self.add(stage, said)

    def add(self, stage: Stage, said: str = "") -> Stage:
        """Takes a stage in, and prints it, with what it said if that is of interest."""
        with self._lock:
            self.stages.append(stage)
            if said:
                print(said, flush=True)
            print(f"== {stage.name}: {stage.status}, {stage.seconds:.1f} s {stage.note}".rstrip(),
                  flush=True)
            for line in row_lines(stage.rows):
                print(f"   {line}", flush=True)
            self._added(stage)
        return stage


def json_rows(output: str) -> list[dict]:
    """The JSON objects among the lines of an output; the last line may be torn off."""
    rows = []
    for line in output.splitlines():
        with contextlib.suppress(ValueError):
            row = json.loads(line) if line.startswith("{") else None
            if isinstance(row, dict):
                rows.append(row)
    return rows


def test_counts(output: str) -> list[dict]:
    """How many tests passed and failed, from pytest's last line."""
    found = {what: int(n) for n, what in re.findall(r"(\d+) (passed|failed|error)", output)}
    return [found] if found else []


def _shown(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def row_lines(rows: list[dict]) -> list[str]:
    """Rows for people: those with the same names one below the other, under their names."""
    lines: list[str] = []
    while rows:
        names = list(rows[0])
        alike = next((n for n, row in enumerate(rows) if list(row) != names), len(rows))
        cells = [[_shown(row[name]) for name in names] for row in rows[:alike]]
        rows = rows[alike:]
        if len(cells) == 1 or len(names) > 12:
            lines += ["  ".join(f"{n}={c}" for n, c in zip(names, row, strict=True))
                      for row in cells]
            continue
        widths = [max(map(len, column)) for column in zip(names, *cells, strict=True)]
        lines += [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in (names, *cells)
        ]
    return lines
