"""What happens to contents at step boundaries, case by case; `test_contents.py` has random ones."""

from __future__ import annotations

import numpy as np
import pytest

from aqua_jax.errors import ConfigError, ContentLostError
from aqua_jax.memory import copies
from aqua_jax.memory.arena import PAGE
from aqua_jax.memory.contents import IDLE_S, Contents
from aqua_jax.memory.extents import align
from aqua_jax.memory.peers import PeerTier
from aqua_jax.memory.policies import Dynamic, Static
from aqua_jax.memory.responder import Responder
from aqua_jax.memory.segments import HostTier, LeaseSegment
from tests.memory.content_helpers import Source, bytes_in, filled, spans_of, tiers_of


def test_a_content_stays_put_while_it_is_copied():
    """A lender that wants everything back waits for a copy under way, and then gets it."""
    source = Source(4 * PAGE)
    contents = Contents([PeerTier([source], step=PAGE), HostTier(step=PAGE)], Dynamic())
    responder = Responder(contents)
    data = np.arange(PAGE, dtype=np.uint8)
    content = contents.create(PAGE)
    contents.write(content, spans_of(data))
    with contents._pinned(content):
        source.leases[0].keep = 0
        assert responder.asked() and responder.respond() == 0
        assert contents.where(content) == {"peer": PAGE}
        contents.free(content)  # goes when the copy has ended
        assert contents.views()["peer"].used == PAGE
    assert contents.views()["peer"].used == 0
    assert responder.respond() == 0 and source.told == PAGE
    responder.close()


def test_reading_checks_the_lease_after_the_copy(monkeypatch):
    """A lender that dies in the middle of a copy: the copy counts for nothing."""
    for mirror in (None, "host"):
        source = Source(4 * PAGE)
        contents = Contents(
            [PeerTier([source], step=PAGE), HostTier(step=PAGE)], Dynamic(mirror=mirror)
        )
        data = np.arange(PAGE, dtype=np.uint8)
        content = contents.create(PAGE)
        contents.write(content, spans_of(data))
        real = copies.scatter

        def dying(address, offset, size, spans, source=source, real=real):
            source.leases[0].alive = False
            real(address, offset, size, spans)

        monkeypatch.setattr(copies, "scatter", dying)
        target = np.zeros(PAGE, np.uint8)
        if mirror is None:
            with pytest.raises(ContentLostError):
                contents.read(content, spans_of(target))
        else:
            contents.read(content, spans_of(target))
            assert (target == data).all()
        monkeypatch.setattr(copies, "scatter", real)
        contents.close()


def test_a_move_under_way_when_the_lender_dies_counts_for_nothing(monkeypatch):
    source = Source(4 * PAGE)
    contents = Contents([PeerTier([source], step=PAGE), HostTier(step=PAGE)], Dynamic())
    responder = Responder(contents)
    content = filled(contents, 1, 9)
    source.leases[0].keep = 0
    real = copies.copy

    def dying(*args):
        source.leases[0].alive = False
        real(*args)

    monkeypatch.setattr(copies, "copy", dying)
    assert responder.respond() == 0
    monkeypatch.setattr(copies, "copy", real)
    assert not contents.readable(content) and contents.views()["host"].used == 0
    assert responder.respond() == 0 and contents.counters.lost == 1
    responder.close()


def test_where_nothing_is_wanted_nothing_is_looked_at(monkeypatch):
    """Counted: what it costs depends neither on contents nor on leases."""
    source, contents, responder, _ = tiers_of(20)
    held = [filled(contents, 1, i) for i in range(20)]
    assert len(source.leases) > 3 and contents.views()["peer"].used == 20 * PAGE
    responder.respond()
    looked = []

    class Lock:
        def __enter__(self):
            looked.append(self)

        def __exit__(self, *_):
            looked.append(self)

    with monkeypatch.context() as patched:
        for name in ("wanted", "alive"):
            patched.setattr(LeaseSegment, name, property(looked.append))
        patched.setattr(contents, "changed", Lock())
        for _ in range(100):
            assert responder.respond() == 0
        assert looked == []
    source.leases[2].keep = 0
    assert responder.respond() > 0 and source.told == source.leases[2].size
    assert all(bytes_in(contents, content) == i for i, content in enumerate(held))
    responder.close()


def test_policies_refuse_names_that_are_no_tiers():
    for wrong in (
        lambda: Static("none"), lambda: Static("peer", spill=("moon",)), lambda: Dynamic(()),
        lambda: Dynamic(("none",)), lambda: Dynamic(("none", "host")),
        lambda: Dynamic(("host", "host")), lambda: Dynamic(mirror="none"),
    ):
        with pytest.raises(ConfigError):
            wrong()
    assert align(65) == 128


