"""Lending of devices' memory, but for the devices: who maps what, who zeroes it, who is left out.

A memfd stands for the descriptor of a GPU's memory, and mapping it for mapping that for a GPU: what
is tested here only passes descriptors on and keeps books.
"""

from __future__ import annotations

import ctypes
import logging
import threading
import time

import pytest

from aqua_jax.coordinator.records import PAGE
from aqua_jax.errors import ArenaError, LedgerError, LenderError, StaleHandleError, StoreError
from aqua_jax.memory.arena import Arena
from aqua_jax.memory.borrower import Borrower
from aqua_jax.memory.client import Client
from aqua_jax.memory.mapping import Mappings
from tests.coordinator.running import Raw, coordinator
from tests.memory.leftovers import leftovers
from tests.memory.lending import lending, new_name, wait_for

MIB = 1 << 20
GPUS = ("GPU-a", "GPU-b")


class Memory(Arena):
    """What a lender has on a device: it alone may zero it, and here it can be made to wait."""

    @classmethod
    def create(cls, size: int, name: str = "gpu", **options: bool) -> Memory:
        found = super().create(size, name, **options)
        found.scrubbed, found.go = [], threading.Event()
        found.go.set()
        return found

    def scrub(self, offset: int, size: int) -> None:
        assert self.go.wait(60)
        super().scrub(offset, size)
        self.scrubbed.append((offset, size))


class Mapper:
    """Maps for a device that reaches some others."""

    def __init__(self, *reached: str) -> None:
        self.reached = reached
        self.mapped: list[Arena] = []
        self.asked: list[str] = []

    def map(self, fd: int, size: int, device: str) -> Arena:
        self.asked.append(device)
        if device not in self.reached:
            raise ArenaError(f"this GPU doesn't reach {device}")
        self.mapped.append(Arena.adopt(fd, 0, size))
        return self.mapped[-1]

    @property
    def open(self) -> int:
        return sum(not one.closed for one in self.mapped)


def fill(loan, byte: int) -> None:
    """As a device would, by address."""
    ctypes.memset(loan.address, byte, loan.size)


def content(loan) -> bytes:
    return ctypes.string_at(loan.address, loan.size)


@pytest.fixture
def lender(running):
    """8 MiB of GPU-a; by the end all of it has come back, zeroed by its lender alone."""
    with Memory.create(8 * MIB) as memory, Client(running.path, name="lender") as client:
        memory.lending = client.lend(memory, kind="cuda", device="GPU-a", domain="numa0/bus1")
        yield memory
        memory.go.set()
        memory.lending.reclaim(0, 1.0)
        wait_for(lambda: memory.lending.lent == 0, "all of it comes back")


@pytest.fixture(scope="module")
def running():
    """One coordinator for tests that leave it as it was."""
    with coordinator(new_name(), "--term_s=5") as found:
        yield found


def test_only_who_can_map_it_gets_it(running, lender):
    with Client(running.path) as plain, Client(running.path, mappers={"rocm": Mapper()}) as other:
        assert plain.borrow(PAGE, timeout_s=20) is None and other.borrow(PAGE) is None
    with Client(running.path, mappers={"cuda": (mapper := Mapper("GPU-a"))}) as able:
        (loan,) = able.borrow(MIB)
        assert loan.kind == "cuda" and loan.terms.device == "GPU-a"
        assert mapper.asked == ["GPU-a"]
        (row,) = running.status().arenas
        assert (row.kind, row.domain, row.held) == ("cuda", "numa0/bus1", MIB)
        with pytest.raises(StoreError, match="cannot read"):
            loan.read(0, 1)
        with pytest.raises(StoreError, match="cannot write"):
            loan.write(0, b"x")


def test_it_is_mapped_once_and_unmapped_with_the_last_lease(running, lender):
    mapper = Mapper("GPU-a")
    wait_for(lambda: lender.scrubbed, "its lender has a thread for that")
    with leftovers() as left, Client(running.path, mappers={"cuda": mapper}) as client:
        one, two = client.borrow(MIB)[0], client.borrow(2 * MIB)[0]
        assert len(mapper.mapped) == mapper.open == 1
        assert one.address != two.address
        fill(one, 1), fill(two, 2)
        one.give_back(0, PAGE)
        one.close()
        assert mapper.open == 1 and content(two) == b"\2" * 2 * MIB
        with pytest.raises(StaleHandleError):
            one.give_back(PAGE, PAGE)
        two.close()
        assert mapper.open == 0
        (again,) = client.borrow(MIB)
        assert len(mapper.mapped) == 2 and content(again) == bytes(MIB)
        again.close()
        wait_for(lambda: running.held() == 0)
        client.close()
        # gRPC may take a socket for itself at any time.
        assert not [one for one in left() if one != "fd socket"]


