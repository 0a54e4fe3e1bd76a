"""Leases and lent arenas as clients of a coordinator have them."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from aqua_jax.closing import Closing
from aqua_jax.coordinator.intervals import Intervals
from aqua_jax.coordinator.records import ArenaTerms, Span, whole
from aqua_jax.errors import LedgerError, StaleHandleError, StoreError
from aqua_jax.memory.lease import Lease, LeasedRange
from aqua_jax.memory.lendable import Lendable

_log = logging.getLogger(__name__)

DRAIN_S = 2.0  # that borrowers have when a lending is closed


class Loan(Lease):
    """A lease granted by a coordinator: as `Lease`, and where it is from.

    `alive` stays true while only the coordinator is away; it becomes false when the lender is gone.

    Attributes:
      lease: the coordinator's id of the request's answer; a request may have been answered with
        several loans.
      arena: the id of the arena it is in.
      terms: the arena's.
      lender: its lender's name.
      pid: its lender's process.
    """

    def __init__(
        self, arena: LeasedRange, generation: int, release: Callable[[Lease, int, int], None],
        closed: Callable[[Lease], None], *, lease: int, number: int, terms: ArenaTerms,
        lender: str, pid: int, way: str = "descriptors",
    ) -> None:
        """As `Lease`; the rest are the attributes."""
        super().__init__(arena, generation, release, closed, kind=terms.kind, way=way)
        self.lease, self.arena, self.terms, self.lender = lease, number, terms, lender
        self.pid = pid

    @property
    def bandwidth_cap(self) -> int:
        """Bytes/s that its holder's pager keeps to, for all that it has from that lender on the
        same terms; 0: no limit."""
        return self.terms.cap


def terms_of(told: Any) -> ArenaTerms:
    """The terms in a message of the coordinator's."""
    return ArenaTerms(
        told.size, told.name, told.kind, told.domain, told.bandwidth, told.cap, told.scrub,
        told.device,
    )


def capped(lease: Lease) -> tuple[int, str, int] | None:
    """Whose bandwidth term a lease is under, and bytes/s; None: there is none. What is under the
    same one shares the rate: an engine lends each of its extents by itself."""
    if not isinstance(lease, Loan) or not lease.bandwidth_cap:
        return None
    return lease.pid, lease.lender, lease.bandwidth_cap


@dataclasses.dataclass
class Held:
    """What a client knows of a range, from the grant to the last byte.

    Attributes:
      arena: its id.
      offset: where it starts in the arena.
      held: what hasn't been given back, in the arena's offsets.
      loan: None until it is mapped.
      keep: bytes that may be kept, if that has been said.
      deadline: by which the rest is wanted; `time.monotonic()`.
      lost: its lender is gone.
    """

    arena: int
    offset: int
    held: Intervals
    loan: Loan | None = None
    keep: int | None = None
    deadline: float | None = None
    lost: bool = False

    def show(self) -> None:
        """Brings the loan's flags up to date."""
        if self.loan is None:
            return
        if self.keep is not None:
            # The deadline first: whoever sees something wanted finds it set.
            self.loan.deadline, self.loan.keep = self.deadline, self.keep
        if self.lost:
            self.loan.alive = False


class LendingOwner(Protocol):
    """Who does what a `Lending` is told to."""

    @property
    def connected(self) -> bool:
        """Whether whoever keeps the ledger is there."""

    def lend_more(self, lending: Lending, start: int, end: int) -> None:
        """Lends [start, end) as well."""

    def reclaim(
        self, lending: Lending, limit: int, deadline_s: float, wait_s: float | None = None
    ) -> int:
        """Wants to lend at most `limit` bytes; waits so long for the ledger's answer, with 0 not
        at all, with None as long as for any."""

    def resize(self, lending: Lending, limit: int) -> int:
        """Lends at most `limit` bytes, if that takes nothing from borrowers."""

    def take_away(self, lending: Lending) -> None:
        """Lends nothing of it any more; whoever holds a part is told that it is lost."""


