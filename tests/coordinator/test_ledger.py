"""The ledger against a model that knows every page, through any history, restarts included."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from aqua_jax.coordinator.records import MOST, PAGE, ArenaTerms, Lease, Refused
from aqua_jax.errors import LedgerError, StaleHandleError
from tests.coordinator.model import PAGES, Lent, World, pages, spans
from tests.scale import scaled

KEYS = st.integers(1, 4)
BIG = st.sampled_from([-1, 0, 1, PAGE, 2**63, 2**64, MOST, True, 1.5, None, "1"])


class LedgerMachine(RuleBasedStateMachine):
    """Clients come, lend, borrow, stop, wake up, die; the ledger is killed and starts again."""

    def __init__(self):
        super().__init__()
        self.world = World(term_s=10.0, drain_s=5.0, quota=12 * PAGE, forced=True)
        self.scrubbing = []

    @initialize(lenders=st.integers(0, 3), scrub=st.booleans())
    def some_are_there(self, lenders, scrub):
        for key in range(1, 5):
            self.connects(key)
        for key in range(1, lenders + 1):
            self.registers(key, set(range(PAGES)), scrub, "host", "n0")
        self.zeroes_everything()

    def _alive(self, key):
        process = self.world.processes.get(key)
        return process is not None and process.connected

    def _silent(self, key):
        """Whether the ledger knows a client that can say nothing now."""
        return key in self.world.ledger.clients and not self._alive(key)

    def _refuses(self, *errors):
        return pytest.raises(errors or (LedgerError, StaleHandleError))

    @rule(key=KEYS)
    def connects(self, key):
        world = self.world
        if key in world.ledger.clients and key not in world.processes:
            return  # its process is gone and the ledger doesn't know yet
        if key not in world.processes:
            world.born(key)
        if not world.processes[key].connected:
            world.come_back(key)

    @rule(key=KEYS)
    def disconnects(self, key):
        if self._alive(key):
            self.world.processes[key].connected = False
            self.world.ledger.disconnected(key)

    @rule(key=KEYS, seen=st.booleans())
    def dies(self, key, seen):
        if key in self.world.processes:
            self.world.dies(key)
            if not seen and key in self.world.ledger.clients:
                self.world.ledger.disconnected(key)
                return
        if key in self.world.ledger.clients and key not in self.world.processes:
            self.world.ledger.remove(key)
            with self._refuses(LedgerError):
                self.world.ledger.remove(key)

    @rule(key=KEYS)
    def leaves(self, key):
        if self._alive(key):
            self.world.dies(key)
            self.world.ledger.remove(key)

    @rule(seconds=st.sampled_from([1, 4, 9, 11]), awake=st.sets(KEYS))
    def time_passes(self, seconds, awake):
        self.world.now += seconds
        for key in awake:
            if self._alive(key):
                self.world.ledger.renew(key)
        self.world.ledger.tick()
        now = self.world.now
        for key, client in self.world.ledger.clients.items():
            assert client.expired == (client.expires <= now), key
        assert (self.world.ledger.next_tick() or now + 1) > now

    @rule(key=KEYS, lent=st.sets(st.integers(0, PAGES - 1)), scrub=st.booleans(),
          kind=st.sampled_from(["host", "cuda"]), domain=st.sampled_from(["", "n0", "n0/g1"]))
    def registers(self, key, lent, scrub, kind, domain):
        if not self._alive(key) or len(self.world.ledger.arenas) > 3:
            return
        terms = ArenaTerms(PAGES * PAGE, scrub=scrub, kind=kind, domain=domain)
        arena = self.world.ledger.register(key, terms, spans(lent))
        self.world.processes[key].lent[arena.id] = Lent(terms, set(lent))
        for page in range(PAGES):
            self.world.content[arena.id, page] = key

    @rule(key=KEYS, data=st.data(), start=st.integers(0, PAGES), count=st.integers(1, 3))
    def lends_more(self, key, data, start, count):
        if self._silent(key):
            return
        arena = data.draw(st.sampled_from([0, *self.world.ledger.arenas]))
        mine = self.world.processes[key].lent.get(arena) if self._alive(key) else None
        more = set(range(start, start + count))
        span = start * PAGE, (start + count) * PAGE
        if mine is None or start + count > PAGES or more & mine.pages:
            with self._refuses(LedgerError):
                self.world.ledger.lend(key, arena, *span)
            return
        for page in more:
            self.world.content[arena, page] = key
        mine.pages |= more
        self.world.ledger.lend(key, arena, *span)

    @rule(key=KEYS, data=st.data(), limit=st.integers(0, PAGES), odd=st.integers(0, PAGE - 1),
          own=st.integers(0, 4), revoke=st.booleans())
    def wants_back(self, key, data, limit, odd, own, revoke):
        ledger = self.world.ledger
        arena = data.draw(st.sampled_from([0, *ledger.arenas]))
        if own and arena:
            key = ledger.arenas[arena].producer
        if self._silent(key):
            return
        size = max(0, limit * PAGE - odd)
        mine = self._alive(key) and arena in self.world.processes[key].lent
        if not mine:
            with self._refuses(LedgerError):
                ledger.reclaim(key, arena, size, 1.0)
        elif revoke:
            left = ledger.reclaim(key, arena, size, 3.0)
            assert left == max(0, ledger.arenas[arena].lent - limit * PAGE)
            deadline = ledger.arenas[arena].deadline
            self.world.now += 0.5
            assert ledger.reclaim(key, arena, size, 3.0) == left
            assert ledger.arenas[arena].deadline == deadline
        elif limit * PAGE < ledger.arenas[arena].held:
            with self._refuses(LedgerError):
                ledger.resize(key, arena, size)
        else:
            ledger.resize(key, arena, size)
            assert not any(r.wanted for r in ledger.arenas[arena].ranges.values() if not r.disowned)

    @rule(key=KEYS, data=st.data(), abandon=st.sampled_from([False, False, True]))
    def unregisters(self, key, data, abandon):
        ledger = self.world.ledger
        arena = data.draw(st.sampled_from([0, *ledger.arenas]))
        if self._silent(key):
            return
        mine = self._alive(key) and arena in self.world.processes[key].lent
        if not mine or (ledger.arenas[arena].lent and not abandon):
            with self._refuses(LedgerError):
                ledger.unregister(key, arena, abandon=abandon)
            return
        ledger.unregister(key, arena, abandon=abandon)
        del self.world.processes[key].lent[arena]

    @rule(key=KEYS, size=st.integers(1, 6 * PAGE), unit=st.sampled_from([PAGE, 2 * PAGE, 1000]),
          pieces=st.integers(1, 3), part=st.integers(1, 3), priority=st.integers(0, 2),
          prefer=st.sampled_from([(), ("cuda",), ("host", "cuda")]),
          kinds=st.sampled_from([(), ("cuda",), ("cuda",)]), avoid=st.sets(st.integers(0, 3)),
          heard=st.sampled_from([True, True, True, False]))
    def borrows(self, key, size, unit, pieces, part, priority, prefer, kinds, avoid, heard):
        world = self.world
        minimum = -(-size // part)
        if not self._alive(key):
            if key not in world.ledger.clients:
                with self._refuses(LedgerError):
                    world.ledger.borrow(key, size)
            return
        world.ledger.renew(key)
        world.settle()
        there = list(world.ledger.arenas)
        unreached = {there[index] for index in avoid if index < len(there)}
        free = {
            a.id: pages(a.free) for a in world.ledger.arenas.values()
            if a.producer != key and a.lent <= a.limit and a.id not in unreached
            and (a.terms.kind == "host" or kinds)
            and world.processes.get(a.producer) and world.processes[a.producer].connected
            and not world.ledger.clients[a.producer].expired
        }
        held = sum(r.held.total for r in world.ledger.ranges.values() if r.owner == key)
        answer = world.ledger.borrow(
            key, size, unit=unit, pieces=pieces, minimum=minimum, prefer=prefer, priority=priority,
            kinds=kinds, avoid=unreached,
        )
        if isinstance(answer, Refused):
            assert answer.free == sum(map(len, free.values())) * PAGE
            if answer.reason == "room" and unit == PAGE:
                runs = sorted(
                    (b - a for found in free.values() for a, b in spans(found)), reverse=True
                )
                assert sum(runs[:pieces]) < minimum, "there was room"
            elif answer.reason == "quota":
                assert held + minimum + pieces * PAGE + unit > 12 * PAGE
            return
        assert isinstance(answer, Lease) and 1 <= len(answer.ranges) <= pieces
        assert held + answer.size <= 12 * PAGE
        assert sum(r.size // unit for r in answer.ranges) * unit >= minimum
        assert answer.size < size + unit + pieces * PAGE
        for found in answer.ranges:
            mine = pages([(found.offset, found.offset + found.size)])
            assert mine <= free[found.arena], "not free, or not to be had"
        if pieces == 1 and answer.size >= size:
            self._nearest(answer.ranges[0], free, prefer)
        world.settle()  # before anybody is told
        if heard:
            world.granted(key, answer)
        else:
            world.processes[key].connected = False
            world.ledger.disconnected(key)

    def _nearest(self, found, free, prefer):
        """No better arena had room in one piece."""
        def order(number):
            terms = self.world.ledger.arenas[number].terms
            rank = prefer.index(terms.kind) if terms.kind in prefer else len(prefer)
            far = len([part for part in terms.domain.split("/") if part])
            return rank, far, -len(free[number]), number

        for number, there in free.items():
            if order(number) < order(found.arena):
                assert all(b - a < found.size for a, b in spans(there)), "a better one had room"

    @rule(data=st.data(), some=st.booleans())
    def gives_back(self, data, some):
        have = [key for key, process in self.world.processes.items() if process.mapped]
        if not have:
            return
        key = data.draw(st.sampled_from(have))
        process = self.world.processes[key]
        generation = data.draw(st.sampled_from(sorted(process.mapped)))
        mapped = process.mapped[generation]
        start, end = data.draw(st.sampled_from(spans(mapped.pages)))
        if some and end - start > PAGE:
            start += PAGE
        gone = pages([(start, end)])
        mapped.pages -= gone
        if not mapped.pages:
            del process.mapped[generation]
        if not process.connected:
            return
        waits = (key, generation) in self.world.ledger._claims
        if mapped.arena not in self.world.ledger.arenas and not waits:
            with self._refuses():
                self.world.ledger.give_back(key, generation, start, end)
            return
        self.world.ledger.give_back(key, generation, start, end)
        with self._refuses():  # twice
            self.world.ledger.give_back(key, generation, start, end)

    @rule(key=KEYS)
    def obeys(self, key):
        """Gives back exactly what was asked for, of one range."""
        process = self.world.processes.get(key)
        if process is None or not process.connected:
            return
        for generation, mapped in list(process.mapped.items()):
            extra = len(mapped.pages) * PAGE - (MOST if mapped.keep is None else mapped.keep)
            while extra > 0 and mapped.pages and not mapped.lost:
                page = max(mapped.pages)
                mapped.pages.discard(page)
                extra -= PAGE
                self.world.ledger.give_back(key, generation, page * PAGE, (page + 1) * PAGE)
            if not mapped.pages:
                del process.mapped[generation]

    @rule(key=KEYS, data=st.data())
    def frees_a_lease(self, key, data):
        ledger, process = self.world.ledger, self.world.processes.get(key)
        leases = sorted({r.lease for r in ledger.ranges.values()})
        lease = data.draw(st.sampled_from([0, 1, *leases]))
        theirs = [r for r in ledger.ranges.values() if r.lease == lease and r.owner == key]
        if not theirs or not self._alive(key):
            if not theirs:
                with self._refuses():
                    ledger.free(key, lease)
            return
        for found in theirs:
            process.mapped.pop(found.generation, None)
        ledger.free(key, lease)
        with self._refuses():
            ledger.free(key, lease)

    @rule(key=KEYS, generation=st.integers(0, 40), start=st.integers(-1, PAGES),
          count=st.integers(-1, 3), odd=st.sampled_from([0, 0, 100]))
    def wild_give_back(self, key, generation, start, count, odd):
        """Anything but what it holds is refused and changes nothing."""
        ledger = self.world.ledger
        found = ledger.ranges.get(generation)
        span = start * PAGE + odd, (start + count) * PAGE
        if found is not None and found.owner == key and found.held.contains(*span) and not odd:
            return
        before = self._state()
        with self._refuses():
            ledger.give_back(key, generation, *span)
        assert self._state() == before

    @rule(key=KEYS, value=BIG, other=BIG)
    def nonsense(self, key, value, other):
        ledger = self.world.ledger
        before = self._state()
        for call in (
            lambda: ledger.give_back(key, value, 0, PAGE), lambda: ledger.give_up(key, value),
            lambda: ledger.free(key, value), lambda: ledger.reclaim(key, value, 0, 0),
            lambda: ledger.lend(key, 2**70, value, other), lambda: ledger.renew(2**65),
            lambda: ledger.borrow(key, -5), lambda: ledger.borrow(key, 2**63),
            lambda: ledger.borrow(key, PAGE, unit=-1), lambda: ledger.borrow(key, 1, pieces=2**40),
            lambda: ledger.join(0), lambda: ledger.join(2**64), lambda: ArenaTerms(-PAGE),
            lambda: ArenaTerms(PAGE + 1), lambda: ArenaTerms(PAGE, name="a\n"),
            lambda: ledger.register(key, ArenaTerms(PAGE), [(0, 2**63)]),
            lambda: ledger.register(key, ArenaTerms(PAGE), [(0, PAGE), (0, PAGE)]),
            lambda: ledger.join(key, identity=(9, 9)) if key in ledger.clients else ledger.join(-1),
        ):
            if value in (1,) and type(value) is int:
                return
            with self._refuses():
                call()
        assert self._state() == before

    def _state(self):
        ledger = self.world.ledger
        return repr((ledger.clients, ledger.arenas, ledger.ranges, ledger._number, ledger._claims,
                     [(list(a.free), list(a.dirty), list(a.scrubbing), *map(list, ledger._held(a)))
                      for a in ledger.arenas.values()])).replace(" at 0x", "")

    @rule(most=st.integers(1, PAGES))
    def starts_zeroing(self, most):
        taken = self.world.ledger.next_dirty(most * PAGE)
        arenas = self.world.ledger.arenas
        dirty = any(a.dirty.total for a in arenas.values() if a.terms.kind == "host")
        assert taken is not None or not dirty
        assert taken is None or arenas[taken[0]].terms.kind == "host", "the host can't reach it"
        if taken is not None:
            self.scrubbing.append(taken)

    @precondition(lambda self: self.scrubbing)
    @rule()
    def ends_zeroing(self):
        arena, start, end = self.scrubbing.pop(0)
        for page in pages([(start, end)]):
            self.world.content.pop((arena, page), None)
        self.world.ledger.scrubbed(arena, start, end)

    @rule(most=st.integers(1, PAGES))
    def lenders_are_asked_to_zero(self, most):
        self.world.ask_to_zero(most * PAGE)

    @precondition(lambda self: self.world.asked)
    @rule(data=st.data(), key=KEYS, off=st.sampled_from([0, -1, 1]))
    def a_lender_says_that_it_has_zeroed(self, data, key, off):
        """Only who was asked, under the number of what it was asked last, and once."""
        world = self.world
        arena = data.draw(st.sampled_from(sorted(world.asked)))
        scrub = world.asked[arena]
        if (key, off) != (scrub.client, 0):
            before = self._state()
            with self._refuses(LedgerError):
                world.ledger.scrubbed_by(key, arena, scrub.number + off)
            assert self._state() == before
        if arena in world.can_zero():
            world.zeroed(arena)
            with self._refuses(LedgerError):
                world.ledger.scrubbed_by(scrub.client, arena, scrub.number)

    @rule()
    def zeroes_everything(self):
        while self.scrubbing:
            self.ends_zeroing()
        taken = self.world.ledger.next_dirty(PAGES * PAGE)
        while taken is not None:
            self.scrubbing.append(taken)
            self.ends_zeroing()
            taken = self.world.ledger.next_dirty(PAGES * PAGE)
        self.world.ask_to_zero(PAGES * PAGE)
        while able := self.world.can_zero():
            for arena in able:
                self.world.zeroed(arena)
            self.world.ask_to_zero(PAGES * PAGE)

    @rule(back=st.permutations([1, 2, 3, 4]), count=st.integers(0, 4))
    def restarts(self, back, count):
        """What was being zeroed is dirty again; some clients come back at once, others later."""
        self.scrubbing.clear()
        self.world.restart()
        for key in back[:count]:
            if key in self.world.processes:
                self.world.come_back(key)

    @invariant()
    def the_world_is_in_order(self):
        self.world.settle()
        for key in self.world.killed:  # by the server, which sees it exit
            if key in self.world.processes:
                self.world.dies(key)
            if key in self.world.ledger.clients:
                self.world.ledger.remove(key)
        self.world.killed.clear()
        self.world.settle()
        self.world.check()

    def teardown(self):
        """Two terms after the last death no byte is held, and none is dirty for ever."""
        world = self.world
        for key in [*world.processes]:
            if world.processes[key].connected:
                world.dies(key)
        for key in [*world.ledger.clients]:
            if key not in world.processes:
                world.ledger.remove(key)
        world.now += 2 * world.ledger.term_s
        world.ledger.tick()
        held = {r.owner for r in world.ledger.ranges.values()}
        assert held <= {key for key, process in world.processes.items()}
        for key in [*world.ledger.clients]:
            world.ledger.remove(key)
        assert not world.ledger.arenas and not world.ledger.ranges and not world.ledger.clients


LedgerMachine.TestCase.settings = settings(
    max_examples=scaled(100), stateful_step_count=50, deadline=None
)
TestLedgerMachine = LedgerMachine.TestCase
