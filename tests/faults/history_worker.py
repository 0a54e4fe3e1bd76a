"""A process that borrows or lends through a coordinator at random and writes down all of it.

`python -m tests.faults.history_worker borrow|lend SOCKET LOG SEED`. Every line of the log is one
thing that was done or seen, written before anything else happens, so that a killed process leaves
a true history. It ends when its standard input does.

What it reads must be what it wrote; anything else is a line `bad`, which fails the test.
"""

from __future__ import annotations

import json
import os
import queue
import random
import select
import sys
import threading
import time
from typing import Any

from aqua_jax.coordinator import messages_pb2 as messages
from aqua_jax.coordinator.intervals import Intervals
from aqua_jax.errors import AquaError, CoordinatorError, StaleHandleError
from aqua_jax.memory import link
from aqua_jax.memory.arena import PAGE, Arena
from aqua_jax.memory.client import Client

ARENA_PAGES = 40


class Log:
    """Lines of JSON, each with the time by the machine's clock."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def __call__(self, event: str, **fields: object) -> None:
        line = json.dumps({"t": time.monotonic(), "e": event, **fields}) + "\n"
        os.write(self._fd, line.encode())


class Shuffled(queue.SimpleQueue):
    """Delivers some messages late, after others that were said later."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self._rng = rng

    def put(self, item: Any, *args: Any, **options: Any) -> None:
        kind = item.WhichOneof("body") if isinstance(item, messages.FromClient) else None
        if kind in ("give_back", "give_up", "free", "renew") and self._rng.random() < 0.3:
            timer = threading.Timer(self._rng.random() * 0.05, super().put, [item])
            timer.daemon = True
            timer.start()
        else:
            super().put(item, *args, **options)


def disturb(seed: int) -> None:
    """Delays what clients hear, and delays and reorders what they say."""
    rng, hear = random.Random(seed), link.Link._hear

    def late(self: link.Link, message: Any) -> None:
        if rng.random() < 0.1:
            time.sleep(rng.random() * 0.03)
        hear(self, message)

    link.Link._hear = late  # type: ignore[method-assign]

    class Queues:
        Empty = queue.Empty
        SimpleQueue = staticmethod(lambda: Shuffled(rng))

    link.queue = Queues  # type: ignore[assignment]


