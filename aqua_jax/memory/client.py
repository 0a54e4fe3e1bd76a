"""A client of the coordinator: borrows memory, lends memory, hears what is wanted back.

A thread keeps the connection. A step loop reads `Client.wanted`, `Loan.alive` and `Lending.news`,
plain attributes, and never waits for anybody.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterable, Sequence
from typing import Any, cast

from aqua_jax.closing import Closing
from aqua_jax.coordinator.intervals import Intervals
from aqua_jax.coordinator.records import DEVICE_KINDS, PAGE, ArenaTerms, Span, whole
from aqua_jax.errors import AquaError, ArenaError, CoordinatorError, LedgerError, StoreError
from aqua_jax.memory.arena import Arena
from aqua_jax.memory.lease import Lease
from aqua_jax.memory.lendable import Lendable
from aqua_jax.memory.link import Link, Question, messages
from aqua_jax.memory.loan import Held, Lending, Loan, terms_of
from aqua_jax.memory.mapping import Mapper, Mappings, Part
from aqua_jax.memory.scrubbing import Scrubber

_log = logging.getLogger(__name__)

_LONGEST_S = 1e6
_LEAVE_S = 1.0  # for the last words when closing


class Client(Closing):
    """A connection to the coordinator at a socket.

    Raises:
      CoordinatorError: nobody answers (unless `wait` is false).
      DependencyError: gRPC isn't installed.
    """

    def __init__(
        self, path: str, *, name: str = "", domain: str = "", timeout_s: float = 10.0,
        wait: bool = True, mappers: dict[str, Mapper] | None = None,
    ) -> None:
        """
        Args:
          path: of the coordinator's socket, or @name.
          name: told to people; quotas may name it.
          domain: where this process's memory is; near memory is lent first.
          timeout_s: for connecting, and for each answer.
          wait: return when connected. Otherwise the thread goes on trying.
          mappers: for devices' memory, by kind; of kinds without one nothing is borrowed.
        """
        self.name, self.domain = name, domain
        self._lock = threading.Lock()  # over what follows; never held while waiting
        self._held: dict[int, Held] = {}  # by generation
        self._lendings: dict[int, Lending] = {}  # by arena
        self._returning: dict[int, Lending] = {}  # by the number of the question
        self._tags = 0
        self._offering_lock = threading.Lock()  # one at a time
        self._offering: Lending | None = None
        self._closed = False
        self.wanted = False
        self.mappings = Mappings(mappers)
        self._unmappable: set[int] = set()  # arenas
        self._scrubber = Scrubber(self._scrubbed)
        self._link = Link(
            path, timeout_s, hello=self._hello, joined=self._joined, heard=self._heard,
            answered=self._answered,
        )
        self._link.start(wait)

    @property
    def connected(self) -> bool:
        """Whether the coordinator is there."""
        return self._link.connected

    @property
    def loans(self) -> list[Loan]:
        """All that is borrowed."""
        with self._lock:
            return [held.loan for held in self._held.values() if held.loan is not None]

    # Borrowing.

    def borrow(
        self, size: int, *, unit: int = PAGE, pieces: int = 1, minimum: int | None = None,
        prefer: Sequence[str] = (), priority: int = 0, timeout_s: float | None = None,
    ) -> list[Loan] | None:
        """Asks for memory, and maps it.

        Args:
          size: bytes, rounded up to whole units.
          unit: bytes that must be in one piece, such as a page of keys and values.
          pieces: loans at most.
          minimum: take less if there is less, but at least this; None: all or nothing.
          prefer: kinds of memory, best first; none: devices' that can be mapped before the host's.
          priority: the higher, the later it is wanted back.
          timeout_s: for the answer; None: the client's.

        Returns:
          The loans, zeroed; None when there is no room, or the quota is used up.

        Raises:
          LedgerError: numbers that can't be.
          CoordinatorError: no answer, or memory that can't be trusted.
        """
        while True:
            known = len(self._unmappable)
            try:
                asked = messages.Borrow(
                    bytes=size, unit=unit, pieces=pieces, priority=priority,
                    prefer=list(prefer or self.mappings.kinds),
                    minimum=size if minimum is None else minimum,
                    kinds=self.mappings.kinds, avoid=sorted(self._unmappable),
                )
            except (ValueError, TypeError) as error:
                raise StoreError(f"cannot borrow {size!r} bytes: {error}") from error
            answer, fds = self._link.ask(timeout_s, borrow=asked)
            if answer is None:
                return None
            try:
                return self._loans(answer, fds)
            except CoordinatorError:
                if len(self._unmappable) == known:
                    raise
                # What is lent elsewhere may do.

    def _loans(self, answer: Any, fds: dict[int, int]) -> list[Loan]:
        """Maps what was granted, all of it or nothing."""
        loans: list[Loan] = []
        memory: list[Arena | Part] = []
        try:
            for piece in answer.pieces:
                memory.append(self._memory(piece, fds[piece.arena]))
                loans.append(Loan(
                    memory[-1], piece.generation, self._release, self._forget,
                    lease=answer.lease, number=piece.arena, lender=piece.lender, pid=piece.pid,
                    terms=terms_of(piece.terms), way=memory[-1].way,
                ))
        except AquaError as error:
            for one in memory:
                one.close()
            with self._lock:
                for piece in answer.pieces:
                    self._held.pop(piece.generation, None)
            self._link.tell(free=messages.Free(lease=answer.lease))
            raise CoordinatorError(f"what was lent can't be used: {error}") from error
        finally:
            for fd in fds.values():
                os.close(fd)
        with self._lock:
            for loan in loans:
                held = self._held[loan.generation]
                held.loan = loan
                held.show()
            self._look()
        return loans

    def _memory(self, piece: Any, fd: int) -> Arena | Part:
        terms = piece.terms
        if terms.kind not in DEVICE_KINDS:
            return Arena.adopt(fd, piece.offset, piece.bytes)
        try:
            return self.mappings.part(
                piece.arena, fd, terms.size, piece.offset, piece.bytes, kind=terms.kind,
                device=terms.device,
            )
        except ArenaError:
            self._unmappable.add(piece.arena)
            raise

    def _release(self, loan: Lease, offset: int, size: int) -> None:
        """A loan has let go of a part."""
        with self._lock:
            held = self._held[loan.generation]
            start = held.offset + offset
            held.held.remove(start, start + size)
            self._look()
        self._link.tell(give_back=messages.GiveBack(
            generation=loan.generation, start=start, end=start + size
        ))

    def _forget(self, loan: Lease) -> None:
        with self._lock:
            self._held.pop(loan.generation, None)
            self._look()

    def _look(self) -> None:
        """Sets the flag; under the lock."""
        self.wanted = any(
            held.loan is not None and held.loan.alive and held.loan.wanted_back
            for held in self._held.values()
        )

    # Lending.

    def lend(
        self, arena: Lendable, lent: Iterable[Span] | None = None, *, name: str = "",
        kind: str = "host", domain: str | None = None, bandwidth: int = 0, cap: int = 0,
        scrub: bool = False, device: str = "",
    ) -> Lending:
        """Lends an arena, or parts of it.

        What it holds is zeroed before anybody borrows it, by the coordinator, or by `arena.scrub`
        in a thread of the client's where only devices reach it: it is the caller's no more. What
        isn't lent stays the caller's, but whoever borrows a part could read it, as all processes of
        this user could.

        Args:
          arena: made by `Arena.create`, or an extent; must live as long as the lending.
          lent: [start, end) in whole pages; None: all.
          name: told to people.
          kind: of memory.
          domain: where it is; None: where the client is.
          bandwidth: bytes/s that copies to it may reach; 0: unknown.
          cap: bytes/s that a borrower may use; 0: all.
          scrub: zeroed before it comes back.
          device: that it is on, by a name that borrowers know.

        Raises:
          LedgerError: what can't be lent.
          CoordinatorError: no answer.
        """
        terms = ArenaTerms(
            arena.size, name, kind, self.domain if domain is None else domain, bandwidth, cap,
            scrub, device,
        )
        spans = [(0, arena.size)] if lent is None else list(lent)
        with self._offering_lock:
            self._offering = lending = Lending(self, arena, terms, spans)
            try:
                self._link.ask(register=self._offer(lending, self._give([arena.fd])))
            finally:
                with self._lock:
                    self._offering = None
        return lending

    def _give(self, fds: list[int]) -> int:
        """Hands an arena's descriptors over; the tag that the message about them names."""
        with self._lock:
            self._tags += 1
            tag = self._tags
        entry = self._link.entry
        if entry is None:
            raise CoordinatorError(f"the coordinator at {self._link.path} is away")
        entry.give(tag, fds)
        return tag

    @staticmethod
    def _offer(lending: Lending, tag: int) -> Any:
        terms = lending.terms
        return messages.Register(
            tag=tag, arena=lending.id,
            terms=messages.Terms(
                size=terms.size, name=terms.name, kind=terms.kind, domain=terms.domain,
                bandwidth=terms.bandwidth, cap=terms.cap, scrub=terms.scrub, device=terms.device,
            ),
            lent=[messages.Span(start=start, end=end) for start, end in lending.out],
        )

    def lend_more(self, lending: Lending, start: int, end: int) -> None:
        """For `Lending.lend`."""
        with self._lock:
            lending.goes_out(start, end)
            span = messages.Span(start=start, end=end)
            try:
                # By a connection that knows what was lent before, and not of this. One that has
                # yet to be told will be told all of it; hearing it twice it would refuse it, or
                # return it, and lend it.
                question = self._link.begin(
                    lending.told, lend=messages.Lend(arena=lending.id, span=span)
                )
            except CoordinatorError:
                return  # lent when it is back, or returned
        try:
            self._link.answer(question)
        except CoordinatorError:
            pass  # as above
        except AquaError:
            with self._lock:
                lending.out.remove(start, end)
            raise

    def reclaim(
        self, lending: Lending, limit: int, deadline_s: float, wait_s: float | None = None
    ) -> int:
        """For `Lending.reclaim`."""
        wish = self._wish(lending, limit, deadline_s)
        with self._lock:
            lending.wish = (limit, deadline_s) if limit < lending.lent else None
        if wait_s == 0:
            self._link.tell(reclaim=wish)
            return max(0, lending.lent - limit)
        try:
            return cast(int, self._link.ask(wait_s, reclaim=wish).left)
        except CoordinatorError:
            return max(0, lending.lent - limit)  # said again when it is back

    def resize(self, lending: Lending, limit: int) -> int:
        """For `Lending.resize`."""
        wish = self._wish(lending, limit, 0.0)
        wish.revoke = False
        return cast(int, self._link.ask(reclaim=wish).left)

    def borrowed(self, lendings: Sequence[Lending]) -> list[int | None]:
        """Bytes of each that borrowers have, with one wait for all; None where nobody can say.

        Args:
          lendings: of which nothing is wanted back.
        """
        questions: list[Question] = []
        with contextlib.suppress(CoordinatorError):  # away: nobody can say
            for lending in lendings:
                wish = self._wish(lending, lending.lent, 0.0)  # changes nothing
                wish.revoke = False
                questions.append(self._link.begin(reclaim=wish))
        end = time.monotonic() + self._link.timeout_s
        found: list[int | None] = [None] * len(lendings)
        for index, question in enumerate(questions):
            with contextlib.suppress(LedgerError, CoordinatorError):
                left = max(0.0, end - time.monotonic())
                found[index] = self._link.answer(question, left).held
        return found

    @staticmethod
    def _wish(lending: Lending, limit: int, deadline_s: float) -> Any:
        whole("limit", limit)
        if not 0 <= deadline_s <= _LONGEST_S:
            raise LedgerError("deadline_s", deadline_s, f"0 to {_LONGEST_S:.0f}")
        return messages.Reclaim(
            arena=lending.id, limit=limit, deadline_ms=int(deadline_s * 1000), revoke=True
        )

    def take_away(self, lending: Lending) -> None:
        """For `Lending.close`."""
        self._scrubber.settle()
        with self._lock:
            self._lendings.pop(lending.id, None)
            journal, lending.journal = lending.journal, -1
        if journal >= 0:
            os.close(journal)
        with contextlib.suppress(AquaError):  # the coordinator is away: it will hear
            self._link.ask(_LEAVE_S, unregister=messages.Unregister(
                arena=lending.id, abandon=True
            ))

    # The thread.

    def _hello(self, key: int) -> Any:
        with self._lock:
            return messages.Hello(
                key=key, name=self.name, domain=self.domain, arenas=list(self._lendings),
                claims=[
                    messages.Claim(
                        generation=generation, arena=held.arena,
                        held=[messages.Span(start=a, end=b) for a, b in held.held],
                    )
                    for generation, held in self._held.items()
                ],
            )

    def _joined(self, link: Link) -> None:
        """Connected again: what we lend goes with us."""
        with self._lock:
            lendings = list(self._lendings.values())
            self._returning.clear()
        self._scrubber.forget()
        for lending in lendings:
            try:
                tag = self._give([lending.arena.fd, lending.journal])
            except AquaError as error:
                _log.warning("arena %d can't be lent again: %s", lending.id, error)
                continue
            with self._lock:  # nothing is lent between looking and saying: see `lend_more`
                self._returning[link.tell(register=self._offer(lending, tag))] = lending
                lending.told = link.connections
            wish = lending.wish
            if wish is not None:
                link.tell(reclaim=self._wish(lending, *wish))

    def _answered(self, link: Link, message: Any, awaited: bool) -> Any:
        """Turns an answer into what the asker gets."""
        kind = message.WhichOneof("body")
        if kind == "granted":
            return self._granted(link, message.granted, awaited)
        if kind == "refused":
            return None, {}
        lending = self._returning.pop(message.id, None)
        if lending is not None:
            if kind == "error":
                _log.warning("arena %d isn't lent any more: %s", lending.id, message.error)
                lending.alive = False
            return None
        if kind == "registered":
            assert link.entry is not None
            journal = link.entry.take(b"J", message.registered.arena)
            with self._lock:
                lending = self._offering if awaited else None
                if lending is not None:
                    lending.id, lending.journal = message.registered.arena, journal
                    lending.told = link.connections
                    self._lendings[lending.id] = lending
            if lending is None:
                os.close(journal)
                # Whoever offered it has been told that it isn't lent.
                link.tell(unregister=messages.Unregister(
                    arena=message.registered.arena, abandon=True
                ))
            return None
        return getattr(message, kind) if awaited and kind else None

    def _granted(self, link: Link, granted: Any, awaited: bool) -> Any:
        assert link.entry is not None
        fds: dict[int, int] = {}
        for piece in granted.pieces:
            if piece.arena not in fds:
                fds[piece.arena] = link.entry.take(b"A", piece.arena)
        if not awaited:
            for fd in fds.values():
                os.close(fd)
            link.tell(free=messages.Free(lease=granted.lease))
            return None
        with self._lock:
            for piece in granted.pieces:
                span = piece.offset, piece.offset + piece.bytes
                self._held[piece.generation] = Held(piece.arena, piece.offset, Intervals([span]))
        return granted, fds

    def _heard(self, link: Link, message: Any) -> None:
        kind = message.WhichOneof("body")
        if kind == "scrub":
            told = message.scrub
            with self._lock:
                lending = self._lendings.get(told.arena)
            if lending is not None:
                self._scrubber.ask(lending, told.span.start, told.span.end, told.number)
            return
        if kind == "returned":
            span = message.returned.span
            with self._lock:
                lending = self._lendings.get(message.returned.arena)
                if lending is not None:
                    with contextlib.suppress(StoreError):
                        lending.came_back(span.start, span.end)
            return
        told = message.revoke if kind == "revoke" else message.lost
        with self._lock:
            held = self._held.get(told.generation)
            if held is not None and kind == "lost":
                held.lost = True
            elif held is not None:
                held.keep = told.keep
                held.deadline = (
                    None if told.deadline_ms < 0
                    else time.monotonic() + told.deadline_ms / 1000
                )
            if held is not None:
                held.show()
                self._look()
        if held is None and kind == "revoke":
            # Given back a moment ago, or before the coordinator was restarted.
            link.tell(give_up=messages.GiveUp(generation=told.generation))

    def _scrubbed(self, lending: Lending, number: int) -> None:
        self._link.tell(scrubbed=messages.Scrubbed(arena=lending.id, number=number))

    # The end.

    def close(self) -> None:
        """Gives back what is borrowed, leaves, ends the thread; may be repeated.

        What is lent and hasn't come back is lost to its borrowers.
        """
        if self._closed:
            return
        self._closed = True
        for loan in self.loans:
            loan.close()
        with contextlib.suppress(AquaError):
            self._link.ask(_LEAVE_S, leave=messages.Leave())
        self._link.close()
        self._scrubber.close()
        with self._lock:
            lendings, self._lendings = list(self._lendings.values()), {}
        for lending in lendings:
            lending.alive = False
            if lending.journal >= 0:
                os.close(lending.journal)
                lending.journal = -1
