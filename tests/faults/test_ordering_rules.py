"""The rules of `ops.moves` as the engine keeps them, and what becomes of answers without each.

Copies are real, and held up so that they end long after the steps they ride on. With all rules
kept every answer is exact. With one of them taken away some answer must be wrong, or the process
die: else nothing would notice if the engine forgot it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

from tests.faults.ordering_rules import RULES
from tests.faults.processes import ROOT
from tests.scale import at_scale

ATTEMPTS = 24  # schedules in which a missing rule has to show; most do in the first
REMOVED = [rule for rule in RULES if rule != "none"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.faults.ordering_rules", *arguments], cwd=ROOT, text=True,
        capture_output=True, env={**os.environ, "AQUA_COPY_THREADS": "4"},
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def attempts(folder) -> dict[str, int]:
    """By rule, schedules run until one went wrong without it. All in one process, which ends an
    engine under copies as well, with all rules kept."""
    done = run(
        folder, f"none={at_scale(3, 40)}", *(f"{rule}={ATTEMPTS}" for rule in REMOVED), "end=none"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {line["rule"]: line["attempts"] for line in lines}


def test_with_all_rules_every_answer_is_exact(attempts):
    assert attempts["none"] == 0


@pytest.mark.parametrize("rule", REMOVED)
def test_without_it_something_goes_wrong(attempts, rule):
    assert 1 <= attempts[rule] <= ATTEMPTS


@pytest.mark.parametrize(
    "rule",
    [
        "segments are retired before their memory goes",
        "the pool is closed before its memory goes",
    ],
)
def test_memory_goes_after_the_copies_that_use_it(folder, rule):
    done = run(folder, f"end={rule}")
    assert done.returncode == -signal.SIGSEGV, done.stderr[-3000:]
