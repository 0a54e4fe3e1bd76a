"""Between messages and the ledger's own words."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from aqua_jax.coordinator import messages_pb2 as messages
from aqua_jax.coordinator.ledger import Ledger
from aqua_jax.coordinator.records import (
    ArenaTerms,
    Claim,
    Lease,
    Lost,
    Refused,
    Returned,
    Revoke,
    Scrub,
)
from aqua_jax.errors import AquaError, FieldError, LedgerError

MOST_CLAIMS = 1 << 16
MOST_PREFERENCES = 16


def claims(told: Iterable[messages.Claim]) -> list[Claim]:
    """What a client says it holds.

    Raises:
      LedgerError: too much of it.
    """
    found = [
        Claim(c.generation, c.arena, tuple((span.start, span.end) for span in c.held))
        for c in told
    ]
    if len(found) > MOST_CLAIMS:
        raise LedgerError("claims", len(found), f"at most {MOST_CLAIMS}")
    return found


def terms(told: messages.Terms) -> ArenaTerms:
    """An arena's terms.

    Raises:
      LedgerError: they can't be.
    """
    return ArenaTerms(
        told.size, told.name, told.kind or "host", told.domain, told.bandwidth, told.cap,
        told.scrub, told.device,
    )


def terms_message(found: ArenaTerms) -> messages.Terms:
    """The same as a message."""
    return messages.Terms(
        size=found.size, name=found.name, kind=found.kind, domain=found.domain,
        bandwidth=found.bandwidth, cap=found.cap, scrub=found.scrub, device=found.device,
    )


def wishes(asked: messages.Borrow) -> dict[str, Any]:
    """A request's arguments of `Ledger.borrow`.

    Raises:
      LedgerError: too many preferences, kinds or arenas.
    """
    for field, most in (
        ("prefer", MOST_PREFERENCES), ("kinds", MOST_PREFERENCES), ("avoid", MOST_CLAIMS)
    ):
        if len(getattr(asked, field)) > most:
            raise LedgerError(field, len(getattr(asked, field)), f"at most {most}")
    return {
        "size": asked.bytes, "unit": asked.unit, "pieces": asked.pieces,
        "minimum": asked.minimum, "priority": asked.priority, "prefer": tuple(asked.prefer),
        "kinds": tuple(asked.kinds), "avoid": frozenset(asked.avoid),
    }


def welcome(number: int, key: int, term_s: float) -> messages.ToClient:
    """Answers hello."""
    return messages.ToClient(
        id=number, welcome=messages.Welcome(key=key, term_ms=int(term_s * 1000))
    )


def registered(number: int, arena: int) -> messages.ToClient:
    """Answers register."""
    return messages.ToClient(id=number, registered=messages.Registered(arena=arena))


def done(number: int, left: int = 0, held: int = 0) -> messages.ToClient:
    """Answers what has no other answer."""
    return messages.ToClient(id=number, done=messages.Done(left=left, held=held))


def refused(number: int, answer: Refused) -> messages.ToClient:
    """Answers borrow."""
    return messages.ToClient(
        id=number,
        refused=messages.Refused(reason=answer.reason, free=answer.free, longest=answer.longest),
    )


def granted(number: int, lease: Lease, ledger: Ledger) -> messages.ToClient:
    """Answers borrow."""
    pieces = []
    for found in lease.ranges:
        arena = ledger.arenas[found.arena]
        producer = ledger.clients[arena.producer]
        pieces.append(messages.Piece(
            generation=found.generation, arena=found.arena, offset=found.offset,
            bytes=found.size, terms=terms_message(arena.terms), lender=producer.name,
            pid=producer.identity[0],
        ))
    return messages.ToClient(
        id=number, granted=messages.Granted(lease=lease.id, pieces=pieces)
    )


def error(number: int, found: AquaError) -> messages.ToClient:
    """Answers what can't be done."""
    if isinstance(found, FieldError):
        body = messages.Error(
            kind=type(found).__name__, field=found.field, value=repr(found.value)[:200],
            allowed=found.allowed[:500],
        )
    else:
        body = messages.Error(kind=type(found).__name__, allowed=str(found)[:500])
    return messages.ToClient(id=number, error=body)


def scrub(found: Scrub) -> messages.ToClient:
    """Asks a lender to zero its device's memory."""
    return messages.ToClient(scrub=messages.Scrub(
        arena=found.arena, span=messages.Span(start=found.start, end=found.end),
        number=found.number,
    ))


def event(found: Revoke | Lost | Returned, now: float) -> messages.ToClient:
    """What a client is told without having asked."""
    if isinstance(found, Revoke):
        left = -1 if found.deadline is None else max(0, int((found.deadline - now) * 1000))
        return messages.ToClient(revoke=messages.Revoke(
            generation=found.generation, keep=found.keep, deadline_ms=left
        ))
    if isinstance(found, Lost):
        return messages.ToClient(lost=messages.Lost(generation=found.generation))
    return messages.ToClient(returned=messages.Returned(
        arena=found.arena, span=messages.Span(start=found.start, end=found.end)
    ))


def status(ledger: Ledger, started: float) -> messages.StatusReply:
    """Everything there is, for people."""
    now = time.monotonic()
    reply = messages.StatusReply(
        term_ms=int(ledger.term_s * 1000), up_ms=int((now - started) * 1000)
    )
    for key, client in ledger.clients.items():
        mine = [found for found in ledger.ranges.values() if found.owner == key]
        state = "quarantined" if client.expired else "connected" if client.connected else "away"
        reply.clients.add(
            name=client.name, pid=client.identity[0], state=state,
            lent=sum(a.lent for a in ledger.arenas.values() if a.producer == key),
            held=sum(found.held.total for found in mine),
            wanted=sum(found.wanted for found in mine),
        )
    for arena in ledger.arenas.values():
        lender = ledger.clients[arena.producer]
        reply.arenas.add(
            arena=arena.id, name=arena.terms.name, lender=lender.name, pid=lender.identity[0],
            kind=arena.terms.kind, domain=arena.terms.domain, lent=arena.lent,
            free=arena.free.total, dirty=arena.dirty.total + arena.scrubbing.total,
            held=arena.held, wanted=arena.excess,
        )
    for found in ledger.ranges.values():
        holder = ledger.clients[found.owner]
        reply.leases.add(
            lease=found.lease, generation=found.generation, arena=found.arena,
            holder=holder.name, pid=holder.identity[0], held=found.held.total,
            wanted=found.wanted, age_ms=int((now - found.since) * 1000),
            deadline_ms=0 if found.deadline is None else int((found.deadline - now) * 1000),
            quarantined=holder.expired,
        )
    return reply
