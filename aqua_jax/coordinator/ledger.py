"""Who lends what to whom: a pure state machine without I/O.

Every method either does what it says or raises a typed error and changes nothing. What others must
be told gathers as events (`take_events`); which arenas' entries have changed, as ids
(`take_changed`). Whoever drives the ledger writes those down before it tells anybody of a grant,
so that a ledger restarted from what is written never grants the same bytes twice.

The life of a lent byte: free (zeroed) -> held by one range -> dirty -> scrubbing -> free. Wanted
back by its producer, it leaves from wherever it is, but from a holder's hands only when

- the holder acknowledges: gives it back, leaves, or claims less than it held, or
- the holder's process has exited.

A holder whose term has passed is quarantined: it can't be asked, so others are asked for its part
too, but its bytes stay where they are. A stopped process may wake up in the middle of a copy, and
no generation can fence that copy.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from aqua_jax.coordinator import choice
from aqua_jax.coordinator.intervals import Intervals
from aqua_jax.coordinator.records import (
    MOST,
    MOST_PIECES,
    MOST_RANGES,
    PAGE,
    Arena,
    ArenaTerms,
    Client,
    Kill,
    Lease,
    Lost,
    Range,
    Refused,
    Revoke,
    Scrub,
    Span,
    label,
    round_up,
    whole,
)
from aqua_jax.coordinator.recovery import Recovery
from aqua_jax.errors import LedgerError


class Ledger(Recovery):
    """Clients, what they lend and what they borrow; `Books` says what it is made with."""

    # Clients.

    def join(
        self, key: int, *, name: str = "", domain: str = "", identity: tuple[int, int] = (0, 0)
    ) -> Client:
        """A client connects, for the first time or again.

        Args:
          key: the client's own, chosen at random by whoever drives the ledger.
          name: told to people; `quotas` may name it.
          domain: where it runs; see `ArenaTerms`.
          identity: process id and start time.

        Raises:
          LedgerError: the key is another process's, or something can't be.
        """
        whole("key", key, 1, 2**64 - 1)
        label("name", name)
        label("domain", domain)
        client = self.clients.get(key)
        if client is None:
            client = Client(key, name, domain, identity, self._clock() + self.term_s)
            self.clients[key] = client
        elif client.identity != identity:
            raise LedgerError("key", "that of another process", "one's own")
        client.name, client.domain, client.connected = name, domain, True
        self.renew(key)
        return client

    def renew(self, key: int) -> None:
        """A sign of life: the client's term starts anew, and quarantine ends."""
        client = self._client(key)
        client.expires = self._clock() + self.term_s
        if client.expired:
            client.expired = False
            # What was asked of others because this one couldn't be asked is asked of it again.
            self._settle_all()
            for found in self._of(key):
                if found.wanted:
                    self._events.append(
                        Revoke(key, found.generation, found.keep, found.deadline)
                    )

    def disconnected(self, key: int) -> None:
        """The connection has ended; the process may live. Its term runs on."""
        self._client(key).connected = False

    def remove(self, key: int) -> None:
        """The process has exited, or says that it has let go of everything, borrowed and lent.

        What it held is free (once zeroed); what it lent is lost to its holders.
        """
        self._client(key)
        for found in self._of(key):
            self._release(found, list(found.held))
        for arena in [a for a in self.arenas.values() if a.producer == key]:
            self._drop(arena)
        for claimed in [pair for pair in self._claims if pair[0] == key]:
            del self._claims[claimed]
        del self.clients[key]
        self._settle_all()

    # Producers.

    def register(self, key: int, terms: ArenaTerms, lent: Iterable[Span]) -> Arena:
        """A producer lends parts of a new arena, which are zeroed before anybody gets them.

        Args:
          key: the producer's.
          terms: what it says of the arena.
          lent: [start, end) in whole pages.

        Raises:
          LedgerError: unknown client, or ranges that can't be.
        """
        self._client(key)
        dirty = self._spans("lent", terms, lent)
        return self._add(self._next(), key, terms, dirty)

    def lend(self, key: int, arena: int, start: int, end: int) -> None:
        """A producer lends [start, end) as well; its limit rises by as much.

        Raises:
          LedgerError: not its arena, no whole pages of it, or lent already.
        """
        found = self._own(key, arena)
        (span,) = self._spans("lent", found.terms, [(start, end)])
        for lent in (found.free, found.dirty, found.scrubbing, *self._held(found)):
            if any(a < span[1] and span[0] < b for a, b in lent):
                raise LedgerError("start", start, "bytes that aren't lent already")
        found.dirty.add(*span)
        found.limit += end - start
        self._settle(found)

    def reclaim(self, key: int, arena: int, limit: int, deadline_s: float) -> int:
        """A producer wants to lend at most `limit` bytes: the rest comes back as events.

        What nobody holds comes at once (after scrubbing if the terms say so). Holders are asked for
        the rest, the newest leases of the lowest priority first, until the deadline and after it.
        Saying the same again changes nothing; a higher limit takes the wish back.

        Args:
          key: the producer's.
          arena: its id.
          limit: bytes, rounded up to whole pages.
          deadline_s: seconds its borrowers have; at most `drain_s` count.

        Returns:
          Bytes still to come.

        Raises:
          LedgerError: not its arena, or numbers that can't be.
        """
        found = self._own(key, arena)
        whole("limit", limit)
        if not 0 <= deadline_s < MOST:  # not a number neither
            raise LedgerError("deadline_s", deadline_s, "seconds, at least 0")
        limit = round_up(limit)
        if limit < found.limit:
            found.deadline = self._clock() + min(deadline_s, self.drain_s)
        found.limit = min(limit, found.lent)
        self._settle(found)
        return found.excess

    def resize(self, key: int, arena: int, limit: int) -> None:
        """As `reclaim`, but only takes what nobody holds.

        Raises:
          LedgerError: more than `limit` is held, or as `reclaim`.
        """
        held = self._own(key, arena).held
        if round_up(whole("limit", limit)) < held:
            raise LedgerError("limit", limit, f"at least {held}, which is held")
        self.reclaim(key, arena, limit, 0)

    def unregister(self, key: int, arena: int, *, abandon: bool = False) -> None:
        """A producer takes an arena away of which it has got back everything.

        Args:
          key: the producer's.
          arena: its id.
          abandon: take it away all the same; whoever holds a part has lost it.

        Raises:
          LedgerError: not its arena, or something is still lent: `reclaim` it first.
        """
        found = self._own(key, arena)
        if found.lent and not abandon:
            raise LedgerError("arena", arena, f"one that has come back; {found.lent} bytes haven't")
        self._drop(found)

    # Consumers.

    def borrow(
        self, key: int, size: int, *, unit: int = PAGE, pieces: int = 1, minimum: int | None = None,
        prefer: Sequence[str] = (), priority: int = 0, kinds: Sequence[str] = (),
        avoid: Collection[int] = (),
    ) -> Lease | Refused:
        """A consumer asks for memory.

        Args:
          key: the consumer's.
          size: bytes, rounded up to whole units.
          unit: bytes that must be in one piece.
          pieces: ranges at most, in one or several arenas.
          minimum: take less if there is less, but not less than this; None: all or nothing.
          prefer: kinds of memory, best first.
          priority: the higher, the later it is wanted back.
          kinds: of devices' memory that it can map; others of these it is never granted.
          avoid: arenas that it couldn't map.

        Raises:
          LedgerError: unknown client, or numbers that can't be.
        """
        client = self._client(key)
        whole("bytes", size, 1)
        whole("unit", unit, 1)
        whole("pieces", pieces, 1, MOST_PIECES)
        whole("priority", priority, -1000, 1000)
        least = whole("minimum", size if minimum is None else minimum, 1, size)
        for field, named in (("prefer", prefer), ("kinds", kinds)):
            for kind in named:
                label(field, kind, 32)
        quota = self._quotas.get(client.name, self._quota)
        mine = self._of(key)
        pieces = min(pieces, MOST_RANGES - len(mine))
        # Pieces whose units aren't whole pages are rounded up.
        room = quota - sum(found.held.total for found in mine)
        room -= pieces * (PAGE - 1) if unit % PAGE else 0
        units = min(-(-size // unit), max(0, room) // unit) if pieces > 0 else 0
        possible = [
            arena for arena in self._lending(key) if arena.id not in avoid
            and (not arena.terms.on_device or arena.terms.kind in kinds)
        ]
        arenas = choice.in_order(possible, client.domain, prefer)
        plan: list[choice.Piece] = []
        if units * unit >= least:
            plan = choice.choose(arenas, units, unit, pieces)
        if sum(piece[2] for piece in plan) * unit < least:
            return Refused(
                "quota" if units * unit < least else "room",
                sum(arena.free.total for arena in arenas),
                max((arena.free.longest for arena in arenas), default=0),
                units * unit >= least and any(a.dirty.total or a.scrubbing.total for a in arenas)
                and sum(a.lent - a.held for a in arenas) >= least,
            )
        lease = self._next()
        ranges = []
        for arena, start, count in plan:
            length = round_up(count * unit)
            arena.free.remove(start, start + length)
            ranges.append(Range(
                self._next(), lease, key, arena.id, start, length,
                Intervals([(start, start + length)]), length, priority, self._clock(),
            ))
            self._hold(arena, ranges[-1])
        return Lease(lease, tuple(ranges))

    def give_back(self, key: int, generation: int, start: int, end: int) -> None:
        """A consumer gives back [start, end) of the arena, which one of its ranges holds.

        Raises:
          StaleHandleError: the range has ended.
          LedgerError: it is somebody else's or never was, or doesn't hold all of that.
        """
        self._client(key)
        whole("start", start)
        whole("end", end)
        if self._waits(key, generation, (start, end)):
            return
        found = self._range(key, generation)
        if start % PAGE or end % PAGE or not found.held.contains(start, end):
            raise LedgerError("start", start, f"whole pages that are held, not up to {end}")
        self._release(found, [(start, end)])
        self._settle(self.arenas[found.arena])

    def give_up(self, key: int, generation: int) -> None:
        """A consumer gives back all that a range still holds.

        Raises:
          StaleHandleError: the range has ended.
          LedgerError: it is somebody else's or never was.
        """
        self._client(key)
        if self._waits(key, generation, None):
            return
        found = self._range(key, generation)
        self._release(found, list(found.held))
        self._settle(self.arenas[found.arena])

    def free(self, key: int, lease: int) -> None:
        """A consumer gives a whole lease back.

        Raises:
          StaleHandleError: all of it has ended.
          LedgerError: it is somebody else's or never was.
        """
        self._client(key)
        whole("lease", lease, 0, 2**64 - 1)
        found = [r for r in self._of(key) if r.lease == lease]
        if not found:
            self._missing("lease", lease, {r.lease for r in self.ranges.values()})
        for piece in found:
            self._release(piece, list(piece.held))
        for number in {piece.arena for piece in found}:
            self._settle(self.arenas[number])

    # Time.

    def tick(self) -> None:
        """Notes terms and deadlines that have passed."""
        now = self._ticked = self._clock()
        for client in list(self.clients.values()):
            if client.expired or now < client.expires:
                continue
            client.expired = True
            lends = any(a.producer == client.key for a in self.arenas.values())
            if not client.connected and not lends and not self._of(client.key):
                self.remove(client.key)
        if self._claims and now >= self._rebuilding_until:
            self._events += [Lost(*pair) for pair in self._claims]
            self._claims.clear()
        self._settle_all()
        if self._forced:
            for arena in self.arenas.values():
                self._force(arena, now)

    def _force(self, arena: Arena, now: float) -> None:
        """Ends those who keep what is wanted: the quarantined first, as few as are enough."""
        if arena.deadline is None or now < arena.deadline:
            return
        newest_first = list(reversed(arena.ranges.values()))
        silent = [r.owner for r in newest_first if self.clients[r.owner].expired]
        late = [r.owner for r in newest_first if r.wanted]
        if now < arena.deadline + self.term_s:
            late = []
        missing = arena.excess - arena.dirty.total - arena.scrubbing.total
        for key in dict.fromkeys(silent + late):
            if missing <= 0:
                return
            missing -= sum(r.held.total for r in newest_first if r.owner == key)
            if not self.clients[key].killed:
                self.clients[key].killed = True
                self._events.append(Kill(key))

    def stalled(self, seconds: float) -> None:
        """Whoever drives the ledger has slept so long, and could hear nobody: no term ran on."""
        for client in self.clients.values():
            client.expires += seconds
        for arena in self.arenas.values():
            if arena.deadline is not None:
                arena.deadline += seconds
        for found in self.ranges.values():
            if found.deadline is not None:
                found.deadline += seconds
        self._rebuilding_until += seconds

    def next_tick(self) -> float | None:
        """When `tick` has something to do, by the ledger's clock; None: nothing foreseen."""
        times = [c.expires for c in self.clients.values() if not c.expired]
        if self._claims:
            times.append(self._rebuilding_until)
        if self._forced:
            for arena in self.arenas.values():
                if arena.deadline is not None:
                    times += [arena.deadline, arena.deadline + self.term_s]
        return min((t for t in times if t > self._ticked), default=None)

    # Zeroing.

    def next_dirty(self, most: int) -> tuple[int, int, int] | None:
        """(arena, start, end) of up to `most` bytes to zero next; then `scrubbed` is called.

        Memory that goes back to its producer unscrubbed never comes here.
        """
        for arena in self.arenas.values():
            if arena.terms.on_device:
                continue
            taken = arena.dirty.take_some(most)
            if taken is not None:
                arena.scrubbing.add(*taken)
                return (arena.id, *taken)
        return None

    def dirty_on_device(self, most: int) -> list[Scrub]:
        """What lenders of devices' memory are to zero next, up to `most` bytes of each arena.

        One range of an arena at a time, and only of lenders that are there; then `scrubbed_by` is
        called, or `scrub_again` when the lender comes back and may not have heard.
        """
        found = []
        for arena in self.arenas.values():
            if not arena.terms.on_device or arena.scrubbing.total:
                continue
            if not self.clients[arena.producer].connected:
                continue
            taken = arena.dirty.take_some(most)
            if taken is not None:
                arena.scrubbing.add(*taken)
                arena.scrub = self._next()
                found.append(Scrub(arena.producer, arena.id, *taken, arena.scrub))
        return found

    def scrubbed_by(self, key: int, arena: int, number: int) -> None:
        """A lender has zeroed what it was asked to under `number`.

        Raises:
          LedgerError: not its arena, or that isn't what it was asked last.
        """
        found = self._own(key, arena)
        if not found.scrubbing.total or number != found.scrub:
            raise LedgerError("number", number, "that of what is to be zeroed now")
        found.scrub = 0
        for start, end in found.scrubbing:
            self.scrubbed(arena, start, end)

    def scrub_again(self, arena: int) -> None:
        """A lender has connected again: what it was asked to zero, it is asked once more."""
        found = self._arena(arena)
        if found.terms.on_device:
            found.scrub = 0
            for start, end in found.scrubbing:
                found.scrubbing.remove(start, end)
                found.dirty.add(start, end)

    def scrubbed(self, arena: int, start: int, end: int) -> None:
        """A range of `next_dirty` is zero now. Nothing happens if the arena is gone."""
        found = self.arenas.get(arena)
        if found is not None:
            found.scrubbing.remove(start, end)
            found.free.add(start, end)
            self._settle(found)
