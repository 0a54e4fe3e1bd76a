"""Lending inside one process: the same calls, the same rules, no coordinator."""

import pytest

from aqua_jax.errors import LedgerError, StaleHandleError
from aqua_jax.memory.arena import PAGE, Arena
from aqua_jax.memory.local import LocalClient
from aqua_jax.memory.stores import PeerStore
from tests.memory.leftovers import leftovers

MIB = 1 << 20


@pytest.fixture
def client():
    """A client that lends itself 4 MiB, and what it leaves behind: nothing."""
    with leftovers() as left:
        with Arena.create(4 * MIB) as arena, LocalClient() as found:
            found.lend(arena)
            yield found
        assert not found.loans and not found.wanted
    assert not left()


def lending_of(client):
    return next(iter(client._lendings.values()))


def test_borrowed_memory_is_zero_and_is_the_arena(client):
    for byte in (b"a", b"b"):
        (loan,) = client.borrow(4 * MIB)
        assert loan.read(0, loan.size) == bytes(loan.size)
        loan.write(0, byte * loan.size)
        assert lending_of(client).arena.read(0, 1) == byte
        assert client.borrow(PAGE) is None
        loan.close()
        with pytest.raises(StaleHandleError):
            loan.read(0, 1)
    assert client.borrow(5 * MIB) is None
    (loan,) = client.borrow(5 * MIB, minimum=PAGE)
    assert loan.size == 4 * MIB
    with pytest.raises(LedgerError):
        client.borrow(-1)


def test_what_is_wanted_back_is_a_flag_at_once(client):
    lending = lending_of(client)
    (loan,) = client.borrow(3 * MIB)
    assert not client.wanted
    assert lending.reclaim(2 * MIB, 5.0) == MIB
    assert client.wanted and loan.wanted_back == MIB and loan.deadline is not None
    assert lending.take_returned() == [(3 * MIB, 4 * MIB)]
    loan.give_back(2 * MIB, MIB)
    assert not client.wanted and lending.lent == 2 * MIB
    assert lending.take_returned() == [(2 * MIB, 3 * MIB)]
    with pytest.raises(LedgerError):
        lending.resize(MIB)
    lending.arena.write(2 * MIB, b"own")
    lending.lend(2 * MIB, 2 * MIB)
    (more,) = client.borrow(2 * MIB)
    assert more.read(0, 3) == bytes(3)
    lending.reclaim(0, 5.0)
    assert client.wanted and loan.wanted_back + more.wanted_back == 4 * MIB
    lending.reclaim(4 * MIB, 5.0)
    assert not client.wanted


def test_scrubbed_memory_comes_back_zeroed(client):
    with Arena.create(MIB) as arena:
        with pytest.raises(LedgerError, match="kind: got 'cuda'"):
            client.lend(arena, kind="cuda")
        lending = client.lend(arena, kind="near", scrub=True)
        (loan,) = client.borrow(MIB, prefer=("near",))
        assert loan.terms.kind == "near"
        loan.write(0, b"secret")
        lending.reclaim(0, 5.0)
        loan.close()
        client.borrow(PAGE)  # zeroes what is to be zeroed
        assert lending.lent == 0 and arena.read(0, 6) == bytes(6)
        lending.close()


def test_what_is_taken_away_is_lost(client):
    lending = lending_of(client)
    (loan,) = client.borrow(MIB)
    lending.close(drain_s=0.0)
    assert not loan.alive and not client.wanted
    with pytest.raises(StaleHandleError):
        lending.reclaim(0)
    assert client.borrow(PAGE) is None
    loan.close()


def test_a_peer_store_over_it(client):
    (loan,) = client.borrow(MIB)
    with PeerStore(loan, 64 << 10, 16) as store:
        slots = store.allocate(16)
        for slot in slots:
            store.fill(slot, 16)
        lending_of(client).reclaim(MIB // 2, 5.0)
        assert client.wanted and store.wanted_slots == 8
        assert len(store.give_back(8)) == 8
        assert not client.wanted and store.holds(slots[0])
