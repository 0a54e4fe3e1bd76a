"""A batch job lends through a coordinator what its batch leaves over."""

import os
import signal
import threading

import pytest

from aqua_jax.errors import ConfigError, LenderError, StaleHandleError
from aqua_jax.memory.arena import PAGE
from aqua_jax.memory.batch_lender import BatchLender
from aqua_jax.memory.client import Client
from tests.coordinator.running import coordinator
from tests.memory.leftovers import leftovers
from tests.memory.lending import new_name, wait_for

MIB = 1 << 20


@pytest.fixture(scope="module")
def running():
    """A coordinator."""
    with coordinator(new_name(), "--term_s=5") as found:
        yield found


def lent(running):
    return sum(row.lent for row in running.status().arenas)


def test_room_for_a_batch_is_there_for_the_length_of_a_block(running):
    with leftovers() as left:
        with BatchLender(8 * MIB, running.path, name="batch", drain_s=1.0) as lender, Client(
            running.path
        ) as client:
            (loan,) = client.borrow(6 * MIB)
            loan.write(0, b"x" * 6 * MIB)

            def obey():
                wait_for(lambda: loan.wanted_back)
                loan.give_back(loan.held.total - loan.wanted_back, loan.wanted_back)

            thread = threading.Thread(target=obey)
            thread.start()
            with lender.room(5 * MIB - 1):
                assert loan.held.total == lender.lent == 3 * MIB
                # Its memory is the system's.
                assert os.fstat(lender.arena.fd).st_blocks * 512 == 3 * MIB
                assert client.borrow(PAGE) is None
            thread.join()
            wait_for(lambda: lent(running) == lender.lent == 8 * MIB, "all is lent again")
            (other,) = client.borrow(5 * MIB)
            assert other.read(0, 5 * MIB) == bytes(5 * MIB)
            other.close()
            with pytest.raises(LenderError, match="3145728 bytes are still lent"):
                with lender.room(6 * MIB, timeout_s=0.3):
                    raise AssertionError
            wait_for(lambda: not loan.wanted_back, "all is lent as before")
            assert loan.alive and loan.read(0, 9) == b"x" * 9
            for size in (9 * MIB, -1, 1.5):
                with pytest.raises(ConfigError), lender.room(size):
                    raise AssertionError
            with pytest.raises(ZeroDivisionError), lender.room(MIB):
                _ = 1 // 0
            wait_for(lambda: lent(running) == 8 * MIB)
            loan.close()
        with pytest.raises(StaleHandleError), lender.room(MIB):
            raise AssertionError
        assert lender.close() == 0
    wait_for(lambda: not left(), "gRPC closes what it had open a moment later")


def test_a_coordinator_that_dies_during_a_batch_knows_what_is_lent_afterwards():
    with coordinator(new_name(), "--term_s=5") as running:
        with BatchLender(4 * MIB, running.path, drain_s=0.5, timeout_s=1.0) as lender:
            with lender.room(MIB):
                running.kill()
            assert lender.lent == 4 * MIB
            with pytest.raises(LenderError, match=r"within 0\.2 s"):
                with lender.room(MIB, timeout_s=0.2):
                    raise AssertionError
            running.start()
            wait_for(lambda: running.status().arenas)
            wait_for(lambda: lent(running) == lender.lent == 4 * MIB)
            running.signal(signal.SIGSTOP)
            try:
                with pytest.raises(LenderError, match=r"within 0\.2 s"):
                    with lender.room(MIB, timeout_s=0.2):
                        raise AssertionError
            finally:
                running.signal(signal.SIGCONT)
            wait_for(lambda: lent(running) == lender.lent == 4 * MIB)
            with lender.room(2 * MIB):
                assert lent(running) == 2 * MIB
