"""The ledger's state, and the changes that everything else is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NoReturn

from aqua_jax.coordinator.intervals import Intervals
from aqua_jax.coordinator.records import (
    MOST,
    PAGE,
    Arena,
    ArenaTerms,
    Claim,
    Client,
    Entry,
    Event,
    Lost,
    Range,
    Returned,
    Revoke,
    Span,
    whole,
)
from aqua_jax.errors import LedgerError, StaleHandleError, StoreError


class Books:
    """The state of all arenas, clients and ranges.

    Attributes:
      term_s: seconds for which a client counts as alive after a sign of life.
      drain_s: most seconds that a consumer is given when memory is wanted back.
      clients: by key.
      arenas: by id.
      ranges: by generation, oldest first.
    """

    def __init__(
        self, clock: Callable[[], float], *, term_s: float = 10.0, drain_s: float = 10.0,
        quota: int = MOST, quotas: dict[str, int] | None = None, forced: bool = False,
        first: int = 1,
    ) -> None:
        """
        Args:
          clock: seconds; never goes back.
          term_s: see the class.
          drain_s: see the class.
          quota: bytes one consumer may hold.
          quotas: the same for consumers of certain names.
          forced: end processes that keep wanted memory beyond term and drain limit.
          first: arenas, leases and generations are numbered from here; larger than any number that
            an earlier ledger has given out.

        For a term after its start the ledger waits for clients of an earlier one.
        """
        self._clock, self.term_s, self.drain_s = clock, term_s, drain_s
        self._quota, self._quotas, self._forced = quota, dict(quotas or {}), forced
        self._number = first
        self._first = first
        self.clients: dict[int, Client] = {}
        self.arenas: dict[int, Arena] = {}
        self.ranges: dict[int, Range] = {}
        self._events: list[Event] = []
        self._changed: set[int] = set()
        # Claims on arenas whose producers haven't come back yet, and how long those may take.
        self._claims: dict[tuple[int, int], Claim] = {}
        self._rebuilding_until = clock() + term_s
        self._ticked = clock()

    # What the driver takes away.

    def take_events(self) -> list[Event]:
        """What must be told to clients, in order; each event once."""
        events, self._events = self._events, []
        return events

    def take_changed(self) -> set[int]:
        """Arenas whose `entries` have changed since the last call."""
        changed, self._changed = self._changed, set()
        return changed

    def entries(self, arena: int) -> list[Entry]:
        """What must be remembered of an arena beyond this ledger's life."""
        return [
            Entry(
                r.generation, r.lease, r.owner, self.clients[r.owner].name,
                self.clients[r.owner].identity, r.offset, r.size, tuple(r.held), r.priority,
                r.since,
            )
            for r in self._arena(arena).ranges.values()
        ]

    # For the classes made of this one.

    def _next(self) -> int:
        self._number += 1
        return self._number - 1

    def _client(self, key: int) -> Client:
        client = self.clients.get(key)
        if client is None:
            raise LedgerError("key", "unknown", "that of a client")
        return client

    def _arena(self, number: int) -> Arena:
        arena = self.arenas.get(whole("arena", number, 0, 2**64 - 1))
        if arena is None:
            raise LedgerError("arena", number, "the id of a registered arena")
        return arena

    def _own(self, key: int, number: int) -> Arena:
        self._client(key)
        arena = self._arena(number)
        if arena.producer != key:
            raise LedgerError("arena", number, "the id of an arena of one's own")
        return arena

    def _of(self, key: int) -> list[Range]:
        return [found for found in self.ranges.values() if found.owner == key]

    def _range(self, key: int, generation: int) -> Range:
        whole("generation", generation, 0, 2**64 - 1)
        found = self.ranges.get(generation)
        if found is None or found.owner != key:
            self._missing("generation", generation, self.ranges.keys())
        return found

    def _missing(self, field: str, value: int, there: Iterable[int]) -> NoReturn:
        if 0 < value < self._number and value not in set(there):
            raise StaleHandleError(f"{field} {value} has ended")
        raise LedgerError(field, value, "one's own")

    @staticmethod
    def _spans(field: str, terms: ArenaTerms, spans: Iterable[Span]) -> Intervals:
        """`spans` as a set, if they are whole pages of the arena, each once."""
        found = Intervals()
        for start, end in spans:
            whole(field, start, 0, terms.size)
            whole(field, end, 0, terms.size)
            try:
                found.add(start, end)
            except StoreError as error:
                raise LedgerError(field, (start, end), f"parts of the arena ({error})") from error
            if start % PAGE or end % PAGE:
                raise LedgerError(field, (start, end), f"multiples of {PAGE}")
        return found

    @staticmethod
    def _held(arena: Arena) -> list[Intervals]:
        return [found.held for found in arena.ranges.values()]

    def _lending(self, key: int) -> list[Arena]:
        """Arenas of others that can be borrowed from."""
        return [
            arena for arena in self.arenas.values()
            if arena.producer != key and not arena.excess
            and (producer := self.clients[arena.producer]).connected and not producer.expired
        ]

    def _add(self, number: int, key: int, terms: ArenaTerms, dirty: Intervals) -> Arena:
        arena = Arena(number, key, terms, dirty.total, Intervals(), dirty, Intervals(), {})
        self.arenas[arena.id] = arena
        self._changed.add(arena.id)
        return arena

    def _hold(self, arena: Arena, found: Range) -> None:
        self.ranges[found.generation] = found
        arena.ranges[found.generation] = found
        self._changed.add(arena.id)

    def _release(self, found: Range, spans: Iterable[Span]) -> None:
        arena = self.arenas[found.arena]
        for start, end in spans:
            found.held.remove(start, end)
            arena.dirty.add(start, end)
        if not found.held.total:
            del self.ranges[found.generation], arena.ranges[found.generation]
        self._changed.add(arena.id)

    def _drop(self, arena: Arena) -> None:
        for found in list(arena.ranges.values()):
            del self.ranges[found.generation]
            self._events.append(Lost(found.owner, found.generation))
        del self.arenas[arena.id]
        self._changed.discard(arena.id)

    def _settle_all(self) -> None:
        for arena in list(self.arenas.values()):
            self._settle(arena)

    def _settle(self, arena: Arena) -> None:
        """Returns what the limit forbids to lend and nobody holds; asks holders for the rest."""
        sources = [arena.free] if arena.terms.scrub else [arena.dirty, arena.free]
        for source in sources:
            while arena.excess and (taken := source.take_some(arena.excess)) is not None:
                self._events.append(Returned(arena.producer, arena.id, *taken))
        if not arena.excess:
            arena.deadline = None
        need = max(0, arena.excess - arena.dirty.total - arena.scrubbing.total)
        order = sorted(arena.ranges.values(), key=lambda r: (r.priority, -r.generation))
        for found in order:
            if self.clients[found.owner].expired:
                continue
            take = min(need, found.held.total)
            need -= take
            if found.disowned:
                continue
            keep = found.held.total - take if take else found.size
            deadline = arena.deadline if take else None
            if keep != found.keep or deadline != found.deadline:
                found.keep, found.deadline = keep, deadline
                self._events.append(Revoke(found.owner, found.generation, keep, deadline))