def test_chunks_climb_some_at_a_time_when_room_comes():
    source, contents, responder, now = tiers_of(3, climb_bytes=2 * PAGE, hold_s=1.0)
    first = filled(contents, 3, 1)
    second = filled(contents, 3, 2)
    third = filled(contents, 2, 3)
    assert contents.where(second) == {"host": 3 * PAGE} and responder.respond() == 0
    assert not responder.asked(), "nothing has changed since"
    # Room because something was freed there.
    contents.free(first)
    assert responder.asked() and responder.respond() == 2 * PAGE
    assert contents.where(second) == {"peer": 2 * PAGE, "host": PAGE}
    assert responder.respond() == PAGE and contents.where(second) == {"peer": 3 * PAGE}
    assert responder.respond() == 0 and contents.where(third) == {"host": 2 * PAGE}
    # Room because more is lent; but what a lender has just taken back isn't filled at once.
    for lease in source.live():
        lease.keep = 0
    assert responder.respond() == 3 * PAGE and contents.where(second) == {"host": 3 * PAGE}
    source.room = 9 * PAGE
    contents.peers.arrivals.append(LeaseSegment(*source.borrow(9 * PAGE)))
    assert responder.respond() == 0
    now[0] = 1.5
    while responder.asked():
        assert 0 < responder.respond() <= 2 * PAGE
    assert contents.where(second) == {"peer": 3 * PAGE}
    assert contents.where(third) == {"peer": 2 * PAGE}
    assert (bytes_in(contents, second), bytes_in(contents, third)) == (2, 3)
    assert not contents.below
    responder.close()


def test_nothing_goes_where_memory_is_wanted_back_or_dead():
    source, contents, responder, _ = tiers_of(8)
    first = filled(contents, 1, 1)  # a lease of a page
    second = filled(contents, 4, 2)  # and one of four
    a, b = source.leases
    contents.free(second)
    assert b.held.total == 4 * PAGE
    b.keep = 3 * PAGE
    source.room = 0
    third = filled(contents, 1, 3)
    assert contents.where(third) == {"host": PAGE}
    # Other borrowed memory is better than the host's.
    b.keep = b.size
    a.keep = 0
    assert responder.respond() >= PAGE and contents.where(first) == {"peer": PAGE}
    assert a.closed and bytes_in(contents, first) == 1
    responder.close()


def test_a_move_to_a_lender_that_dies_meanwhile_leaves_it_where_it_was(monkeypatch):
    source, contents, responder, _ = tiers_of(2)
    content = filled(contents, 1, 7)
    filled(contents, 1, 8)
    a, b = source.leases
    contents.free(next(c for c, _ in contents.peers.segments[1].owners.values()))
    a.keep = 0
    real = copies.copy

    def dying(*args):
        b.alive = False
        real(*args)

    monkeypatch.setattr(copies, "copy", dying)
    responder.respond()
    monkeypatch.setattr(copies, "copy", real)
    responder.respond()
    assert contents.where(content) == {"host": PAGE} and bytes_in(contents, content) == 7
    assert a.closed and b.closed and contents.counters.lost == 0
    responder.close()


def test_memory_that_stays_empty_is_let_go_and_what_is_used_again_is_not():
    source, contents, responder, now = tiers_of(4, host=4 * PAGE, policy=Static("peer"))
    for _ in range(20):
        content = filled(contents, 3, 1)
        now[0] += IDLE_S - 1
        contents.free(content)
        assert responder.respond() == 0
    assert len(source.leases) == 1 and source.told == 0, "the same memory, again and again"
    now[0] += IDLE_S
    assert responder.asked() and responder.respond() == 0 and not responder.asked()
    assert source.told == 3 * PAGE and not contents.peers.segments
    responder.close()


def test_small_empty_segments_give_way_to_a_larger_one():
    _, contents, responder, _ = tiers_of(0, host=4 * PAGE, policy=Static("host"))
    contents._chunk = 3 * PAGE
    small = [filled(contents, 1, i) for i in range(4)]
    assert len(contents.tiers["host"].segments) > 1
    for content in small:
        contents.free(content)
    large = filled(contents, 3, 7)
    assert bytes_in(contents, large) == 7
    contents.free(large)
    responder.close()


def test_what_is_lost_in_part_is_left_alone():
    source, contents, responder, now = tiers_of(1)
    content = filled(contents, 3, 1)
    assert contents.where(content) == {"peer": PAGE, "host": 2 * PAGE}
    source.leases[0].alive = False
    source.room = 8 * PAGE
    contents.peers.arrivals.append(LeaseSegment(*source.borrow(8 * PAGE)))
    now[0] = 9.0
    assert responder.respond() == 0 and content.lost and contents.counters.lost == 1
    with pytest.raises(ContentLostError):
        bytes_in(contents, content)
    assert not contents.below
    contents.free(content)
    responder.close()


def test_a_lender_that_dies_while_a_content_is_placed():
    source, contents, responder, _ = tiers_of(1)
    host = contents.tiers["host"]
    real = host.grow

    def grow(need):
        source.leases[0].alive = False
        responder.respond()
        return real(need)

    host.grow = grow
    content = contents.create(2 * PAGE)
    assert content.lost and source.leases[0].closed and not contents.readable(content)
    with pytest.raises(ContentLostError):
        contents.write(content, [])
    contents.free(content)
    assert contents.views()["host"].used == 0
    responder.close()


def test_without_another_place_the_lender_waits_and_is_counted():
    source, contents, responder, _ = tiers_of(2, host=0)
    content = filled(contents, 2, 5)
    source.leases[0].keep = 0
    for count in (1, 2):
        assert responder.respond() == 0 and contents.counters.late == count
    assert bytes_in(contents, content) == 5
    contents.free(content)
    assert responder.respond() == 0 and source.told == 2 * PAGE
    responder.close()
