"""The end of a lending with bytes still out: holders are asked, waited for, and told."""

from __future__ import annotations

import signal
import threading
import time

import pytest

from aqua_jax.memory.arena import Arena
from aqua_jax.memory.client import Client
from aqua_jax.memory.local import LocalClient
from tests.coordinator.running import coordinator
from tests.memory.lending import new_name, wait_for

MIB = 1 << 20


@pytest.fixture(scope="module")
def running():
    with coordinator(new_name(), "--term_s=5", "--metrics_port=0") as found:
        yield found


def obey(client: Client, stop: threading.Event) -> None:
    """Gives back what is wanted, some time later."""
    while not stop.is_set():
        time.sleep(0.02)
        for loan in client.loans:
            if loan.alive and (wanted := loan.wanted_back):
                loan.give_back(loan.held.total - wanted, wanted)


def test_holders_that_give_back_lose_nothing(running):
    stop = threading.Event()
    path = running.path
    with Arena.create(4 * MIB) as arena, Client(path) as owner, Client(path) as user:
        lending = owner.lend(arena, name="kind")
        (loan,) = user.borrow(3 * MIB)
        thread = threading.Thread(target=obey, args=(user, stop))
        thread.start()
        assert lending.close(drain_s=10.0) == 0
        assert loan.alive and loan.held.total == 0 and lending.close() == 0
        stop.set()
        thread.join()
        wait_for(lambda: not running.status().arenas, "the coordinator knows nothing of it")


def test_who_keeps_it_is_told_that_it_is_lost(running, caplog):
    path = running.path
    with Arena.create(4 * MIB) as arena, Client(path) as owner, Client(path) as user:
        lending = owner.lend(arena, name="unlucky")
        (loan,) = user.borrow(3 * MIB)
        started = time.monotonic()
        assert lending.close(drain_s=0.3) == 3 * MIB
        assert 0.3 <= time.monotonic() - started < 2.0
        assert f"{3 * MIB} bytes are still lent" in caplog.text
        wait_for(lambda: not loan.alive, "its holder hears of it")
        assert loan.wanted_back  # it had been asked before
        assert not running.status().arenas
        loan.close()


def test_a_coordinator_that_is_away_or_hangs_holds_nobody_up():
    with coordinator(new_name(), "--term_s=5", "--metrics_port=0") as running:
        with (
            Arena.create(MIB) as first, Arena.create(MIB) as second,
            Client(running.path) as owner, Client(running.path) as user,
        ):
            hung, away = owner.lend(first), owner.lend(second)
            assert user.borrow(2 * MIB, pieces=2)
            running.signal(signal.SIGSTOP)
            started = time.monotonic()
            assert hung.close(drain_s=0.2) == MIB
            assert time.monotonic() - started < 5.0
            running.kill()
            wait_for(lambda: not owner.connected)
            started = time.monotonic()
            assert away.close(drain_s=60.0) == MIB
            assert time.monotonic() - started < 5.0  # not a moment of its sixty seconds


def test_inside_one_process():
    with Arena.create(MIB) as arena, LocalClient() as client:
        lending = client.lend(arena)
        (loan,) = client.borrow(MIB // 2)
        assert lending.close(drain_s=0.05) == MIB // 2
        assert not loan.alive