class Lending(Closing):
    """An arena that is lent through a coordinator, as its owner has it.

    Attributes:
      id: the coordinator's name for it.
      arena: the memory; the caller's.
      terms: what was said of it.
      news: whether `take_returned` has something. A plain attribute, for loops.
      alive: false once the coordinator refused it, or it was closed.
    """

    def __init__(
        self, owner: LendingOwner, arena: Lendable, terms: ArenaTerms, lent: Iterable[Span]
    ) -> None:
        """Use `Client.lend`."""
        self._owner = owner
        self.id = 0
        self.arena, self.terms = arena, terms
        self.news = False
        self.alive = True
        self.journal = -1  # a descriptor that only the next coordinator reads
        self.out = Intervals(lent)  # not ours now; under the client's lock
        self.told = 0  # by which connection the coordinator has heard what is out
        self.wish: tuple[int, float] | None = None  # limit and seconds, until it is fulfilled
        self._all_back = threading.Event()
        self._returned: list[Span] = []

    @property
    def lent(self) -> int:
        """Bytes that aren't the owner's now."""
        return self.out.total

    def lend(self, start: int, size: int) -> None:
        """Lends `size` bytes at `start` as well, whole pages that are the owner's now.

        What it holds is zeroed before anybody borrows it. While the coordinator is away it is lent
        later, or comes back.

        Raises:
          LedgerError: it is lent already, or isn't in the arena. Nothing changes.
          StaleHandleError: closed.
        """
        self._check()
        self._owner.lend_more(self, start, start + size)

    def reclaim(self, limit: int = 0, deadline_s: float = 10.0, *, wait: bool = True) -> int:
        """Wants to lend at most `limit` bytes; what is above comes through `take_returned`.

        Args:
          limit: bytes. Higher than before takes back what was wished.
          deadline_s: seconds that borrowers have.
          wait: for the coordinator's answer.

        Returns:
          Bytes still to come. While the coordinator is away, or without waiting: all that are above
          the limit.

        Raises:
          LedgerError: numbers that can't be.
        """
        self._check()
        return self._owner.reclaim(self, limit, deadline_s, None if wait else 0.0)

    def resize(self, limit: int) -> int:
        """As `reclaim`, but takes only what nobody has borrowed.

        Raises:
          LedgerError: that isn't enough. Nothing changes.
          CoordinatorError: no answer.
        """
        self._check()
        return self._owner.resize(self, limit)

    def goes_out(self, start: int, end: int) -> None:
        """For the client: [start, end) isn't the owner's any more, and is lent beyond any wish.

        Raises:
          LedgerError: it is lent already, or isn't in the arena.
        """
        whole("start", start, 0, self.arena.size)
        whole("end", end, 0, self.arena.size)
        try:
            self.out.add(start, end)
        except StoreError as error:
            raise LedgerError(
                "start", start, f"bytes that aren't lent already ({error})"
            ) from error
        if self.wish is not None:
            self.wish = self.wish[0] + end - start, self.wish[1]

    def came_back(self, start: int, end: int) -> None:
        """For the client: [start, end) is the owner's again."""
        self.out.remove(start, end)
        if self.wish is not None and self.lent <= self.wish[0]:
            self.wish = None
        self._returned.append((start, end))
        self.news = True
        if not self.out.total:
            self._all_back.set()

    def take_returned(self) -> list[Span]:
        """[start, end) of the arena that are the owner's again, each once."""
        self.news = False  # before taking: what comes in between is seen next time
        count = len(self._returned)
        spans, self._returned[:count] = self._returned[:count], []
        return spans

    def _check(self) -> None:
        if not self.alive:
            raise StaleHandleError(f"arena {self.id} isn't lent any more")

    def close(self, drain_s: float = DRAIN_S) -> int:
        """Lends it no more; may be repeated.

        What is still lent is wanted back first, and waited for; whoever hasn't given it back by
        then is told that it is lost. The memory is the owner's again in either case, but nobody
        may be given it who trusts that no late copy writes there.

        Args:
          drain_s: seconds to wait at most; not at all while the coordinator is away.

        Returns:
          Bytes that had not come back; the log says so, too.

        Raises:
          LedgerError: no possible time.
        """
        if not self.alive:
            return 0
        if self.out.total and drain_s > 0 and self._owner.connected:
            self._all_back.clear()
            end = time.monotonic() + drain_s
            self._owner.reclaim(self, 0, drain_s, drain_s)
            if self.out.total:
                self._all_back.wait(max(0.0, end - time.monotonic()))
        self.alive = False
        left = self.out.total
        if left:
            _log.warning(
                "arena %d %s: %d bytes are still lent; whoever holds them is told that they are "
                "lost", self.id, self.terms.name, left,
            )
        self._owner.take_away(self)
        return left