def test_its_lender_zeroes_it_before_anybody_else_gets_it(running, lender):
    wait_for(lambda: lender.scrubbed, "new memory is zeroed too")
    with Client(running.path, mappers={"cuda": Mapper("GPU-a")}) as client:
        (loan,) = client.borrow(8 * MIB)
        fill(loan, 7)
        lender.go.clear()
        loan.close()
        wait_for(lambda: running.status().arenas[0].dirty == 8 * MIB)
        assert running.status().arenas[0].free == 0, "nothing is clean while its lender waits"
        begun, done = time.monotonic(), threading.Timer(0.2, lender.go.set)
        done.start()
        (loan,) = client.borrow(8 * MIB)
        assert time.monotonic() > begun + 0.1
        done.join()
        assert content(loan) == bytes(8 * MIB)


def test_a_lender_that_was_cut_off_zeroes_again_and_never_after_a_grant(tmp_path):
    """The coordinator is killed while memory is being zeroed, and comes back."""
    with coordinator(new_name(), "--term_s=2") as running, Memory.create(4 * MIB) as memory:
        with (
            Client(running.path, name="lender") as lender,
            Client(running.path, mappers={"cuda": Mapper("GPU-a")}) as client,
        ):
            lending = lender.lend(memory, kind="cuda", device="GPU-a")
            (loan,) = client.borrow(4 * MIB)
            fill(loan, 9)
            memory.go.clear()
            loan.close()
            wait_for(lambda: running.status().arenas[0].dirty == 4 * MIB)
            running.kill()
            wait_for(lambda: not lender.connected)
            memory.go.set()
            running.start()
            wait_for(lambda: lender.connected and client.connected, seconds=20)
            wait_for(lambda: [row for row in running.status().arenas if row.free], seconds=20)
            (loan,) = client.borrow(4 * MIB)
            assert content(loan) == bytes(4 * MIB)
            fill(loan, 3)
            before = list(memory.scrubbed)
            loan.give_back(0, PAGE)
            wait_for(lambda: len(memory.scrubbed) > len(before))
            assert memory.scrubbed[len(before):] == [(0, PAGE)]
            assert content(loan)[PAGE:] == b"\3" * (4 * MIB - PAGE)
            assert lending.alive
            loan.close()


def test_what_cannot_be_reached_is_left_to_others(running, lender, caplog):
    """A GPU without a way to the lender's: the host's memory is borrowed, and the log says why."""
    mapper = Mapper("GPU-b")
    with (
        Arena.create(4 * MIB) as host, Client(running.path, name="host") as second,
        Client(running.path, mappers={"cuda": mapper}) as client,
    ):
        second.lend(host)
        with caplog.at_level(logging.WARNING):
            (loan,) = client.borrow(MIB)
        assert (loan.kind, loan.lender) == ("host", "host")
        loan.write(0, b"here")
        (more,) = client.borrow(MIB)
        assert more.kind == "host" and mapper.asked == ["GPU-a"], "it isn't tried twice"
        assert caplog.text.count("this GPU doesn't reach GPU-a; pages go to the host's") == 1
        wait_for(lambda: running.status().arenas[0].held == 0)


def test_near_and_fast_memory_goes_first(running, lender):
    with Arena.create(4 * MIB) as host, Client(running.path, name="host") as second:
        second.lend(host)
        with Client(running.path, mappers={"cuda": Mapper("GPU-a")}) as client:
            kinds = [loan.kind for loan in client.borrow(10 * MIB, pieces=2, unit=MIB)]
            assert kinds == ["cuda", "host"]
        wait_for(lambda: running.held() == 0)


