"""The sources of the CUDA handlers, compiled as C++ and run on a CPU thread by thread."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests.ops import emulated_cuda
from tests.scale import scaled

# What the tests of moves have that this leaves out: processes of their own, which know no plugin.
MOVES = "not test_a_process_ends"
CASES = [
    ("ops/cuda_cases.py", "", 65), ("ops/test_moves.py", MOVES, 17),
    ("ops/test_spaces.py", "not user_of_its_spaces", 13),
]
# Memory of moves passes for the host's, the GPU's or a peer's: each is copied in a way of its own.
MIXED = {"AQUA_EMULATE_MEMORY": "mixed"}
if scaled(1) > 1:
    # The engine on these handlers, pages swapped out and in: same answers. A minute or two.
    CASES.append(("engine/test_paging.py", "test_swapping or test_two_tiers", 4))


@pytest.mark.parametrize(("path", "chosen", "least"), CASES)
def test_emulated(path, chosen, least):
    """In a process of its own: the handlers bear the names of the CPU's."""
    run(path, chosen, least, MIXED)


if scaled(1) > 1:

    # Less what measures how long something waits.
    @pytest.mark.parametrize(("path", "chosen", "least"), [
        CASES[0], ("ops/test_moves.py", f"{MOVES} and not test_retiring_waits", 16), CASES[2],
    ])
    def test_emulated_under_sanitizers(path, chosen, least):
        """No access outside an array or to one that is gone, none that isn't aligned."""
        run(path, chosen, least, {
            "AQUA_EMULATED_SANITIZE": "1", "LD_PRELOAD": emulated_cuda.preloads(),
            "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
            "AQUA_TEST_SCALE": "1", **MIXED,
        })


def run(path, chosen, least, environment):
    """Runs chosen tests on the emulated handlers, which they build; so many must pass at least."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "tests.ops.emulated_cuda",
         "-p", "no:cacheprovider", "-p", "no:xdist", "--durations=3", "-k", chosen,
         f"tests/{path}"],
        cwd=emulated_cuda.ROOT, capture_output=True, text=True, timeout=900,
        env={**{k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}, **environment},
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= least, done.stdout[-1000:]
