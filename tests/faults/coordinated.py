"""Borrowers and lenders of a coordinator as processes, for tests that kill them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from tests.faults.processes import Process
from tests.memory.lending import wait_for

# A borrower that does what it is told, a line at a time, and answers each line with one.
BORROWER = """
import sys, time
from aqua_jax.memory.client import Client
client = Client(sys.argv[1], name=sys.argv[2])
loans = []
print("ready", flush=True)
for line in sys.stdin:
    word, *numbers = line.split()
    numbers = [int(number) for number in numbers]
    answer = "ok"
    if word == "borrow":
        got = client.borrow(numbers[0])
        loans += got or []
        clean = got and all(loan.read(0, loan.size) == bytes(loan.size) for loan in got)
        answer = "none" if got is None else "clean" if clean else "dirty"
    elif word == "write":
        for loan in loans:
            loan.write(0, bytes([numbers[0]]) * loan.held.total)
    elif word == "same":
        whole = [loan.read(0, loan.held.total) for loan in loans if loan.alive]
        answer = str(all(data == bytes([numbers[0]]) * len(data) for data in whole))
    elif word == "alive":
        answer = str(sum(loan.alive for loan in loans))
    elif word == "connected":
        answer = str(client.connected)
    elif word == "wanted":
        answer = str(sum(loan.wanted_back for loan in loans))
    elif word == "give_back":
        loan = loans[-1]
        loan.give_back(loan.held.total - numbers[0], numbers[0])
    elif word == "obey":
        while client.wanted:
            for loan in loans:
                held = loan.held.total
                if loan.wanted_back:
                    loan.give_back(held - loan.wanted_back, loan.wanted_back)
    elif word == "close":
        loans.pop().close()
    print(answer, flush=True)
client.close()
"""


@contextlib.contextmanager
def borrower(path: str, name: str = "b") -> Iterator[Process]:
    """A process of `BORROWER`, connected."""
    process = Process("-c", BORROWER, path, name)
    try:
        assert process.child.stdout.readline().strip() == "ready", process.lines
        yield process
    finally:
        process.end()


@contextlib.contextmanager
def lender(path: str, size: str, *flags: str) -> Iterator[Process]:
    """`aqua-jax lend --socket`, as users run it."""
    process = Process(
        "-m", "aqua_jax.cli.main", "lend", f"--socket={path}", f"--bytes={size}", *flags
    )
    try:
        wait_for(lambda: process.said("through the coordinator"), "the lender lends")
        yield process
    finally:
        process.end()
