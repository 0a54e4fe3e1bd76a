"""How a ledger comes back from what others remember: producers' journals, consumers' claims."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from aqua_jax.coordinator.books import Books
from aqua_jax.coordinator.intervals import Intervals
from aqua_jax.coordinator.records import (
    Arena,
    ArenaTerms,
    Claim,
    Client,
    Entry,
    Lost,
    Range,
    Returned,
    Revoke,
    Span,
    whole,
)
from aqua_jax.errors import LedgerError, StoreError


class Recovery(Books):
    """What clients say when they come back: to the same ledger, or to one that was restarted."""

    # After a restart, or a broken connection.

    def restore(
        self, key: int, number: int, terms: ArenaTerms, lent: Iterable[Span],
        entries: Sequence[Entry],
    ) -> Arena:
        """A producer comes back with an arena of an earlier ledger, and what that wrote down.

        Holders that haven't come back count as clients that aren't connected. What they hold stays
        theirs until they claim less, or exit.

        Args:
          key: the producer's.
          number: the arena's id.
          terms: what the producer says of it.
          lent: what it hasn't got back.
          entries: what the earlier ledger wrote down.

        Raises:
          LedgerError: the arena is here already, or entries that can't be.
        """
        self._client(key)
        whole("arena", number, 1, self._first - 1)
        if number in self.arenas:
            raise LedgerError("arena", number, "one that isn't registered")
        dirty = self._spans("lent", terms, lent)
        rebuilt = [self._rebuilt(number, terms, entry, dirty) for entry in entries]
        if len({r.generation for r in rebuilt} | self.ranges.keys()) < len(rebuilt) + len(
            self.ranges
        ):
            raise LedgerError("entries", number, "generations that are nobody else's")
        arena = self._add(number, key, terms, dirty)
        arena.limit += sum(found.held.total for found in rebuilt)
        for entry, found in zip(entries, rebuilt, strict=True):
            if entry.owner not in self.clients:
                self.clients[entry.owner] = Client(
                    entry.owner, entry.owner_name, "", entry.identity,
                    self._clock() + self.term_s, connected=False,
                )
            self._hold(arena, found)
        for found in rebuilt:
            claim = self._claims.pop((found.owner, found.generation), None)
            if claim is not None:
                self._shrink(found, claim)
            elif self.clients[found.owner].connected:
                # It has told already what it holds, and this wasn't there, or has been given up.
                found.keep, found.disowned = 0, True
                self._events.append(Revoke(found.owner, found.generation, 0, self._clock()))
        for pair in [p for p, c in self._claims.items() if c.arena == number]:
            del self._claims[pair]
            self._events.append(Lost(*pair))
        return arena

    def resume(self, key: int, number: int, lent: Iterable[Span]) -> None:
        """A producer that has connected again says what it hasn't got back of an arena.

        What it was told was its own again, and didn't hear, it is told once more.

        Raises:
          LedgerError: not its arena, or it took what is lent.
        """
        arena = self._own(key, number)
        rest = self._spans("lent", arena.terms, lent)
        try:
            for part in (arena.free, arena.dirty, arena.scrubbing, *self._held(arena)):
                for start, end in part:
                    rest.remove(start, end)
        except StoreError as error:
            raise LedgerError("lent", list(lent), f"all that is lent ({error})") from error
        self._events += [Returned(key, number, start, end) for start, end in rest]

    def keep_only(self, key: int, arenas: Iterable[int]) -> None:
        """A producer that has connected again names all that it lends; it knows of no other arena.

        Others are those it was never told the ids of.
        """
        self._client(key)
        named = set(arenas)
        for arena in [a for a in self.arenas.values() if a.producer == key]:
            if arena.id not in named:
                self._drop(arena)

    def _rebuilt(
        self, number: int, terms: ArenaTerms, entry: Entry, dirty: Intervals
    ) -> Range:
        """The range of an entry, whose bytes leave `dirty`."""
        whole("offset", entry.offset)
        for field in ("generation", "lease"):
            whole(field, getattr(entry, field), 1, self._first - 1)
        owner = self.clients.get(entry.owner)
        if owner is not None and owner.identity != entry.identity:
            raise LedgerError("entries", "another process's key", "the owner's")
        try:
            held = self._spans("entries", terms, entry.held)
            for start, end in held:
                dirty.remove(start, end)
        except StoreError as error:
            raise LedgerError("entries", entry.held, f"lent bytes, each once ({error})") from error
        granted = Intervals([(entry.offset, entry.offset + whole("size", entry.size, 1))])
        if not held.total or not all(granted.contains(*span) for span in held):
            raise LedgerError("entries", entry.held, "bytes that were granted")
        return Range(
            entry.generation, entry.lease, entry.owner, number, entry.offset, entry.size, held,
            entry.size, entry.priority, entry.since,
        )

    def claim(self, key: int, claims: Sequence[Claim]) -> None:
        """A client that has connected again says all that it holds; the rest it has given up.

        Claims on arenas that aren't here wait for their producers, a term after the start at most.

        Raises:
          LedgerError: it claims what it was never granted.
        """
        client = self._client(key)
        told = {claim.generation: claim for claim in claims}
        if len(told) < len(claims):
            raise LedgerError("claims", len(claims), "each generation once")
        for claim in claims:
            self._checked(claim)
            found = self.ranges.get(claim.generation)
            if found is None:
                continue
            if found.owner != key or found.arena != claim.arena:
                raise LedgerError("generation", claim.generation, "that of a range of one's own")
            if not all(found.held.contains(*span) for span in claim.held):
                raise LedgerError("held", claim.held, f"what is held: {list(found.held)}")
        for found in self._of(key):
            if found.generation in told:
                self._shrink(found, told[found.generation])
            else:
                self._release(found, list(found.held))
        waiting = self._clock() < self._rebuilding_until
        for claim in claims:
            if claim.generation in self.ranges or not claim.held:
                continue
            if claim.arena not in self.arenas and waiting and claim.generation < self._first:
                self._claims[key, claim.generation] = claim
            else:
                self._events.append(Lost(client.key, claim.generation))
        self._settle_all()
        for found in self._of(key):
            if found.wanted:  # it may not have been told
                self._events.append(Revoke(key, found.generation, found.keep, found.deadline))

    def _waits(self, key: int, generation: int, span: Span | None) -> bool:
        """Whether a range is claimed whose producer hasn't come back: then the claim shrinks.

        Args:
          key: the owner's.
          generation: the range's.
          span: what it gives back; None: all.

        Raises:
          LedgerError: it hasn't claimed that.
        """
        claim = self._claims.get((key, whole("generation", generation, 0, 2**64 - 1)))
        if claim is None:
            return False
        held = self._checked(claim)
        try:
            for start, end in list(held) if span is None else [span]:
                held.remove(start, end)
        except StoreError as error:
            raise LedgerError("start", span, f"what was claimed ({error})") from error
        self._claims[key, generation] = dataclasses.replace(claim, held=tuple(held))
        return True

    @staticmethod
    def _checked(claim: Claim) -> Intervals:
        try:
            return Intervals(claim.held)
        except StoreError as error:
            raise LedgerError("held", claim.held, f"ranges that don't overlap ({error})") from error

    def _shrink(self, found: Range, claim: Claim) -> None:
        """Releases what the owner no longer claims."""
        gone = Intervals(found.held)
        for start, end in claim.held:
            if gone.contains(start, end):
                gone.remove(start, end)
        if gone.total:
            self._release(found, list(gone))

