"""A lender in a process of its own, to be killed or stopped."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator

from tests.memory.lending import new_name

LENDER = """
import sys
from aqua_jax.memory.lender import Lender
with Lender(int(sys.argv[2]), sys.argv[1]) as lender:
    print("ready", flush=True)
    lender.serve()
"""


@contextlib.contextmanager
def lender_process(size: int) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A lender in a process of its own; yields its path and the process."""
    path = new_name()
    process = subprocess.Popen(
        [sys.executable, "-c", LENDER, path, str(size)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "ready\n"
        yield path, process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
