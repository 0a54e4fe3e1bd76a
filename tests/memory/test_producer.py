"""Extents lent through a real coordinator: what is taken back, from whom, and when."""

import ctypes
import signal
import time

import pytest

from aqua_jax.errors import CoordinatorError
from aqua_jax.memory.arena import PAGE
from aqua_jax.memory.client import Client
from aqua_jax.memory.lendable import LendableMemory
from aqua_jax.memory.producer import Producer
from tests.coordinator.running import coordinator
from tests.memory.leftovers import leftovers
from tests.memory.lending import new_name, wait_for

UNIT = 3 * PAGE


class Owner:
    """Three extents of two units, and what is known of them."""

    def __init__(self, path, **settings):
        self.memory = LendableMemory(3, 2 * UNIT)
        self.producer = Producer(path, self.memory.extents, name="owner", unit=UNIT, **settings)
        self.back = []

    def lend_all(self):
        for extent in range(3):
            self.producer.lend(extent)

    def has(self, *units):
        """Whether exactly these (extent, unit) have come back."""
        if self.producer.news:
            for extent, first, last in self.producer.take_returned():
                self.back += [(extent, unit) for unit in range(first, last)]
        assert len(self.back) == len(set(self.back))
        return sorted(self.back) == sorted(units)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.producer.close()
        self.memory.close()


EVERYTHING = [(extent, unit) for extent in range(3) for unit in range(2)]


@pytest.fixture
def path():
    """An address of this test alone."""
    return new_name()


def lent(running):
    """Bytes that are lent, borrowed or not."""
    return sum(row.held + row.free + row.dirty for row in running.status().arenas)


def test_free_extents_come_back_first_then_as_many_as_are_wanted(path):
    with leftovers() as left, coordinator(path) as running, Owner(path) as owner:
        with Client(path, name="borrower") as borrower:
            owner.lend_all()
            wait_for(lambda: lent(running) == owner.memory.size)
            (loan,) = borrower.borrow(2 * UNIT)
            (other,) = borrower.borrow(UNIT)
            held = {loan.arena, other.arena}
            assert len(held) == 2
            owner.producer.keep(2)
            wait_for(lambda: owner.producer.news)
            assert any(owner.has((e, 0), (e, 1)) for e in range(3))
            assert not borrower.wanted and loan.read(0, loan.size) == bytes(loan.size)
            owner.producer.keep(1)
            wait_for(lambda: borrower.wanted, "one of the two is asked for")
            assert bool(loan.wanted_back) != bool(other.wanted_back)
            owner.producer.keep(2)
            wait_for(lambda: not borrower.wanted, "the wish is taken back")
            owner.producer.keep(0)
            wait_for(lambda: loan.wanted_back == 2 * UNIT and other.wanted_back == UNIT)
            loan.give_back(UNIT + PAGE, UNIT - PAGE)
            loan.give_back(0, UNIT + PAGE)
            other.close()
            wait_for(lambda: owner.has(*EVERYTHING))
    wait_for(lambda: not left(), "connections end")


def test_a_unit_comes_back_when_all_of_it_has(path):
    with coordinator(path) as running, Owner(path) as owner:
        with Client(path) as borrower:
            owner.producer.lend(1)
            wait_for(lambda: lent(running) == 2 * UNIT)
            (loan,) = borrower.borrow(2 * UNIT)
            owner.producer.keep(0)
            wait_for(lambda: borrower.wanted)
            for start, size, units in (
                (2 * UNIT - PAGE, PAGE, []), (UNIT, PAGE, []),
                (UNIT + PAGE, PAGE, [(1, 1)]), (0, UNIT, [(1, 0), (1, 1)]),
            ):
                loan.give_back(start, size)
                wait_for(lambda left=start + size: running.held() == loan.held.total)
                wait_for(lambda units=units: owner.has(*units))