def test_memory_of_a_lender_that_died_is_lost_but_mapped():
    mapper = Mapper("GPU-a")
    with coordinator(new_name()) as running, Memory.create(MIB) as memory:
        lender = Client(running.path, name="lender")
        lender.lend(memory, kind="cuda", device="GPU-a")
        with Client(running.path, mappers={"cuda": mapper}) as client:
            (loan,) = client.borrow(MIB)
            fill(loan, 5)
            lender.close()
            wait_for(lambda: not loan.alive)
            assert content(loan) == b"\5" * MIB, "copies under way do no harm"
            assert mapper.open == 1
            loan.close()
            assert mapper.open == 0


def test_nobody_says_for_others_that_memory_is_zero(running, lender):
    with Raw(running.path) as stranger:
        arena = running.status().arenas[0].arena
        for number in (0, 1, 2**63):
            stranger.say(scrubbed={"arena": arena, "number": number})
            assert stranger.hear().error.field in ("arena", "number")
    wait_for(lambda: running.status().arenas[0].free == 8 * MIB)


def test_ranges_outside_an_arena_are_no_mapping():
    mappings = Mappings({"cuda": (mapper := Mapper("GPU-a"))})
    with Memory.create(MIB) as memory:
        for offset, size in ((-PAGE, PAGE), (0, 0), (PAGE, MIB)):
            with pytest.raises(ArenaError, match="are not in an arena"):
                mappings.part(1, memory.fd, MIB, offset, size, kind="cuda", device="GPU-a")
        assert not mapper.asked
        part = mappings.part(1, memory.fd, MIB, 0, PAGE, kind="cuda", device="GPU-a")
        with pytest.raises(ArenaError, match="was mapped with"):
            mappings.part(1, memory.fd, 2 * MIB, 0, PAGE, kind="cuda", device="GPU-a")
        part.close(), part.close()
        assert mapper.open == 0


def test_a_lender_at_a_socket():
    with lending(4 * MIB, arena=(memory := Memory.create(4 * MIB))) as running:
        memory.kind, memory.device = "cuda", "GPU-a"
        with pytest.raises(LenderError, match="lends memory of GPU-a, which this process can't"):
            Borrower(running.path)
        mapper = Mapper("GPU-a")
        with Borrower(running.path, mappers={"cuda": mapper}) as borrower:
            loans = [borrower.borrow(MIB), borrower.borrow(3 * MIB)]
            assert [loan.kind for loan in loans] == ["cuda"] * 2 and mapper.open == 1
            for loan in loans:
                fill(loan, 6)
                loan.close()
            assert mapper.open == 0
            again = borrower.borrow(4 * MIB)
            assert content(again) == bytes(4 * MIB), "its lender has zeroed it"
            again.close()
        with Borrower(running.path, mappers={"cuda": Mapper()}) as far:
            with pytest.raises(LenderError, match="doesn't reach GPU-a"):
                far.borrow(MIB)
            wait_for(lambda: running.lender.grants.held == 0, "it is given back")


def test_ledger_words_for_devices():
    from aqua_jax.coordinator.ledger import Ledger
    from aqua_jax.coordinator.records import ArenaTerms

    with pytest.raises(LedgerError, match="device"):
        ArenaTerms(PAGE, kind="cuda", device="a\n")
    ledger = Ledger(lambda: 0.0)
    ledger.join(1), ledger.join(2)
    arena = ledger.register(1, ArenaTerms(4 * PAGE, kind="cuda", device="x"), [(0, 4 * PAGE)]).id
    assert ledger.next_dirty(PAGE) is None, "the host can't zero it"
    (asked,) = ledger.dirty_on_device(3 * PAGE)
    assert (asked.client, asked.start, asked.end) == (1, PAGE, 4 * PAGE)
    assert ledger.dirty_on_device(PAGE) == [], "one after the other"
    for key, number in ((2, asked.number), (1, asked.number + 1), (1, 0)):
        with pytest.raises(LedgerError):
            ledger.scrubbed_by(key, arena, number)
    ledger.scrub_again(arena)
    with pytest.raises(LedgerError, match="number"):
        ledger.scrubbed_by(1, arena, asked.number)
    (second,) = ledger.dirty_on_device(4 * PAGE)
    assert second.number > asked.number and (second.start, second.end) == (0, 4 * PAGE)
    ledger.scrubbed_by(1, arena, second.number)
    assert ledger.arenas[arena].free.total == 4 * PAGE
    ledger.disconnected(1)
    assert ledger.dirty_on_device(PAGE) == []
