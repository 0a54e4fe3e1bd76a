"""A process that borrows of a coordinator and writes nonsense over it, till the last moment; and
notices when anybody else does."""

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
wrote = {}  # by generation: the byte that is everywhere
spoiled = 0
stop = threading.Event()

def work():
    global spoiled
    while not stop.is_set():
        for loan in list(loans):
            if loan.closed or not loan.held.total:
                loan.close()
                loans.remove(loan)
                continue
            size = loan.held.total
            # Zeroed when it was lent; nobody else may have written since.
            before = bytes([wrote.get(loan.generation, 0)]) * size
            if loan.alive and loan.read(0, size) != before and loan.alive:
                spoiled += 1
            # All ones are not a number in every floating point format.
            byte = wrote[loan.generation] = rng.choice([0, 127, 255, 255])
            loan.write(0, bytes([byte]) * size)
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
    elif line.strip() == "spoiled":
        print(spoiled, flush=True)
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
