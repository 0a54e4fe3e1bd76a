"""Contents over tiers against plain bytes, while lenders want memory back, die, or lend more."""

from __future__ import annotations

import ctypes
import threading

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from aqua_jax.errors import ConfigError, ContentLostError, StaleHandleError, StoreFullError
from aqua_jax.memory import copies
from aqua_jax.memory.arena import PAGE, Arena
from aqua_jax.memory.contents import Contents
from aqua_jax.memory.copies import Span
from aqua_jax.memory.extents import align
from aqua_jax.memory.lease import Lease
from aqua_jax.memory.peers import PeerTier
from aqua_jax.memory.policies import Dynamic, Static
from aqua_jax.memory.responder import Responder
from aqua_jax.memory.segments import HostTier, LeaseSegment
from tests.scale import scaled

CHUNK = 1024
POLICIES = [
    Dynamic(), Dynamic(mirror="host"), Dynamic(("peer", "host", "none")), Dynamic(("host", "peer")),
    Static("peer"), Static("peer", spill=("none",)), Static("peer", spill=()), Static("host"),
]


class Source:
    """Lends as long as `room` lasts; its leases are at hand, to be asked back or to die."""

    def __init__(self, room):
        self.room, self.leases, self.told = room, [], 0

    def borrow(self, size):
        size = min(-(-size // PAGE) * PAGE, self.room)
        if size <= 0:
            return ()
        self.room -= size
        lease = Lease(Arena.anonymous(size), len(self.leases) + 1, self._back)
        self.leases.append(lease)
        return (lease,)

    def _back(self, lease, offset, size):
        self.told += size

    def live(self):
        """Leases that still hold something."""
        return [lease for lease in self.leases if lease.alive and not lease.closed]

    def close(self):
        for lease in self.leases:
            lease.close()


def spans_of(data, offset=0):
    """One span over a NumPy array of bytes."""
    return [Span(offset, data.ctypes.data, data.nbytes)] if data.nbytes else []


class ContentsMachine(RuleBasedStateMachine):
    contents = Bundle("contents")

    @initialize(policy=st.sampled_from(POLICIES), host=st.sampled_from([0, 4, None]))
    def begin(self, policy, host):
        self.now = 0.0
        self.source = Source(12 * PAGE)
        self.peers = PeerTier([self.source], step=2 * PAGE, clock=lambda: self.now)
        self.peers.wish = lambda size: None  # no thread: leases arrive by a rule
        self.host = HostTier(None if host is None else host * PAGE, step=PAGE)
        self.real = Contents(
            [self.peers, self.host], policy, chunk_bytes=CHUNK, clock=lambda: self.now
        )
        self.responder = Responder(self.real, climb_bytes=3 * CHUNK)
        self.model = {}
        self.may_be_lost = set()
        self.random = np.random.default_rng(0)

    @rule(target=contents, size=st.integers(0, 5 * CHUNK))
    def create(self, size):
        before = {name: view.used for name, view in self.real.views().items()}
        try:
            content = self.real.create(size)
        except StoreFullError:
            assert {name: view.used for name, view in self.real.views().items()} == before
            return None
        data = self.random.integers(0, 256, size, np.uint8)
        cut = int(self.random.integers(0, size + 1))
        try:
            self.real.write(content, [*spans_of(data[:cut]), *spans_of(data[cut:], cut)])
        except ContentLostError:
            # Only if there was a dead lease that nobody has noticed yet: never placed there.
            raise AssertionError("placed with a dead lender") from None
        self.model[content] = data
        return content

    @rule(content=contents, part=st.tuples(st.floats(0, 1), st.floats(0, 1)))
    def read(self, content, part):
        if content is None:
            return
        if content not in self.model:
            with pytest.raises(StaleHandleError):
                self.real.read(content, [])
            return
        data = self.model[content]
        low, high = sorted(int(x * len(data)) for x in part)
        target = np.zeros(high - low, np.uint8)
        try:
            self.real.read(content, spans_of(target, low))
        except ContentLostError:
            assert not self.real.readable(content) and content in self.may_be_lost
        else:
            assert self.real.readable(content)
            assert (target == data[low:high]).all()

    @rule(content=consumes(contents), forgotten=st.booleans())
    def free(self, content, forgotten):
        if content not in self.model:
            return
        del self.model[content]
        self.may_be_lost.discard(content)
        if forgotten:
            self.real.abandon(content)
            self.real.abandon(content)
        else:
            self.real.free(content)

    @rule(which=st.integers(0, 9), pages=st.integers(0, 12))
    def want_back(self, which, pages):
        leases = self.source.live()
        if leases:
            lease = leases[which % len(leases)]
            lease.keep = lease.size if pages == 12 else max(0, lease.held.total - pages * PAGE)

    @rule(which=st.integers(0, 9))
    def die(self, which):
        leases = self.source.live()
        if not leases:
            return
        lease = leases[which % len(leases)]
        lease.alive = False
        for content in self.model:
            if any(not any(p.good for p in places) for places in content.places):
                self.may_be_lost.add(content)

    @rule(pages=st.integers(1, 4))
    def lend_more(self, pages):
        self.source.room += pages * PAGE
        for lease in self.source.borrow(pages * PAGE):
            segment = LeaseSegment(lease)
            self.peers._leases.append(segment)
            self.peers.arrivals.append(segment)

    @rule(seconds=st.sampled_from([0.1, 1.5]))
    def wait(self, seconds):
        self.now += seconds

    @rule()
    def respond(self):
        adopted = [s for s in (*self.peers.segments, *self.peers.arrivals) if s.alive]
        wanted = {segment: segment.wanted for segment in adopted}
        held = {segment: segment.lease.held.total for segment in adopted}
        before = {content: self.real.where(content) for content in self.model}
        counters = self.real.counters
        late, dropped, climbed = counters.late, counters.dropped, counters.climbed
        demoted = counters.demoted
        moved = self.responder.respond()
        assert moved == counters.demoted - demoted + counters.climbed - climbed
        # Never much more than was asked: less than a chunk a lease.
        demoted, dropped = counters.demoted - demoted, counters.dropped - dropped
        assert demoted + dropped <= sum(n + CHUNK + PAGE for n in wanted.values() if n)
        for segment, count in wanted.items():
            given = held[segment] - segment.lease.held.total
            assert given <= -(-count // PAGE) * PAGE
            if counters.late == late:
                assert given >= count and not segment.wanted
        assert counters.climbed - climbed <= 3 * CHUNK
        names = self.real.policy.demote(1, "peer", self.real.views())
        if dropped:
            assert "none" in names
            self.may_be_lost |= {c for c in self.model if not self.real.readable(c)}
        elif "none" in names:
            assert counters.late == late
        if isinstance(self.real.policy, Static):
            assert counters.climbed == 0
            for content, places in before.items():
                assert places.get("host", 0) <= self.real.where(content).get("host", 0)

    @invariant()
    def books_are_true(self):
        if not hasattr(self, "real"):
            return
        views = self.real.views()
        for tier in self.real.tiers.values():
            assert all(segment.pins == 0 for segment in tier.segments)
            for segment in tier.segments:
                assert set(segment.owners) == set(segment.extents._used)
                for offset, (content, index) in segment.owners.items():
                    assert content in self.model
                    assert offset in {
                        piece.extent.offset for piece in content.places[index]
                        if piece.segment is segment
                    }
        used = sum(
            piece.extent.size for content in self.model for places in content.places
            for piece in places
        )
        assert used == sum(view.used for view in views.values())
        for content, data in self.model.items():
            assert content.size == len(data)
            where = self.real.where(content)
            if self.real.readable(content):
                mirror = self.real.policy.mirror
                assert sum(where.values()) >= len(data) or not mirror
                if mirror:
                    assert where.get(mirror, 0) == len(data)
                else:
                    assert sum(where.values()) == len(data)
            else:
                assert content in self.may_be_lost
        if self.host.limit is not None:
            assert sum(segment.extents.size for segment in self.host.segments) <= self.host.limit

    def teardown(self):
        if not hasattr(self, "real"):
            return
        self.responder.close()
        self.responder.close()
        with pytest.raises(StaleHandleError):
            self.real.create(1)
        assert self.source.told == sum(lease.size for lease in self.source.leases)
        assert all(lease.closed for lease in self.source.leases) and self.host._held == 0


TestContents = ContentsMachine.TestCase
TestContents.settings = settings(
    max_examples=scaled(60), stateful_step_count=40, deadline=None
)


def test_gather_and_scatter_agree_with_slices():
    random = np.random.default_rng(1)
    for _ in range(scaled(200)):
        size = int(random.integers(1, 200))
        cuts = sorted(int(x) for x in random.integers(0, size + 1, 2 * int(random.integers(0, 5))))
        memory = random.integers(0, 256, size, np.uint8)
        content = random.integers(0, 256, size, np.uint8)
        pairs = list(zip(cuts[::2], cuts[1::2], strict=True))
        spans = [Span(a, memory.ctypes.data + a, b - a) for a, b in pairs]
        low, high = sorted(int(x) for x in random.integers(0, size + 1, 2))
        window = content[low:high].copy()
        expected = window.copy()
        for a, b in pairs:
            a, b = max(a, low), min(b, high)
            if a < b:
                expected[a - low : b - low] = memory[a:b]
        copies.gather(window.ctypes.data, low, high - low, spans)
        assert (window == expected).all()
        after = memory.copy()
        for a, b in pairs:
            a, b = max(a, low), min(b, high)
            if a < b:
                after[a:b] = content[a:b]
        source = content[low:high].copy()
        copies.scatter(source.ctypes.data, low, high - low, spans)
        assert (memory == after).all()


@pytest.mark.parametrize("native", [True, False])
def test_copies_are_exact_whoever_makes_them(monkeypatch, native, tmp_path):
    copies._stream.cache_clear()
    if not native:
        monkeypatch.setenv("AQUA_LIBRARY_PATH", str(tmp_path))
    random = np.random.default_rng(2)
    memory = random.integers(0, 256, 3 * copies.PIECE, np.uint8)
    for size in (0, 1, copies.STREAM - 1, copies.STREAM, copies.PIECE, 2 * copies.PIECE + 77):
        start, to = int(random.integers(0, 99)), int(random.integers(0, 99))
        target = np.zeros(size + 200, np.uint8)
        copies.copy(target.ctypes.data + to, memory.ctypes.data + start, size)
        assert (target[to : to + size] == memory[start : start + size]).all()
        assert not target[:to].any() and not target[to + size :].any()
    assert (copies._stream() is ctypes.memmove) != native
    copies._stream.cache_clear()


def test_copies_let_other_threads_run():
    """A second Python thread counts on while one copies: the GIL isn't held."""
    size = 32 << 20
    source, target = np.ones(size, np.uint8), np.zeros(size, np.uint8)
    count, stop = [0], threading.Event()

    def counting():
        while not stop.is_set():
            count[0] += 1

    thread = threading.Thread(target=counting)
    thread.start()
    before = count[0]
    for _ in range(3):
        copies.copy(target.ctypes.data, source.ctypes.data, size)
    during = count[0] - before
    stop.set()
    thread.join()
    assert target[0] == target[-1] == 1 and during > 1000


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


def test_policies_refuse_names_that_are_no_tiers():
    for wrong in (
        lambda: Static("none"), lambda: Static("peer", spill=("moon",)), lambda: Dynamic(()),
        lambda: Dynamic(("none",)), lambda: Dynamic(("none", "host")),
        lambda: Dynamic(("host", "host")), lambda: Dynamic(mirror="none"),
    ):
        with pytest.raises(ConfigError):
            wrong()
    assert align(65) == 128


def tiers_of(pages, *, host=None, policy=None, **options):
    """Contents over a source of so many pages, with what moves them and a clock of one's own."""
    now = [0.0]
    source = Source(pages * PAGE)
    peers = PeerTier([source], step=PAGE, clock=lambda: now[0])
    peers.wish = lambda size: None
    contents = Contents(
        [peers, HostTier(host, step=PAGE)], policy or Dynamic(), chunk_bytes=PAGE,
        clock=lambda: now[0],
    )
    return source, contents, Responder(contents, **options), now


def filled(contents, pages, value):
    """A content of so many pages of one byte."""
    content = contents.create(pages * PAGE)
    data = np.full(pages * PAGE, value, np.uint8)
    contents.write(content, spans_of(data))
    return content


def bytes_in(contents, content):
    """The one byte it is full of."""
    target = np.zeros(content.size, np.uint8)
    contents.read(content, spans_of(target))
    assert (target == target[0]).all()
    return int(target[0])


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
