"""What borrowing through a coordinator costs those who use it.

Starts a coordinator, lends and borrows, and prints: reading the flags that a step loop looks at;
`respond()` of an engine's pager and of an `Aqua` when nothing is asked, with few leases and many;
from a request to mapped memory; from a lender's wish to the borrower's flag; from the last byte
given back to the lender's.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from aqua_jax.engine.pager import Pager
from aqua_jax.errors import CoordinatorError
from aqua_jax.memory import Aqua
from aqua_jax.memory.arena import Arena
from aqua_jax.memory.client import Client
from aqua_jax.memory.loan import Loan
from aqua_jax.memory.pace import Pace
from aqua_jax.memory.stores import HostStore, PeerStore
from aqua_jax.paging.pages import PagePool
from aqua_jax.paging.residency import Residency

MIB = 1 << 20
# A pool of 8 pages of 64 KiB, as far as the pager has to know.
_POOL = jax.ShapeDtypeStruct((8, 4, 2, 16, 4, 32), jnp.float32)
_PAGE = 64 << 10


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


def _each(action: Callable[[], object], rounds: int) -> list[float]:
    """Seconds that it takes, each a mean over 100."""
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(100):
            action()
        found.append((time.perf_counter() - start) / 100)
    return found


def _pager(loans: list[Loan]) -> Pager:
    """Over stores in these loans, with a cap, before one at the host that has pages in it."""
    pace = Pace(1 << 30, _PAGE)
    host = HostStore(16 * _PAGE, _PAGE, 16)
    stores = [*(PeerStore(loan, _PAGE, 16, pace=pace) for loan in loans), host]
    for slot in host.allocate(4) or ():
        host.fill(slot, 16)
    for store in stores[:-1]:
        store.allocate(store.capacity)
    planner = Residency(PagePool(8, 16), stores)
    return Pager(planner, stores, _POOL, delayed=lambda seconds: None)


def _respond(path: str, client: Client, rounds: int) -> None:
    """What a step boundary costs at which nothing is asked."""
    for count in (1, 32):
        loans = [loan for _ in range(count) for loan in client.borrow(8 * _PAGE, unit=_PAGE) or ()]
        pager = _pager(loans)

        def boundary(pager: Pager = pager) -> None:
            pager.poll()
            pager.respond()

        _show(f"Pager.respond, {count} leases", _each(pager.respond, rounds))
        _show(f"Pager.poll and respond, {count} leases", _each(boundary, rounds))
        pager.close()
    with Aqua(path) as aqua:
        for count in (1, 1000):
            handles = [aqua.offload(jnp.ones(256)) for _ in range(count)]
            aqua.respond()
            _show(f"Aqua.respond, {count} arrays", _each(aqua.respond, rounds))
            for handle in handles:
                handle.free()


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
            _respond(path, client, rounds)
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
