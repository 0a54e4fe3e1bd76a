"""scripts/reclaim_latency.py on a tiny model: memory comes back, even from a stopped engine."""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys

from tests.tiny import write_config

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_an_engine_gives_back_what_is_asked_and_a_stopped_one_is_killed_in_time(tmp_path):
    done = subprocess.run(
        [
            sys.executable, "scripts/reclaim_latency.py", f"--model={write_config(tmp_path / 'm')}",
            "--reclaims=4", "--lend_mib=4", "--host_mib=8", "--requests=24", "--output=100",
            "--prompt=20", "--pause=0.1", "--verbose",
        ],
        cwd=ROOT, text=True, capture_output=True, timeout=120,
    )
    assert done.returncode == 0, done.stderr
    text = done.stdout
    (beyond,) = re.findall(r"beyond what was asked: at most (-?\d+)", text)
    assert int(beyond) <= 1, text
    assert "moves failed: {}" in text and re.search(r"meanwhile [1-9]\d* tokens", text), text
    # Not before it has been silent for a while; at the latest after term and drain limit, 4 s, and
    # what a busy machine needs to notice.
    (took,) = re.findall(r"stopped engine: ([\d.]+) s", text)
    assert 1.0 < float(took) < 8.0 and text.rstrip().endswith("exit status -9"), text
