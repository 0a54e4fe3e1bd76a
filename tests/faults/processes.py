"""Real lenders and borrowers as processes, for tests that kill them."""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

from tests.memory.lending import wait_for

ROOT = pathlib.Path(__file__).resolve().parents[2]

# A borrower that does what it is told, a line at a time, and answers each line with one.
BORROWER = """
import sys, time
from aqua_jax.memory.borrower import Borrower
borrower = Borrower(sys.argv[1], name=sys.argv[2])
leases = []
for line in sys.stdin:
    word, *numbers = line.split()
    numbers = [int(number) for number in numbers]
    answer = "ok"
    if word == "borrow":
        lease = borrower.borrow(numbers[0])
        leases += [lease] if lease else []
        clean = lease is not None and lease.read(0, lease.size) == bytes(lease.size)
        answer = "none" if lease is None else "clean" if clean else "dirty"
    elif word == "write":
        for lease in leases:
            lease.write(0, bytes([numbers[0]]) * lease.held.total)
    elif word == "same":
        whole = [lease.read(0, lease.held.total) for lease in leases]
        answer = str(all(data == bytes([numbers[0]]) * len(data) for data in whole))
    elif word == "alive":
        answer = str(all(lease.alive for lease in leases))
    elif word == "wanted":
        answer = str(sum(lease.wanted_back for lease in leases))
    elif word == "obey":
        while not any(lease.wanted_back for lease in leases):
            time.sleep(0.001)
        for lease in leases:
            held = lease.held.total
            if lease.wanted_back:
                lease.give_back(held - lease.wanted_back, lease.wanted_back)
    elif word == "close":
        leases.pop().close()
    elif word == "forever":
        print("ok", flush=True)
        while True:
            for lease in leases:
                lease.write(0, bytes([numbers[0]]) * lease.held.total)
    print(answer, flush=True)
borrower.close()
"""


class Process:
    """A child with lines in, lines out and lines of status."""

    def __init__(self, *command: str) -> None:
        self.child = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.child.stderr is not None
        for line in self.child.stderr:
            self.lines.append(line.rstrip())

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.child.pid

    def signal(self, number: int) -> None:
        """Sends a signal."""
        self.child.send_signal(number)

    def ask(self, line: str) -> str:
        """Its answer to one line."""
        assert self.child.stdin is not None and self.child.stdout is not None
        self.child.stdin.write(line + "\n")
        self.child.stdin.flush()
        answer = self.child.stdout.readline().strip()
        assert answer, self.lines
        return answer

    def said(self, words: str) -> bool:
        """Whether a line of its status has these words."""
        return any(words in line for line in self.lines)

    def wait(self) -> int:
        """Its exit status, once its last line has been read."""
        status = self.child.wait(60)
        self._reader.join(60)
        return status

    def end(self) -> None:
        """Ends it, however it is."""
        with contextlib.suppress(ProcessLookupError):
            self.signal(signal.SIGKILL)
        self.child.wait(60)
        self._reader.join(60)
        for stream in (self.child.stdin, self.child.stdout, self.child.stderr):
            with contextlib.suppress(OSError):
                stream.close()


@contextlib.contextmanager
def lender(path: str, size: str, *flags: str) -> Iterator[Process]:
    """`aqua-jax lend`, as users run it."""
    process = Process(
        "-m", "aqua_jax.cli.main", "lend", f"--listen={path}", f"--bytes={size}", *flags
    )
    try:
        wait_for(lambda: process.said(f"at {path}"), "the lender listens")
        yield process
    finally:
        process.end()


@contextlib.contextmanager
def borrower(path: str, name: str = "b") -> Iterator[Process]:
    """A process of `BORROWER`."""
    process = Process("-c", BORROWER, path, name)
    try:
        yield process
    finally:
        process.end()


def shared_memory(pid: int) -> int:
    """Bytes of lenders' memory that a process has mapped."""
    with open(f"/proc/{pid}/maps", encoding="utf-8") as file:
        spans = [line.split()[0].split("-") for line in file if "/memfd:aqua" in line]
    return sum(int(end, 16) - int(start, 16) for start, end in spans)


def descriptors(pid: int) -> int:
    """How many files a process has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))
