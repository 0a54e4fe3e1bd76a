"""What the thread behind borrowed memory does so that no step has to: readying it, and the end."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from aqua_jax.errors import ArenaError
from aqua_jax.memory.arena import PAGE
from aqua_jax.memory.peers import PeerTier
from tests.memory.content_helpers import Source
from tests.memory.lending import wait_for


class Pins:
    """Notes which thread readied what."""

    def __init__(self) -> None:
        self.said: list[tuple[str, int, str]] = []
        self.refuse = False
        self.before: Callable[[], object] = lambda: None

    def pin(self, address: int, nbytes: int) -> None:
        self.before()
        if self.refuse:
            raise ArenaError("no more")
        self.said.append(("pin", nbytes, threading.current_thread().name))

    def unpin(self, address: int, nbytes: int) -> None:
        self.before()
        self.said.append(("unpin", nbytes, threading.current_thread().name))


class Case:
    """A tier that wishes for all that its source will have."""

    def __init__(self) -> None:
        self.source, self.pins = Source(0), Pins()
        self.tier = PeerTier([self.source], step=PAGE, pauses_s=(0.01, 0.01), pins=self.pins)
        self.tier.wish(1 << 30)


@pytest.fixture
def case() -> Iterator[Case]:
    found = Case()
    yield found
    found.pins.before = lambda: None
    found.tier.close()


def test_a_lease_is_ready_before_anybody_hears_of_it(case) -> None:
    wait, begun = threading.Event(), threading.Event()
    case.pins.before = lambda: (begun.set(), wait.wait(60))
    case.source.room = 2 * PAGE
    assert begun.wait(60) and not case.tier.arrivals
    wait.set()
    wait_for(lambda: case.tier.arrivals, "it has come")
    assert case.pins.said == [("pin", 2 * PAGE, "aqua-peers")]


def test_what_cannot_be_made_ready_is_given_back_and_never_offered(case) -> None:
    case.pins.refuse = True
    case.source.room = 3 * PAGE
    wait_for(lambda: case.source.told == 3 * PAGE, "it is back")
    assert not case.tier.arrivals and case.source.leases[0].closed


def test_the_end_of_a_lease_holds_nobody_up(case) -> None:
    case.source.room = PAGE
    wait_for(lambda: case.tier.arrivals)
    lease = case.tier.arrivals.popleft().lease
    wait, begun = threading.Event(), threading.Event()
    case.pins.before = lambda: (begun.set(), wait.wait(60))
    case.tier.end(lease.close)
    assert begun.wait(60) and not lease.closed
    wait.set()
    wait_for(lambda: lease.closed, "closed in the background")
    assert case.pins.said[-1] == ("unpin", PAGE, "aqua-peers")


def test_nothing_is_left_open_at_the_end(case) -> None:
    case.source.room = PAGE
    wait_for(lambda: case.tier.arrivals)
    first = case.tier.arrivals.popleft().lease
    case.tier.close()
    case.tier.end(first.close)
    assert first.closed and case.source.told == PAGE
    assert [word for word, _, _ in case.pins.said] == ["pin", "unpin"]