def stamp(who: int, generation: int, page: int, turn: int) -> bytes:
    """What a page is filled with: nobody else ever writes the same."""
    return f"{who:>12}{generation:>20}{page:>12}{turn:>20}".encode() * (PAGE // 64)


class Borrower:
    """Borrows, writes, reads, obeys, gives back."""

    def __init__(self, client: Client, log: Log, rng: random.Random) -> None:
        self.client, self.log, self.rng = client, log, rng
        self.loans: dict[int, Any] = {}
        self.written: dict[tuple[int, int], bytes] = {}  # (generation, page) -> content
        self.turn = 0

    def step(self) -> None:
        """One thing at random."""
        away = not self.client.connected  # then it goes on with what it has, for the most part
        self.rng.choices(
            [self.borrow, self.write, self.read, self.give_back, self.obey, self.look, self.rest],
            [3, 4, 6, 0.02 if away else 1.2, 3, 1, 0.5 if away else 0.1],
        )[0]()

    def rest(self) -> None:
        """Keeps what it has for a while."""
        time.sleep(self.rng.random() * 0.3)

    def borrow(self) -> None:
        if sum(loan.held.total for loan in self.loans.values()) > 96 * PAGE:
            self.give_back()
            return
        size = self.rng.randint(1, 16) * PAGE
        try:
            loans = self.client.borrow(
                size, pieces=self.rng.randint(1, 3), minimum=PAGE, timeout_s=3.0,
                priority=self.rng.randint(0, 2),
            )
        except CoordinatorError as error:
            self.log("away", why=str(error)[:80])
            time.sleep(0.02)
            return
        if loans is None:
            self.log("refused")
            return
        for loan in loans:
            span = loan_span(self.client, loan)
            self.log("granted", g=loan.generation, a=loan.arena, s=span[0], n=span[1])
            if loan.alive and self._bytes(loan, 0, loan.size) not in (bytes(loan.size), None):
                self.log("bad", what="not zero", g=loan.generation, a=loan.arena)
            self.loans[loan.generation] = loan

    def _bytes(self, loan: Any, offset: int, size: int) -> bytes | None:
        try:
            return loan.read(offset, size)
        except StaleHandleError:
            return None

    def _pages(self, loan: Any) -> list[int]:
        return [page for a, b in loan.held for page in range(a // PAGE, b // PAGE)]

    def _some(self) -> Any:
        return self.loans[self.rng.choice(list(self.loans))] if self.loans else None

    def write(self) -> None:
        loan = self._some()
        if loan is None:
            return
        self.turn += 1
        for page in self._pages(loan):
            content = stamp(os.getpid(), loan.generation, page, self.turn)
            self.written.pop((loan.generation, page), None)  # torn, should we die now
            loan.write(page * PAGE, content)
            self.written[loan.generation, page] = content
        self.log("wrote", g=loan.generation, turn=self.turn)

    def read(self) -> None:
        loan = self._some()
        if loan is None:
            return
        for page in self._pages(loan):
            expected = self.written.get((loan.generation, page), bytes(PAGE))
            found = self._bytes(loan, page * PAGE, PAGE)
            if found is not None and found != expected:
                self.log(
                    "bad", what="foreign", g=loan.generation, a=loan.arena, page=page,
                    found=found[:64].decode(errors="replace"), expected=expected[:64].decode(),
                )
        self.log("read", g=loan.generation)

    def give_back(self) -> None:
        loan = self._some()
        if loan is None:
            return
        if self.rng.random() < 0.4:
            self._close(loan)
            return
        spans = list(loan.held)
        start, end = self.rng.choice(spans)
        start += self.rng.randrange((end - start) // PAGE) * PAGE
        self._back(loan, start, end)

    def _back(self, loan: Any, start: int, end: int) -> None:
        base = loan_base(self.client, loan)
        self.log("gives", g=loan.generation, a=loan.arena, s=base + start, n=base + end)
        loan.give_back(start, end - start)
        if not loan.held.total:
            self._close(loan)

    def _close(self, loan: Any) -> None:
        base = loan_base(self.client, loan)
        for start, end in loan.held:
            self.log("gives", g=loan.generation, a=loan.arena, s=base + start, n=base + end)
        loan.close()
        del self.loans[loan.generation]

    def obey(self) -> None:
        """Gives back what is wanted, from the end, and not a page more."""
        if not self.client.wanted:
            return
        for loan in list(self.loans.values()):
            while (wanted := loan.wanted_back) > 0 and loan.alive and loan.held.total:
                start, end = list(loan.held)[-1]
                self._back(loan, max(start, end - wanted), end)
        self.log("obeyed")

    def look(self) -> None:
        """Closes what is lost."""
        for loan in list(self.loans.values()):
            if not loan.alive:
                self.log("lost", g=loan.generation, a=loan.arena)
                self._close(loan)


def loan_base(client: Client, loan: Any) -> int:
    """Where a loan starts in its arena."""
    with client._lock:
        return client._held[loan.generation].offset


def loan_span(client: Client, loan: Any) -> tuple[int, int]:
    """A loan's [start, end) in its arena."""
    base = loan_base(client, loan)
    return base, base + loan.size


class Lender:
    """Lends an arena, wants parts back, writes into them, lends them again."""

    def __init__(self, client: Client, log: Log, rng: random.Random) -> None:
        self.client, self.log, self.rng = client, log, rng
        self.arena = Arena.create(ARENA_PAGES * PAGE, "aqua-test")
        self.own = Intervals()
        self.turn = 0
        self.written: dict[int, bytes] = {}
        self.lending: Any = None

    def step(self) -> None:
        """One thing at random."""
        if self.lending is None:
            try:
                self.lending = self.client.lend(self.arena, scrub=self.rng.random() < 0.5)
            except CoordinatorError as error:
                self.log("away", why=str(error)[:80])
                time.sleep(0.05)
                return
            self.log("lends", a=self.lending.id)
        if not self.lending.alive:
            self.log("bad", what="not lent any more", a=self.lending.id)
        for start, end in self.lending.take_returned():
            for page in range(start // PAGE, end // PAGE):
                self._write(page)
            self.own.add(start, end)
            self.log("returned", a=self.lending.id, s=start, n=end)
        self.rng.choices([self.reclaim, self.lend, self.check], [1, 4, 8])[0]()

    def _write(self, page: int) -> None:
        self.turn += 1
        self.written[page] = stamp(os.getpid(), 0, page, self.turn)
        self.arena.write(page * PAGE, self.written[page])

    def reclaim(self) -> None:
        limit = self.rng.randint(ARENA_PAGES // 2, ARENA_PAGES) * PAGE
        left = self.lending.reclaim(limit, 0.3)
        self.log("reclaims", a=self.lending.id, limit=limit, left=left)

    def lend(self) -> None:
        spans = list(self.own)
        if not spans:
            return
        start, end = self.rng.choice(spans)
        self.own.remove(start, end)
        for page in range(start // PAGE, end // PAGE):
            del self.written[page]
        self.log("lends", a=self.lending.id, s=start, n=end)
        self.lending.lend(start, end - start)

    def check(self) -> None:
        """What is its own, nobody else writes to."""
        for start, end in self.own:
            for page in range(start // PAGE, end // PAGE):
                if self.arena.read(page * PAGE, PAGE) != self.written[page]:
                    self.log("bad", what="own bytes changed", a=self.lending.id, page=page)
        self.log("checked", a=self.lending.id)


def main(role: str, path: str, log_path: str, seed: int) -> None:
    """Until the end of standard input."""
    log, rng = Log(log_path), random.Random(seed)
    disturb(seed)
    client = Client(path, name=f"{role}{seed}", wait=False, timeout_s=2.0)
    worker = (Borrower if role == "borrow" else Lender)(client, log, rng)
    log("born", role=role, pid=os.getpid())
    pause = 0.0005 if role == "borrow" else 0.01
    try:
        while not select.select([0], [], [], pause)[0]:
            worker.step()
        if isinstance(worker, Borrower):
            for loan in list(worker.loans.values()):
                worker._close(loan)
            client.close()
        log("ended")
    except AquaError as error:
        log("bad", what=f"{type(error).__name__}: {error}")
        raise


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
