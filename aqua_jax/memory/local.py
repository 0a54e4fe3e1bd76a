"""Lending and borrowing inside one process: the ledger without a coordinator.

For an engine that is alone, or a program that lends its own idle memory to its own tensors. The
same calls as `client.Client`; answers come at once, and nothing ever expires or is quarantined.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterable, Sequence

from aqua_jax.closing import Closing
from aqua_jax.coordinator.intervals import Intervals
from aqua_jax.coordinator.ledger import Ledger
from aqua_jax.coordinator.records import (
    PAGE,
    ArenaTerms,
    Kill,
    Lost,
    Range,
    Refused,
    Returned,
    Revoke,
    Span,
)
from aqua_jax.errors import AquaError, CoordinatorError, LedgerError, StoreError
from aqua_jax.memory.arena import Arena
from aqua_jax.memory.lease import Lease
from aqua_jax.memory.lendable import Lendable
from aqua_jax.memory.loan import Held, Lending, Loan

_LENDER, _BORROWER = 1, 2
_STEP = 16 << 20  # zeroed at a time


class LocalClient(Closing):
    """Lends to itself."""

    def __init__(self, *, name: str = "local", domain: str = "", drain_s: float = 10.0) -> None:
        """
        Args:
          name: told to people.
          domain: where its memory is.
          drain_s: most seconds that loans are given when memory is wanted back.
        """
        self.name, self.domain = name, domain
        self.wanted = False
        self._lock = threading.RLock()
        self._ledger = Ledger(time.monotonic, term_s=float("inf"), drain_s=drain_s)
        for key in (_LENDER, _BORROWER):
            self._ledger.join(key, name=name, domain=domain)
        self._held: dict[int, Held] = {}
        self._lendings: dict[int, Lending] = {}

    @property
    def connected(self) -> bool:
        """Always: it keeps the ledger itself."""
        return True

    @property
    def loans(self) -> list[Loan]:
        """All that is borrowed."""
        with self._lock:
            return [held.loan for held in self._held.values() if held.loan is not None]

    def borrow(
        self, size: int, *, unit: int = PAGE, pieces: int = 1, minimum: int | None = None,
        prefer: Sequence[str] = (), priority: int = 0, timeout_s: float | None = None,
    ) -> list[Loan] | None:
        """As `Client.borrow`; `timeout_s` has no meaning here.

        Raises:
          LedgerError: numbers that can't be.
          CoordinatorError: memory that can't be mapped.
        """
        with self._lock:
            self._zero()
            lease = self._ledger.borrow(
                _BORROWER, size, unit=unit, pieces=pieces, minimum=minimum, prefer=prefer,
                priority=priority,
            )
            if isinstance(lease, Refused):
                return None
            try:
                loans = [self._map(lease.id, found) for found in lease.ranges]
            except AquaError as error:
                self._ledger.free(_BORROWER, lease.id)
                self._settle()
                raise CoordinatorError(f"what was lent can't be used: {error}") from error
            for loan, found in zip(loans, lease.ranges, strict=True):
                self._held[found.generation] = Held(
                    found.arena, found.offset, Intervals(found.held), loan
                )
            return loans

    def _map(self, lease: int, found: Range) -> Loan:
        lending = self._lendings[found.arena]
        arena = Arena.adopt(lending.arena.fd, found.offset, found.size)
        return Loan(
            arena, found.generation, self._release, self._forget, lease=lease,
            number=found.arena, terms=lending.terms, lender=self.name, pid=os.getpid(),
        )

    def _release(self, loan: Lease, offset: int, size: int) -> None:
        with self._lock:
            held = self._held[loan.generation]
            start = held.offset + offset
            held.held.remove(start, start + size)
            if not held.lost:
                self._ledger.give_back(_BORROWER, loan.generation, start, start + size)
            self._settle()

    def _forget(self, loan: Lease) -> None:
        with self._lock:
            self._held.pop(loan.generation, None)
            self._settle()

    # Lending.

    def lend(
        self, arena: Lendable, lent: Iterable[Span] | None = None, *, name: str = "",
        kind: str = "host", domain: str | None = None, bandwidth: int = 0, cap: int = 0,
        scrub: bool = False,
    ) -> Lending:
        """As `Client.lend`.

        Raises:
          LedgerError: what can't be lent.
        """
        terms = ArenaTerms(
            arena.size, name, kind, self.domain if domain is None else domain, bandwidth, cap,
            scrub,
        )
        if terms.on_device:
            raise LedgerError("kind", kind, "the host's: in one process others are shared anyway")
        spans = [(0, arena.size)] if lent is None else list(lent)
        with self._lock:
            number = self._ledger.register(_LENDER, terms, spans).id
            lending = Lending(self, arena, terms, spans)
            lending.id = number
            self._lendings[number] = lending
        return lending

    def lend_more(self, lending: Lending, start: int, end: int) -> None:
        """For `Lending.lend`."""
        with self._lock:
            self._ledger.lend(_LENDER, lending.id, start, end)
            lending.out.add(start, end)
            self._settle()

    def reclaim(
        self, lending: Lending, limit: int, deadline_s: float, wait_s: float | None = None
    ) -> int:
        """For `Lending.reclaim`."""
        with self._lock:
            left = self._ledger.reclaim(_LENDER, lending.id, limit, deadline_s)
            self._settle()
            if lending.terms.scrub:
                self._zero()
            return min(left, max(0, lending.lent - limit))

    def resize(self, lending: Lending, limit: int) -> int:
        """For `Lending.resize`."""
        with self._lock:
            self._ledger.resize(_LENDER, lending.id, limit)
            self._settle()
            if lending.terms.scrub:
                self._zero()
            return max(0, lending.lent - limit)

    def take_away(self, lending: Lending) -> None:
        """For `Lending.close`; what hasn't come back is lost."""
        with self._lock:
            self._lendings.pop(lending.id, None)
            self._ledger.keep_only(_LENDER, self._lendings)
            self._settle()

    # Inside.

    def _zero(self) -> None:
        """Zeroes what has come back, here and now; under the lock."""
        while (taken := self._ledger.next_dirty(_STEP)) is not None:
            number, start, end = taken
            self._lendings[number].arena.scrub(start, end - start)
            self._ledger.scrubbed(number, start, end)
        self._settle()

    def _settle(self) -> None:
        """Does what the ledger says must be told; under the lock."""
        self._ledger.take_changed()
        for event in self._ledger.take_events():
            if isinstance(event, Returned):
                lending = self._lendings.get(event.arena)
                if lending is not None:
                    with contextlib.suppress(StoreError):
                        lending.came_back(event.start, event.end)
                continue
            if isinstance(event, Kill) or (held := self._held.get(event.generation)) is None:
                continue
            if isinstance(event, Lost):
                held.lost = True
            elif isinstance(event, Revoke):
                held.keep, held.deadline = event.keep, event.deadline
            held.show()
        self.wanted = any(
            held.loan is not None and held.loan.alive and held.loan.wanted_back
            for held in self._held.values()
        )

    def close(self) -> None:
        """Gives back what is borrowed and takes away what is lent; may be repeated."""
        for loan in self.loans:
            loan.close()
        for lending in list(self._lendings.values()):
            lending.close()
