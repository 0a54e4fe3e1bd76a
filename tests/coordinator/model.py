"""What the ledger should do, page by page, and what its clients believe meanwhile.

Independent of the ledger's code: every page has an owner and a content, every client a view of what
it has mapped or lends. The machine in `test_ledger.py` drives both.
"""

from __future__ import annotations

import dataclasses

from aqua_jax.coordinator import records
from aqua_jax.coordinator.ledger import Ledger
from aqua_jax.coordinator.records import PAGE, Claim

PAGES = 8  # of each arena


def spans(pages):
    """Page numbers as [start, end) in bytes."""
    found: list[list[int]] = []
    for page in sorted(pages):
        if found and found[-1][1] == page * PAGE:
            found[-1][1] += PAGE
        else:
            found.append([page * PAGE, (page + 1) * PAGE])
    return tuple((a, b) for a, b in found)


def pages(ranges):
    """[start, end) in bytes as a set of page numbers."""
    return {page for start, end in ranges for page in range(start // PAGE, end // PAGE)}


@dataclasses.dataclass
class Mapped:
    """A range as the process that borrowed it sees it."""

    arena: int
    pages: set
    lost: bool = False
    keep: int | None = None


@dataclasses.dataclass
class Lent:
    """An arena as the process that owns it sees it."""

    terms: records.ArenaTerms
    pages: set  # not its own now


@dataclasses.dataclass
class Process:
    """A client's process."""

    identity: tuple
    connected: bool = False
    mapped: dict = dataclasses.field(default_factory=dict)  # generation -> Mapped
    lent: dict = dataclasses.field(default_factory=dict)  # arena -> Lent


class World:
    """Processes, memory, and the messages between them and a ledger."""

    def __init__(self, **options):
        self.now = 0.0
        self.options = options
        self.ledger = Ledger(lambda: self.now, first=1, **options)
        self.processes: dict[int, Process] = {}
        self.content: dict = {}  # (arena, page) -> who wrote last; absent: zero
        self.journals: dict = {}  # arena -> entries
        self.killed: list = []
        self.asked: dict = {}  # arena of a device's memory -> what its lender is to zero now
        self.births = 0

    def born(self, key):
        """A new process that takes the place of a dead one."""
        self.births += 1
        self.processes[key] = Process((key, self.births))

    def settle(self):
        """What the server does after every step: first writes down, then tells."""
        for arena in self.ledger.take_changed():
            self.journals[arena] = self.ledger.entries(arena)
        for event in self.ledger.take_events():
            process = self.processes.get(event.client)
            if isinstance(event, records.Kill):
                self.killed.append(event.client)
                continue
            if process is None or not process.connected:
                continue  # nobody hears it
            if isinstance(event, records.Returned):
                gone = pages([(event.start, event.end)])
                assert gone <= process.lent[event.arena].pages, "returned what wasn't lent"
                process.lent[event.arena].pages -= gone
                if process.lent[event.arena].terms.scrub:
                    assert not any((event.arena, page) in self.content for page in gone)
            elif isinstance(event, records.Lost):
                if event.generation in process.mapped:
                    process.mapped[event.generation].lost = True
            elif event.generation in process.mapped:
                process.mapped[event.generation].keep = event.keep
            elif event.keep == 0:
                self.ledger.give_up(event.client, event.generation)  # what is that?
                self.settle()

    def granted(self, key, lease):
        """A consumer maps what it was granted, finds zeros, and writes."""
        for found in lease.ranges:
            mine = set(range(found.offset // PAGE, (found.offset + found.size) // PAGE))
            for page in mine:
                assert (found.arena, page) not in self.content, "somebody else's bytes"
                self.content[found.arena, page] = key
            self.processes[key].mapped[found.generation] = Mapped(found.arena, mine)

    def dies(self, key):
        """A process is gone with all it had mapped; arenas it lent stay with those who map them."""
        del self.processes[key]

    def claims(self, key):
        """All that a process has mapped."""
        return [
            Claim(generation, mapped.arena, spans(mapped.pages))
            for generation, mapped in self.processes[key].mapped.items()
        ]

    def join(self, key):
        """A process connects; returns whether the ledger took it."""
        process = self.processes[key]
        self.ledger.join(key, name=f"c{key}", identity=process.identity)
        process.connected = True

    def come_back(self, key):
        """All that a client says when it has connected again."""
        process = self.processes[key]
        self.join(key)
        for arena, lent in process.lent.items():
            if arena in self.ledger.arenas:
                self.ledger.resume(key, arena, spans(lent.pages))
                self.ledger.scrub_again(arena)
                self.asked.pop(arena, None)
            else:
                self.ledger.restore(
                    key, arena, lent.terms, spans(lent.pages), self.journals[arena]
                )
            self.settle()
        self.ledger.claim(key, self.claims(key))
        self.settle()

    def restart(self):
        """The coordinator is killed and another one starts."""
        first = 1 + max([self.ledger._number, *self.ledger.ranges, *self.ledger.arenas])
        self.ledger = Ledger(lambda: self.now, first=first, **self.options)
        self.asked.clear()
        for process in self.processes.values():
            process.connected = False

    def ask_to_zero(self, most):
        """Lenders of devices' memory that are there are asked, for one range of an arena each."""
        ledger = self.ledger
        due = {
            a.id for a in ledger.arenas.values()
            if a.terms.on_device and a.dirty.total and not a.scrubbing.total
            and ledger.clients[a.producer].connected
        }
        found = ledger.dirty_on_device(most)
        assert {scrub.arena for scrub in found} == due
        for scrub in found:
            arena = ledger.arenas[scrub.arena]
            assert scrub.client == arena.producer and 0 < scrub.end - scrub.start <= most
            assert list(arena.scrubbing) == [(scrub.start, scrub.end)]
            self.asked[scrub.arena] = scrub

    def zeroed(self, arena):
        """A lender has zeroed what it was asked to, and says so."""
        scrub = self.asked.pop(arena)
        for page in pages([(scrub.start, scrub.end)]):
            self.content.pop((arena, page), None)
        self.ledger.scrubbed_by(scrub.client, arena, scrub.number)

    def can_zero(self):
        """Arenas whose lenders have been asked to zero something, and can."""
        return [
            number for number, scrub in self.asked.items()
            if number in self.ledger.arenas and scrub.client in self.processes
            and self.processes[scrub.client].connected
        ]

    def check(self):
        """Nothing that anybody believes contradicts anything else."""
        ledger = self.ledger
        holders: dict = {}
        for key, process in self.processes.items():
            for generation, mapped in process.mapped.items():
                for page in mapped.pages:
                    assert (mapped.arena, page) not in holders, "two grants of one page"
                    holders[mapped.arena, page] = key, generation
        for process in self.processes.values():
            for number, lent in process.lent.items():
                for page in set(range(PAGES)) - lent.pages:
                    assert (number, page) not in holders, "the producer's own, and mapped"
        for arena in ledger.arenas.values():
            parts = [arena.free, arena.dirty, arena.scrubbing]
            parts += [found.held for found in arena.ranges.values()]
            everything = [page for part in parts for page in pages(part)]
            assert len(everything) == len(set(everything)), "a page in two states"
            assert arena.lent == len(everything) * PAGE
            if arena.producer in self.processes:
                assert set(everything) <= self.processes[arena.producer].lent[arena.id].pages
            for page in pages(arena.free):
                assert (arena.id, page) not in self.content, "free, and not zero"
            for page in [p for part in parts[:3] for p in pages(part)]:
                assert (arena.id, page) not in holders, "mapped, and not held"
            for generation, found in arena.ranges.items():
                assert ledger.ranges[generation] is found and found.held.total
            self._check_asked(arena)
        assert set(ledger.ranges) == {g for a in ledger.arenas.values() for g in a.ranges}

    def _check_asked(self, arena):
        """Exactly what is missing is asked for, of those who can be asked, the newest first."""
        spare = arena.free.total + arena.dirty.total + arena.scrubbing.total
        excess = max(0, spare + arena.held - arena.limit)
        # Nothing stays that could go back now.
        if excess:
            assert not arena.free.total
            assert arena.terms.scrub or not arena.dirty.total
        need = max(0, excess - spare)
        order = [
            found for found in arena.ranges.values()
            if not self.ledger.clients[found.owner].expired
        ]
        asked = [found for found in order if not found.disowned]
        wanted = sum(found.wanted for found in asked)
        assert wanted <= need
        assert sum(found.wanted for found in order) >= min(need, sum(f.held.total for f in order))
        asked.sort(key=lambda found: (found.priority, -found.generation))
        full = [found.wanted == found.held.total for found in asked]
        assert full == sorted(full, reverse=True), "a later one asked before an earlier one"
        assert sum(0 < found.wanted < found.held.total for found in asked) <= 1
