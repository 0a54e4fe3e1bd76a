"""A process that borrows of a coordinator and writes nonsense over it, till the last moment."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from tests.faults.processes import Process

_BORROWER = """
import random, sys, threading, time
from aqua_jax.memory.client import Client

rng = random.Random(int(sys.argv[2]))
client = Client(sys.argv[1], name="garbage")
loans = []
stop = threading.Event()

def work():
    while not stop.is_set():
        for loan in list(loans):
            if loan.closed or not loan.held.total:
                loan.close()
                loans.remove(loan)
                continue
            # All ones are not a number in every floating point format.
            loan.write(0, bytes([rng.choice([0, 127, 255, 255])]) * loan.held.total)
            wanted = loan.wanted_back
            if wanted or rng.random() < 0.02:
                part = wanted or loan.held.total
                if rng.random() < 0.5:
                    part = min(part, 4096)
                loan.give_back(loan.held.total - part, part)
        if len(loans) < 8 and rng.random() < 0.2:
            with contextlib.suppress(AquaError):
                loans.extend(client.borrow(rng.randrange(1, 64) * 4096, pieces=4, minimum=4096)
                             or [])
        time.sleep(0.001)

import contextlib
from aqua_jax.errors import AquaError
thread = threading.Thread(target=work, daemon=True)
thread.start()
print("ready", flush=True)
for line in sys.stdin:
    if line.strip() == "held":
        print(sum(loan.held.total for loan in list(loans) if not loan.closed), flush=True)
stop.set()
thread.join()
client.close()
"""


@contextlib.contextmanager
def garbage_borrower(path: str, seed: int) -> Iterator[Process]:
    """Borrows, spoils and gives back what it finds, for the length of a block."""
    process = Process("-c", _BORROWER, path, str(seed))
    try:
        assert process.child.stdout is not None
        assert process.child.stdout.readline().strip() == "ready", process.lines
        yield process
    finally:
        process.end()
