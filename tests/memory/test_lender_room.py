"""A batch job lends what its batch leaves over."""

import os
import threading

import pytest

from aqua_jax.errors import ConfigError, LenderError
from aqua_jax.memory.arena import PAGE
from aqua_jax.memory.borrower import Borrower
from aqua_jax.memory.lender import Lender
from tests.memory.leftovers import leftovers
from tests.memory.lending import new_name, wait_for

MIB = 1 << 20


def test_room_for_a_batch_is_there_for_the_length_of_a_block():
    path = new_name()
    with leftovers() as left:
        with Lender(8 * MIB, path, drain_s=1.0).start() as lender, Borrower(path) as borrower:
            lease = borrower.borrow(6 * MIB)

            def obey():
                wait_for(lambda: lease.wanted_back)
                lease.give_back(lease.held.total - lease.wanted_back, lease.wanted_back)

            thread = threading.Thread(target=obey)
            thread.start()
            with lender.room(5 * MIB - 1):
                assert lender.grants.held == lease.held.total == 3 * MIB
                # Its memory is the system's.
                assert os.fstat(lender.arena.fd).st_blocks * 512 == 3 * MIB
                assert borrower.borrow(PAGE) is None
            thread.join()
            wait_for(lambda: borrower.status()["free"] == 5 * MIB)
            with pytest.raises(LenderError, match="keep 3145728 bytes"):
                with lender.room(6 * MIB, timeout_s=0.05):
                    raise AssertionError
            wait_for(lambda: not lease.wanted_back, "all is lent as before")
            with pytest.raises(ConfigError), lender.room(9 * MIB):
                raise AssertionError
            with pytest.raises(ZeroDivisionError), lender.room(MIB):
                _ = 1 // 0
            wait_for(lambda: borrower.status()["limit"] == 8 * MIB)
        lender.close()
    assert not left()
