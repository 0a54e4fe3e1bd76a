"""What this process has open: descriptors, mappings of shared memory, threads of ours."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator


def _now() -> Counter[str]:
    found: Counter[str] = Counter()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            # Without the numbers of anonymous inodes, which differ each time.
            found[f"fd {os.readlink(f'/proc/self/fd/{fd}').split(':')[0]}"] += 1
    with open("/proc/self/maps", encoding="utf-8") as file:
        for line in file:
            if "/memfd:" in line:
                found[f"map {line.split()[-2]}"] += 1
    for thread in threading.enumerate():
        found[f"thread {thread.name}"] += 1
    return found


@contextlib.contextmanager
def leftovers() -> Iterator[Callable[[], list[str]]]:
    """Yields a function that says, after the block, what is there that wasn't before."""
    gc.collect()
    before = _now()

    def compare() -> list[str]:
        gc.collect()
        return sorted((_now() - before).elements())

    yield compare