@pytest.mark.parametrize("unit", [UNIT, PAGE // 2, PAGE + PAGE // 2])
def test_what_is_back_of_an_extent_can_be_lent_again_unit_by_unit(path, unit):
    """Also where units aren't whole pages of the system; nothing is both lent and the owner's."""
    units = 12
    with (
        coordinator(path) as running, LendableMemory(1, units * unit) as memory,
        Client(path) as borrower,
    ):
        producer = Producer(path, memory.extents, unit=unit)
        ours: set[int] = set()

        def look():
            if producer.news:
                for _, first, last in producer.take_returned():
                    found = set(range(first, last))
                    assert found and not found & ours
                    ours.update(found)
            return ours

        try:
            producer.lend(0)
            wait_for(lambda: lent(running) == memory.size)
            (loan,) = borrower.borrow(memory.size)
            producer.keep(0)
            wait_for(lambda: borrower.wanted)
            half = memory.size // 2 // PAGE * PAGE
            loan.give_back(half, memory.size - half)
            wait_for(lambda: look() == set(range(-(-half // unit), units)))
            producer.keep(1)
            wait_for(lambda: not borrower.wanted, "the wish is taken back")
            # All but the last two are lent again.
            first = min(ours)
            again = set(range(first, units - 2))
            ours -= again
            producer.lend(0, first, units - 2)
            whole = range(-(-first * unit // PAGE) * PAGE, (units - 2) * unit // PAGE * PAGE)
            wait_for(lambda: lent(running) == half + len(whole))
            apart = {u for u in again if (u + 1) * unit <= whole.start or u * unit >= whole.stop}
            wait_for(lambda: look() >= apart)
            assert ours == apart | {units - 2, units - 1}
            (other,) = borrower.borrow(len(whole))
            other.write(0, b"x" * other.size)
            for index in (units - 2, units - 1):  # the owner's, to the last byte
                extent = memory.extents[0]
                assert ctypes.string_at(extent.address + index * unit, unit) == bytes(unit)
            producer.keep(0)
            wait_for(lambda: loan.wanted_back == half and other.wanted_back == other.size)
            other.close()
            loan.close()
            wait_for(lambda: look() == set(range(units)))
            assert producer.longest_s > 0.0
        finally:
            producer.close()


def test_a_coordinator_that_hangs_is_waited_for_once_however_much_is_wanted(path):
    patience = 1.5
    with coordinator(path, "--term_s=5") as running, Owner(path, timeout_s=patience) as owner:
        owner.lend_all()
        wait_for(lambda: lent(running) == owner.memory.size)
        running.signal(signal.SIGSTOP)
        try:
            began = time.monotonic()
            owner.producer.keep(1)
            wait_for(lambda: len(owner.producer._wanted) == 2, "asked for, whoever may hold it")
            assert time.monotonic() - began < 2 * patience
        finally:
            running.signal(signal.SIGCONT)
        wait_for(lambda: lent(running) == 2 * UNIT)


def test_without_a_coordinator_nothing_is_lost_and_later_all_comes_back(path):
    with pytest.raises(CoordinatorError), leftovers():
        Producer(path, [])
    with coordinator(path, "--term_s=3") as running, Owner(path, timeout_s=0.5) as owner:
        with Client(path) as borrower:
            owner.producer.lend(0)
            owner.producer.lend(1)
            wait_for(lambda: lent(running) == 4 * UNIT)
            (loan,) = borrower.borrow(2 * UNIT)
            running.kill()
            wait_for(lambda: not owner.producer.connected)
            owner.producer.lend(2)  # never lent before: it comes back at once
            wait_for(lambda: owner.has((2, 0), (2, 1)))
            owner.producer.keep(0)
            loan.close()
            running.start()
            wait_for(lambda: owner.has(*EVERYTHING), "what was wished is said again")
            assert owner.producer.lost == 0
            owner.producer.keep(3)
            owner.producer.lend(0)
            wait_for(lambda: lent(running) == 2 * UNIT)


def test_leaving_takes_back_what_is_free_and_does_not_wait_for_the_rest(path):
    with coordinator(path) as running, Client(path) as borrower:
        with Owner(path, deadline_s=0.2) as owner:
            owner.lend_all()
            wait_for(lambda: lent(running) == owner.memory.size)
            (loan,) = borrower.borrow(PAGE)
        wait_for(lambda: not loan.alive, "its borrower knows")
        loan.write(0, b"x")  # and does no harm
        wait_for(lambda: lent(running) == 0)


def test_leaving_does_not_wait_long_for_a_coordinator_that_hangs(path):
    with coordinator(path, "--term_s=3") as running:
        owner = Owner(path, deadline_s=0.3, timeout_s=0.3)
        owner.lend_all()
        wait_for(lambda: lent(running) == owner.memory.size)
        running.signal(signal.SIGSTOP)
        began = time.monotonic()
        owner.producer.close()
        # A question, the last words, and a wait for each; a slow machine.
        assert time.monotonic() - began < 5.0
        owner.memory.close()
