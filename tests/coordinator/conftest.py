"""A coordinator, memory lent through it, and a client that must notice nothing of others."""

import pytest

from aqua_jax.memory.arena import PAGE, Arena
from aqua_jax.memory.client import Client
from tests.coordinator.running import coordinator
from tests.faults.processes import descriptors
from tests.memory.lending import new_name, wait_for

MIB = 1 << 20


@pytest.fixture(scope="module")
def running():
    """One coordinator for all tests that leave it as it was."""
    with coordinator(new_name(), "--term_s=5", "--metrics_port=0") as found:
        yield found


@pytest.fixture
def lent(running):
    """8 MiB lent by this process."""
    with Arena.create(8 * MIB) as arena, Client(running.path, name="lender") as client:
        lending = client.lend(arena, name="test", bandwidth=10**9, cap=10**6)
        yield lending
        assert lending.alive
        lending.reclaim(0, 1.0)
        wait_for(lambda: lending.lent == 0, "all of it comes back")


@pytest.fixture
def undisturbed(running, lent):
    """A well-behaved holder, who must notice nothing, and a coordinator that must lose nothing."""
    with Client(running.path, name="honest") as honest:
        (loan,) = honest.borrow(MIB)
        loan.write(0, b"honest" * 1000)
        idle = descriptors(running.process.pid)
        yield loan
        assert loan.alive and not loan.wanted_back and honest.connected
        assert loan.read(0, 6000) == b"honest" * 1000
        assert honest.borrow(PAGE) is not None
        wait_for(lambda: descriptors(running.process.pid) <= idle, "no descriptor stays")
        assert running.held() == MIB + PAGE
        assert not running.process.said("Traceback"), running.process.lines
