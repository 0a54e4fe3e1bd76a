"""Sharded arrays, in a process with four CPU devices."""

import os
import subprocess
import sys

from tests.packaging.test_architecture import ROOT


def test_sharded_arrays_come_back_shard_by_shard_and_under_other_shardings():
    done = subprocess.run(
        [sys.executable, "-m", "tests.memory.sharded"], capture_output=True, text=True, cwd=ROOT,
        timeout=120, env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) == 100
