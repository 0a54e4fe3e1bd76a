"""What borrowing through a coordinator costs those who use it.

Starts a coordinator, lends and borrows, and prints: reading the flags that a step loop looks at;
from a request to mapped memory; from a lender's wish to the borrower's flag; from the last byte
given back to the lender's. Nothing here needs jax.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

from aqua_jax.errors import CoordinatorError
from aqua_jax.memory.arena import Arena
from aqua_jax.memory.client import Client

MIB = 1 << 20


def _show(name: str, seconds: list[float]) -> None:
    ordered = sorted(seconds)
    p99 = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    print(f"{name:<52} median {statistics.median(ordered) * 1e6:>10.2f} us   "
          f"p99 {p99 * 1e6:>10.2f} us   n {len(ordered)}")


def _until(condition: Callable[[], object], seconds: float = 10.0) -> float:
    start = time.perf_counter()
    while not condition():
        if time.perf_counter() - start > seconds:
            raise TimeoutError("it didn't happen")
        time.sleep(0.00005)
    return time.perf_counter() - start


def _connect(path: str) -> Client:
    end = time.monotonic() + 30
    while True:
        try:
            return Client(path, timeout_s=1.0)
        except CoordinatorError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)


def main(rounds: int = 200) -> None:
    """Prints the figures."""
    path = f"@aqua-cost-{os.getpid()}"
    command = [sys.executable, "-m", "aqua_jax.cli.main", "coordinator", f"--socket={path}"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        with Arena.create(64 * MIB) as arena, _connect(path) as lender, _connect(path) as client:
            lending = lender.lend(arena)
            (loan,) = client.borrow(32 * MIB) or ()
            flags, wants = [], []
            for _ in range(rounds):
                start = time.perf_counter()
                for _ in range(1000):
                    client.wanted  # noqa: B018
                flags.append((time.perf_counter() - start) / 1000)
                start = time.perf_counter()
                for _ in range(1000):
                    loan.wanted_back  # noqa: B018
                wants.append((time.perf_counter() - start) / 1000)
            _show("Client.wanted, nothing asked", flags)
            _show("Loan.wanted_back, nothing asked", wants)
            asked, backs = [], []
            for _ in range(rounds):
                start = time.perf_counter()
                (small,) = client.borrow(MIB) or ()
                asked.append(time.perf_counter() - start)
                small.close()
                _until(lambda: client.loans == [loan])
            _show("borrow 1 MiB, mapped", asked)
            told: list[float] = []
            for _ in range(rounds // 4):
                loan.close()
                found = client.borrow(64 * MIB)
                while found is None:  # what was given back is still being zeroed
                    time.sleep(0.01)
                    found = client.borrow(64 * MIB)
                (loan,) = found
                start = time.perf_counter()
                lending.reclaim(63 * MIB, 5.0)
                _until(lambda: client.wanted)
                told.append(time.perf_counter() - start)
                loan.give_back(63 * MIB, MIB)
                backs.append(_until(lambda: lending.news))
                for start_byte, end_byte in lending.take_returned():
                    lending.lend(start_byte, end_byte - start_byte)
            _show("a lender's wish until the borrower's flag", told)
            _show("given back until it is the lender's", backs)
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    main()
