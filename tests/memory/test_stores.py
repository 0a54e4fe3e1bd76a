"""Stores against a model: handles, references, giving back from the end, losing everything."""

import random
import time
import timeit

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from aqua_jax.errors import ConfigError, StaleHandleError, StoreError
from aqua_jax.memory import arena, growing
from aqua_jax.memory.arena import PAGE, Arena
from aqua_jax.memory.lease import Lease
from aqua_jax.memory.slots import Store
from aqua_jax.memory.split import SplitStore
from aqua_jax.memory.stores import HostStore, PeerStore
from tests.memory.leftovers import leftovers
from tests.scale import scaled

SLOT = 3000  # not a whole number of pages: the hard case


def lease_of(size, told=None):
    """A lease without a lender: what it would be told goes to the list `told`."""
    told = [] if told is None else told
    return Lease(Arena.anonymous(size), 1, lambda lease, a, n: told.append((a, n)))


class StoreMachine(RuleBasedStateMachine):
    """A peer store whose lender now and then wants some back, changes its mind, or dies."""

    slots = Bundle("slots")
    sizes = ((SLOT, 6 * PAGE),)  # of a lender's part of a slot, of its lease

    def make(self):
        """The store over `self.leases`."""
        return PeerStore(self.leases[0], SLOT, 16)

    def __init__(self):
        super().__init__()
        self.told: list[tuple[int, int]] = []
        self.leases = [lease_of(size, self.told) for _, size in self.sizes]
        self.store = self.make()
        self.live: dict = {}  # slot -> [references, tokens]
        self.kept = self.capacity = 6 * PAGE // SLOT
        self.content: dict = {}
        self.seen: set = set()

    def teardown(self):
        self.store.close()
        assert sum(size for _, size in self.told) == sum(size for _, size in self.sizes)

    @property
    def alive(self):
        return all(lease.alive for lease in self.leases)

    def spans(self, slot):
        """The lease and the range in it of each piece of a slot, in order."""
        for address, size in self.store.spans(slot):
            for lease in self.leases:
                if 0 <= address - lease.address < lease.size:
                    yield lease, address - lease.address, size

    def _free(self):
        if not self.alive:
            return 0
        used = {slot.id for slot in self.live}
        return sum(index not in used for index in range(self.kept))

    @rule(target=slots, count=st.integers(0, 4))
    def allocate(self, count):
        expected = count <= self._free()
        found = self.store.allocate(count)
        assert (found is not None) == expected
        for slot in found or ():
            assert slot not in self.seen and slot.id not in {s.id for s in self.live}
            assert slot.id < self.kept
            self.seen.add(slot)
            self.live[slot] = [1, 0]
        return tuple(found or ())

    @rule(handles=slots, tokens=st.integers(-1, 17))
    def fill(self, handles, tokens):
        for slot in handles:
            if slot not in self.live:
                with pytest.raises(StaleHandleError):
                    self.store.fill(slot, tokens)
            elif not 0 <= tokens <= 16:
                with pytest.raises(StoreError):
                    self.store.fill(slot, tokens)
            else:
                self.store.fill(slot, tokens)
                self.live[slot][1] = tokens
                if self.alive:
                    data = random.Random(len(self.seen)).randbytes(SLOT)
                    rest = data
                    for lease, at, size in self.spans(slot):
                        lease.write(at, rest[:size])
                        rest = rest[size:]
                    assert not rest
                    self.content[slot] = data

    @rule(handles=slots)
    def retain(self, handles):
        for slot in handles:
            if slot in self.live:
                self.store.retain(slot)
                self.live[slot][0] += 1
            else:
                with pytest.raises(StaleHandleError):
                    self.store.retain(slot)

    @rule(handles=slots)
    def free(self, handles):
        for slot in handles:
            if slot in self.live:
                self.store.free(slot)
                self.live[slot][0] -= 1
                if not self.live[slot][0]:
                    del self.live[slot]
            else:
                with pytest.raises(StaleHandleError):
                    self.store.free(slot)

    @rule(count=st.integers(0, 3))
    def retire(self, count):
        count = min(count, self.capacity)
        self.kept = min(self.kept, self.capacity - count)
        expected = [slot for slot in self.live if slot.id >= self.kept]
        assert list(self.store.retire(count)) == sorted(expected, reverse=True)

    @rule()
    def restore(self):
        self.store.restore()
        self.kept = self.capacity

    @rule(wanted=st.integers(1, 2 * PAGE), obey=st.booleans(), who=st.integers(0, 9))
    def wanted_back(self, wanted, obey, who):
        lease = self.leases[who % len(self.leases)]
        before = lease.held.total
        lease.keep = max(0, before - wanted)
        count = self.store.wanted_slots
        if self.alive and before:
            assert count > 0
        if not obey or not self.alive:
            lease.keep = lease.size
            return
        self._give_back(count)
        assert lease.wanted_back == 0 and self.store.wanted_slots == 0
        # Never more than a slot and a page of the system beyond what was asked.
        assert before - lease.held.total < wanted + SLOT + PAGE
        lease.keep = lease.size

    @rule(count=st.integers(0, 2))
    def give_back_unasked(self, count):
        self._give_back(min(count, self.capacity))

    def _give_back(self, count):
        self.capacity -= count
        self.kept = min(self.kept, self.capacity)
        expected = sorted((s for s in self.live if s.id >= self.capacity), reverse=True)
        assert list(self.store.give_back(count)) == expected
        for slot in expected:
            del self.live[slot]

    @rule(really=st.integers(0, 9), who=st.integers(0, 9))
    def lender_dies(self, really, who):
        if really == 0:
            self.leases[who % len(self.leases)].alive = False

    @invariant()
    def same_as_model(self):
        store = self.store
        assert store.lost == (not self.alive)
        assert (store.capacity, store.in_use) == (self.capacity, len(self.live))
        assert store.free_slots == self._free()
        assert store.live() == sorted(self.live)
        counters = store.counters
        if not store.lost:
            assert counters.allocated == counters.freed + counters.dropped + store.in_use
        assert counters.peak >= store.in_use
        for (part, _), lease in zip(self.sizes, self.leases, strict=True):
            needed = -(-self.capacity * part // PAGE) * PAGE
            assert list(lease.held) == ([(0, needed)] if needed else [])
        for slot in self.seen:
            live = slot in self.live
            readable = live and not store.lost and self.live[slot][1] > 0
            assert store.holds(slot) == readable
            if not live or store.lost:
                with pytest.raises(StaleHandleError):
                    store.spans(slot)
            else:
                assert store.valid_tokens(slot) == self.live[slot][1]
                assert store.offset(slot) == slot.id * SLOT
                if readable:
                    held = [lease.read(at, size) for lease, at, size in self.spans(slot)]
                    assert b"".join(held) == self.content[slot]


class SplitMachine(StoreMachine):
    """The same with slots that are parts of two lenders': the first one's of two devices."""

    sizes = ((2 * SLOT // 3, 5 * PAGE), (SLOT // 3, 2 * PAGE))  # room for 10 and for 8

    def make(self):
        parts = [PeerStore(lease, part, 16)
                 for (part, _), lease in zip(self.sizes, self.leases, strict=True)]
        return SplitStore(parts, (0, 1, 0), 16)


StoreMachine.TestCase.settings = settings(
    max_examples=scaled(50), stateful_step_count=40, deadline=None
)
TestStoreMachine = StoreMachine.TestCase
SplitMachine.TestCase.settings = StoreMachine.TestCase.settings
TestSplitMachine = SplitMachine.TestCase


def test_devices_have_their_parts_of_a_split_slot_where_they_are_said_to_be():
    leases = [lease_of(5 * PAGE), lease_of(2 * PAGE)]
    parts = [PeerStore(leases[0], 2000, 16), PeerStore(leases[1], 1000, 16)]
    with SplitStore(parts, (0, 1, 0), 16) as store:
        assert (store.capacity, store.slot_bytes, store.device_bytes) == (8, 3000, 1000)
        assert store.homes == ((0, 0), (1, 0), (0, 1))
        slot = store.allocate(4)[3]
        first, second = (lease.address for lease in leases)
        assert store.spans(slot) == [
            (first + 6000, 1000), (second + 3000, 1000), (first + 7000, 1000)
        ]
        with pytest.raises(StoreError, match="2 memories"):
            store.base  # noqa: B018
    assert all(lease.closed for lease in leases)


def test_uneven_parts_are_refused():
    parts = [PeerStore(lease_of(4 * PAGE), size, 16) for size in (2000, 1000)]
    for homes in [(0, 1), (0, 0, 1, 1), (0, 0)]:
        with pytest.raises(StoreError, match="even shares"):
            SplitStore(parts, homes, 16)


def test_host_store():
    with leftovers() as left, HostStore(10 * SLOT + 5, SLOT, 16) as store:
        as_protocol: Store = store
        assert as_protocol.capacity == 10 and not as_protocol.lost
        assert as_protocol.wanted_slots == 0
        slots = store.allocate(10)
        assert [store.address(s) - store.arena.address for s in slots] == [
            index * SLOT for index in range(10)
        ]
        assert store.allocate(1) is None and store.counters.refused == 1
        store.fill(slots[3], 7)
        assert store.valid_tokens(slots[3]) == 7 and store.holds(slots[3])
        assert not store.holds(slots[4])
        for slot in slots:
            store.free(slot)
        with pytest.raises(StaleHandleError):
            store.free(slots[0])
        assert (store.in_use, store.counters.peak) == (0, 10)
        (again,) = store.allocate(1)
        store.close()
        store.close()
        assert store.allocate(1) is None and not store.holds(again)
        with pytest.raises(StaleHandleError):
            store.address(again)
    assert not left()


def test_handles_of_nobody_are_stale():
    with HostStore(4 * PAGE, PAGE, 16) as store:
        (slot,) = store.allocate(1)
        for bad in (slot._replace(id=-1), slot._replace(id=4), slot._replace(generation=0),
                    slot._replace(generation=2)):
            assert not store.holds(bad)
            with pytest.raises(StaleHandleError):
                store.check(bad)


@pytest.mark.parametrize(
    ("slot_bytes", "page_tokens", "field"),
    [(0, 16, "slot_bytes"), (5 * PAGE, 16, "slot_bytes"), (PAGE, 0, "page_tokens")],
)
def test_impossible_slots_are_refused(slot_bytes, page_tokens, field):
    with pytest.raises(ConfigError) as caught:
        HostStore(4 * PAGE, slot_bytes, page_tokens)
    assert caught.value.field == field
    lease = lease_of(4 * PAGE)
    with lease, pytest.raises(ConfigError):
        PeerStore(lease, slot_bytes, page_tokens)


def test_looking_whether_something_is_wanted_is_quick():
    with PeerStore(lease_of(64 * PAGE), PAGE, 16) as store:
        times = timeit.repeat(lambda: (store.lost, store.wanted_slots), number=1000, repeat=7)
        assert min(times) / 1000 < 10e-6


def test_a_growing_store_takes_memory_as_it_fills(monkeypatch) -> None:
    monkeypatch.setattr(growing, "GROWTH", 4 * PAGE)
    with leftovers() as left, HostStore(64 * PAGE, PAGE, 16, grows=True) as store:
        assert store.capacity == 64
        assert store.allocate(64) is None, "only the first step is there"
        taken = []
        until = time.monotonic() + 60
        while len(taken) < 64:
            assert time.monotonic() < until
            slots = store.allocate(min(2, 64 - len(taken)))
            if slots is None:
                time.sleep(0.001)
                continue
            for slot in slots:
                store.arena.write(store.offset(slot), slot.id.to_bytes(8, "little"))
            taken += slots
        assert sorted(slot.id for slot in taken) == list(range(64))
        for slot in taken:
            assert store.arena.read(store.offset(slot), 8) == slot.id.to_bytes(8, "little")
    assert not left()


def test_a_growing_store_ends_where_the_system_has_no_more(monkeypatch, caplog) -> None:
    monkeypatch.setattr(growing, "GROWTH", 4 * PAGE)
    store = HostStore(64 * PAGE, PAGE, 16, grows=True)
    monkeypatch.setattr(arena, "available_memory", lambda: 0)
    taken = store.allocate(4)
    until = time.monotonic() + 60
    while store.capacity == 64:
        assert time.monotonic() < until
        assert store.allocate(1) is None
        time.sleep(0.001)
    assert store.capacity == 4 and taken is not None and "no more than" in caplog.text
    store.free(taken[0])
    assert store.allocate(1) is not None
    store.close()
