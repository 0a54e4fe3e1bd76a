"""Lender and borrower over real sockets, in one process: leases, reclaim, misuse, nothing left."""

import contextlib
import os
import random
import socket
import struct
import threading
import time
import timeit

import pytest

from aqua_jax.coordinator.sockets import PATH_LIMIT, Listener
from aqua_jax.errors import ConfigError, LenderError, ProtocolError, StaleHandleError, StoreError
from aqua_jax.memory import protocol
from aqua_jax.memory.arena import PAGE, Arena
from aqua_jax.memory.borrower import Borrower, connect
from aqua_jax.memory.lender import Lender
from aqua_jax.memory.stores import PeerStore
from tests.memory.leftovers import leftovers
from tests.memory.lending import Raw, Running, lending, new_name, wait_for
from tests.scale import scaled

MIB = 1 << 20


def test_a_lease_from_beginning_to_end():
    with leftovers() as left, lending(4 * MIB, name="box") as running:
        with Borrower(running.path, name="me") as borrower:
            assert (borrower.lender_name, borrower.arena_size) == ("box", 4 * MIB)
            assert not os.get_inheritable(borrower._fd), "a child would keep the memory alive"
            lease = borrower.borrow(MIB + 1)
            assert lease.size == MIB + PAGE and lease.alive and not lease.wanted_back
            lease.write(100, b"mine")
            assert lease.read(100, 4) == b"mine"
            assert borrower.borrow(4 * MIB) is None
            other = borrower.borrow(MIB)
            assert other.generation != lease.generation
            assert borrower.status()["lent"] == 2 * MIB + PAGE
            lease.give_back(MIB, PAGE)
            with pytest.raises(StaleHandleError):
                lease.read(MIB, 1)
            with pytest.raises(StoreError):
                lease.give_back(MIB, PAGE)
            assert lease.read(100, 4) == b"mine"
            wait_for(lambda: borrower.status()["lent"] == 2 * MIB)
            lease.close()
            lease.close()
            with pytest.raises(StaleHandleError):
                lease.read(0, 1)
            with pytest.raises(StaleHandleError):
                lease.give_back(0, PAGE)
            wait_for(lambda: borrower.status()["leases"] == 1)
        borrower.close()
        with pytest.raises(LenderError):
            borrower.borrow(PAGE)
        wait_for(lambda: running.lender.grants.held == 0)
    assert not left()
    assert running.said(f"lent 1.004 MiB to pid {os.getpid()} (me)")
    assert running.said("refused 4 MiB") and running.said("gave back") and running.said("leaving")


def test_connect_is_one_lease_with_its_connection():
    with leftovers() as left, lending(MIB) as running:
        with connect(running.path, MIB) as lease:
            lease.write(0, b"x" * MIB)
            assert connect(running.path, PAGE) is None
        with connect(running.path, MIB) as lease:
            assert lease.read(0, MIB) == bytes(MIB), "not scrubbed"
    assert not left()


def test_memory_that_comes_back_is_scrubbed_before_it_is_lent_again():
    with lending(8 * MIB) as running, Borrower(running.path) as borrower:
        for round_number in range(1, 5):
            leases = [borrower.borrow(2 * MIB) for _ in range(4)]
            for lease in leases:
                assert lease.read(0, lease.size) == bytes(lease.size)
                lease.write(0, bytes([round_number]) * lease.size)
            # In pieces and out of order.
            for lease in leases[::-1]:
                lease.give_back(PAGE, PAGE)
                lease.close()
        wait_for(lambda: borrower.status()["lent"] == 0)


def test_reclaim_is_a_flag_and_the_store_gives_back_only_what_is_asked():
    with lending(4 * MIB) as running, Borrower(running.path) as borrower:
        lease = borrower.borrow(4 * MIB)
        store = PeerStore(lease, 100_000, 16)
        slots = store.allocate(store.capacity)
        for slot in slots:
            store.fill(slot, 16)
            lease.write(store.offset(slot), bytes([slot.id]) * store.slot_bytes)
        assert store.wanted_slots == 0 and lease.deadline is None
        running.lender.resize(3 * MIB)
        wait_for(lambda: lease.wanted_back)
        assert 0 < lease.deadline - time.monotonic() <= 10
        before, asked, count = lease.held.total, lease.wanted_back, store.wanted_slots
        assert {slot.id for slot in store.retire(count)} == set(range(41 - count, 41))
        gone = store.give_back(count)
        assert [slot.id for slot in gone] == list(range(40, 40 - count, -1))
        assert asked <= before - lease.held.total < asked + store.slot_bytes + PAGE
        assert lease.wanted_back == 0
        wait_for(lambda: running.lender.grants.withheld.total == MIB)
        wait_for(lambda: lease.deadline is None, "the lender says it has what it wants")
        assert os.fstat(running.lender.arena.fd).st_blocks * 512 == 3 * MIB
        for slot in slots[: 41 - count]:
            data = lease.read(store.offset(slot), store.slot_bytes)
            assert store.holds(slot) and data == bytes([slot.id]) * store.slot_bytes
        assert borrower.borrow(MIB - 100_000) is None
        running.lender.resize(4 * MIB)
        wait_for(lambda: running.lender.grants.limit == 4 * MIB)
        more = borrower.borrow(MIB - 100_000)
        assert more.read(0, more.size) == bytes(more.size)
        store.close()


def test_a_lender_that_changes_its_mind_takes_its_wish_back():
    with lending(2 * MIB) as running, connect(running.path, 2 * MIB) as lease:
        running.lender.resize(MIB)
        wait_for(lambda: lease.wanted_back == MIB)
        running.lender.resize(2 * MIB)
        wait_for(lambda: lease.wanted_back == 0 and lease.deadline is None)


def test_a_client_may_resize_the_lender():
    with lending(2 * MIB) as running, Borrower(running.path) as borrower:
        with Borrower(running.path) as control:
            control.resize(PAGE)
            assert control.status()["limit"] == PAGE
            assert borrower.borrow(2 * PAGE) is None
            with pytest.raises(LenderError):
                control.resize(3 * MIB)
        assert borrower.alive and borrower.borrow(PAGE) is not None
        for size in (-1, 2 * MIB + 1):
            with pytest.raises(ConfigError):
                running.lender.resize(size)


def test_leaving_waits_for_everything_however_late():
    running = Running(MIB, drain_s=0.05)
    with leftovers() as left:
        lease = connect(running.path, MIB)
        running.lender.stop()
        wait_for(lambda: lease.wanted_back == MIB)
        assert connect(running.path, PAGE) is None, "a leaving lender lends nothing"
        wait_for(lambda: running.said("is late"))
        lease.write(0, b"still mine")
        assert running.thread.is_alive() and lease.read(0, 10) == b"still mine"
        lease.close()
        running.thread.join(60)
        assert not running.thread.is_alive()
    running.lender.close()
    assert all(line.startswith("fd") or "lender" in line for line in left())


def test_a_connection_that_closes_with_memory_proves_nothing():
    """The process lives on and may be in the middle of a copy: its bytes wait for its exit."""
    running = Running(MIB)
    with Raw(running.path) as raw:
        raw.say("borrow", id=1, bytes=MIB)
        assert raw.hear()["type"] == "granted"
    wait_for(lambda: running.said("which waits for it to exit"))
    assert connect(running.path, PAGE) is None
    assert running.lender.grants.held == MIB
    running.lender.stop()
    time.sleep(0.05)
    assert running.thread.is_alive()
    # What its exit would do.
    running.lender.grants.exited(1)
    running.lender.stop()
    running.thread.join(60)
    assert not running.thread.is_alive()
    running.lender.close()


@contextlib.contextmanager
def fake_lender(size, fd=None, **options):
    """A borrower, and the lender's end of its connection, which the test plays itself."""
    path = new_name()
    listener = Listener(path)
    made = []
    maker = threading.Thread(target=lambda: made.append(Borrower(path, **options)))
    maker.start()
    listener.socket.setblocking(True)
    server, _ = listener.socket.accept()
    with Arena.create(PAGE) as arena, Raw(server, hello=False) as raw:
        welcome = protocol.encode("welcome", version=1, name="", bytes=size)
        socket.send_fds(server, [welcome], [arena.fd if fd is None else fd])
        maker.join()
        assert raw.hear()["type"] == "hello"
        with made[0]:
            yield made[0], raw
    listener.close()


def test_a_dead_lender_leaves_valid_memory_and_a_flag():
    with leftovers() as left, fake_lender(PAGE) as (borrower, raw):
        thread = threading.Thread(target=raw.grant)
        thread.start()
        lease = borrower.borrow(PAGE)
        thread.join()
        store = PeerStore(lease, 1000, 16)
        (slot,) = store.allocate(1)
        store.fill(slot, 4)
        assert store.holds(slot)
        raw.socket.close()
        wait_for(lambda: not lease.alive)
        lease.write(0, b"a copy under way")
        assert store.lost and not store.holds(slot) and store.allocate(1) is None
        with pytest.raises(StaleHandleError):
            lease.read(0, 4)
        with pytest.raises(StaleHandleError):
            store.address(slot)
        store.free(slot)
        with pytest.raises(LenderError):
            borrower.borrow(PAGE)
        assert store.counters.dropped == 1
        store.close()
    assert not left()


def test_a_wish_that_arrives_before_the_lease_is_mapped_is_not_lost():
    with leftovers() as left, fake_lender(PAGE) as (borrower, raw):
        raw.say("reclaim", generation=1, keep=0, deadline_ms=5000)
        thread = threading.Thread(target=raw.grant)
        thread.start()
        lease = borrower.borrow(PAGE)
        thread.join()
        assert lease.wanted_back == PAGE
        assert 0 < lease.deadline - time.monotonic() <= 5
    assert not left()


def test_an_answer_that_comes_too_late_is_given_back():
    with leftovers() as left, fake_lender(PAGE, timeout_s=0.1) as (borrower, raw):
        with pytest.raises(LenderError, match="no answer"):
            borrower.borrow(PAGE)
        asked = raw.hear()
        raw.say("granted", id=asked["id"], generation=7, offset=0, bytes=PAGE)
        back = raw.hear()
        assert (back["type"], back["generation"], back["bytes"]) == ("give_back", 7, PAGE)
    assert not left()


@pytest.mark.parametrize(("size", "sealed"), [(MIB, True), (PAGE, False)])
def test_a_borrower_checks_what_it_gets(size, sealed):
    """A lender that grants more than it has, or memory that isn't sealed."""
    with leftovers() as left:
        fd = os.memfd_create("bad", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.posix_fallocate(fd, 0, PAGE)
        with fake_lender(size, None if sealed else fd) as (borrower, raw):
            thread = threading.Thread(target=raw.grant)
            thread.start()
            with pytest.raises(LenderError, match="can't be used"):
                borrower.borrow(size)
            thread.join()
            assert raw.hear()["type"] == "give_back"
        os.close(fd)
    assert not left()


@pytest.mark.parametrize(
    ("kind", "fields"),
    [("reclaim", {"generation": -1, "keep": 0, "deadline_ms": 0}), ("granted", {"id": 1}),
     ("borrow", {"id": 1}), ("freed", {})],
)
def test_a_lender_that_makes_no_sense_is_lost(kind, fields):
    with leftovers() as left, fake_lender(PAGE) as (borrower, raw):
        raw.say(kind, **fields)
        wait_for(lambda: not borrower.alive)
        with pytest.raises(LenderError, match="is gone"):
            borrower.borrow(PAGE)
    assert not left()


# What a lender must bear.

BAD_MESSAGES = [
    ("borrow", {"id": 1, "bytes": -1}), ("borrow", {"id": 1, "bytes": 0}),
    ("borrow", {"id": 1, "bytes": 2**63}), ("borrow", {"id": 1, "bytes": "1"}),
    ("borrow", {"id": 1, "bytes": 1.5}), ("borrow", {"id": -1, "bytes": 1}),
    ("borrow", {"bytes": 1}), ("borrow", {"id": True, "bytes": 1}),
    ("give_back", {"id": 1, "generation": 99, "offset": 0, "bytes": PAGE}),
    ("give_back", {"id": 1, "generation": 1, "offset": 0, "bytes": PAGE}),  # somebody else's
    ("give_back", {"id": 1, "generation": 0, "offset": 0, "bytes": PAGE}),
    ("give_back", {"id": 1, "generation": 2**62, "offset": 2**62, "bytes": 2**62}),
    ("resize", {"id": 1, "bytes": 2**62}), ("resize", {"id": 1}), ("status", {}),
    ("hello", {"version": 1, "name": "again"}), ("granted", {"id": 1}), ("", {}), ("x" * 3000, {}),
]


@pytest.fixture(scope="module")
def bystander():
    """A lender, and a borrower (generation 1) that nothing here may disturb."""
    with lending(2 * MIB, max_clients=16) as running, connect(running.path, MIB) as lease:
        lease.write(0, b"untouched" * 1000)
        yield running, lease
        assert lease.alive and lease.wanted_back == 0
        assert lease.read(0, 9000) == b"untouched" * 1000
        assert running.lender.grants.held == MIB


@pytest.mark.parametrize(("kind", "fields"), BAD_MESSAGES)
def test_bad_messages_end_their_own_connection(bystander, kind, fields):
    running, lease = bystander
    with Raw(running.path) as raw:
        raw.say(kind, **fields)
        answer = raw.hear()
        assert answer["type"] == "error" and set(answer) == {"type", "field", "value", "allowed"}
        assert raw.hear() == {"type": "end"}
    assert running.thread.is_alive() and lease.alive


@pytest.mark.parametrize(
    ("kind", "fields"),
    [("borrow", {"id": 1, "bytes": 1}), ("hello", {"version": 2, "name": ""}),
     ("hello", {"version": 1}), ("hello", {"version": 1, "name": "a\nb"}), ("bye", {})],
)
def test_a_wrong_beginning_is_refused(bystander, kind, fields):
    with Raw(bystander[0].path, hello=False) as raw:
        raw.say(kind, **fields)
        assert raw.hear()["type"] == "error" and raw.hear() == {"type": "end"}


def test_a_range_given_back_twice_is_refused(bystander):
    with Raw(bystander[0].path) as raw:
        raw.say("borrow", id=1, bytes=PAGE)
        lease = raw.hear()
        message = {name: lease[name] for name in ("id", "generation", "offset", "bytes")}
        raw.say("give_back", **message)
        assert raw.hear() == {"type": "freed", "id": 1}
        raw.say("give_back", **message)
        assert raw.hear()["type"] == "error"


def has_room(running):
    """Whether everybody who came before has been dealt with, and only the bystander is there."""
    with Raw(running.path, hello=False) as raw:
        raw.say("hello", version=1, name="")
        welcome = raw.hear()["type"] == "welcome"
        return welcome and len(running.lender._clients) == 2


def test_random_bytes_disturb_nobody(bystander):
    running, lease = bystander
    rng = random.Random(1)
    good = [
        protocol.encode("hello", version=1, name="f"), protocol.encode("status", id=1),
        protocol.encode("borrow", id=2, bytes=2**40), protocol.encode("resize", id=3, bytes=-1),
    ]
    for _ in range(scaled(150)):
        pieces = [good[0]] if rng.random() < 0.7 else []
        for _ in range(rng.randrange(4)):
            piece = bytearray(rng.choice([*good[1:], rng.randbytes(rng.randrange(60))]))
            for _ in range(rng.randrange(3)):
                if piece:
                    piece[rng.randrange(len(piece))] = rng.randrange(256)
            pieces.append(bytes(piece))
        if rng.random() < 0.2:
            pieces.append(struct.pack("<I", rng.randrange(2**32)))
        with Raw(running.path, hello=False) as raw:
            try:
                raw.socket.sendall(b"".join(pieces))
            except ConnectionError:
                pass  # dropped before we had finished
    wait_for(lambda: has_room(running), "all of them are gone")
    assert running.lender.grants.limit == 2 * MIB and lease.alive
    with connect(running.path, PAGE) as other:
        assert other.read(0, PAGE) == bytes(PAGE)


def test_somebody_who_never_reads_is_dropped(bystander):
    running, _ = bystander
    with Raw(running.path) as raw:
        message = protocol.encode("status", id=1) * 1000
        with pytest.raises(ConnectionError):
            for _ in range(1000):
                raw.socket.sendall(message)
    wait_for(lambda: running.said("doesn't read"))


def test_somebody_who_says_nothing_is_dropped(bystander, monkeypatch):
    monkeypatch.setattr("aqua_jax.memory.lender.HELLO_S", 0.05)
    with Raw(bystander[0].path, hello=False) as raw:
        raw.socket.sendall(b"\x10")
        assert raw.hear() == {"type": "end"}
    wait_for(lambda: bystander[0].said("said nothing"))


def test_many_connections_leave_nothing_and_too_many_are_turned_away(bystander):
    running, lease = bystander
    with leftovers() as left:
        for _ in range(scaled(200)):
            Raw(running.path, hello=False).socket.close()
        wait_for(lambda: has_room(running))
        wait_for(lambda: len(running.lender._clients) == 1)
        held = [Raw(running.path) for _ in range(15)]
        with pytest.raises(LenderError, match="connections"):
            Borrower(running.path)
        assert lease.alive
        for raw in held:
            raw.socket.close()
        wait_for(lambda: len(running.lender._clients) == 1)
    assert not left()


def test_a_lender_sleeps_when_nothing_happens(bystander):
    spent = []
    while not spent or (min(spent) >= 0.1 and len(spent) < 5):  # others end their work
        before = time.process_time()
        time.sleep(0.3)
        spent.append(time.process_time() - before)
    assert min(spent) < 0.1, spent


def test_flags_cost_nothing_to_read(bystander):
    lease = bystander[1]
    times = timeit.repeat(lambda: (lease.alive, lease.wanted_back), number=1000, repeat=7)
    assert min(times) / 1000 < 10e-6


# Where it listens.


def test_only_the_owner_can_connect_and_nothing_stays_in_the_file_system(tmp_path):
    path = str(tmp_path / "socket")
    with leftovers() as left, lending(PAGE, path):
        assert os.stat(path).st_mode & 0o777 == 0o600
        with pytest.raises(ConfigError, match="nobody listens on"):
            Lender(PAGE, path)
        with connect(path, PAGE) as lease:
            assert lease.alive
    assert os.listdir(tmp_path) == [] and not left()


def test_a_stale_socket_is_replaced_and_other_files_are_not(tmp_path):
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
    with lending(PAGE, path), connect(path, PAGE) as lease:
        assert lease.alive
    (tmp_path / "file").write_text("precious")
    with leftovers() as left, pytest.raises(ConfigError, match="no file"):
        Lender(PAGE, str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "precious" and not left()


def test_a_socket_that_somebody_else_made_meanwhile_is_not_removed(tmp_path):
    path = str(tmp_path / "socket")
    first = Listener(path)
    os.unlink(path)
    second = Listener(path)
    first.close()
    assert os.path.exists(path)
    second.close()
    second.close()
    assert not os.path.exists(path)


@pytest.mark.parametrize(
    "path", ["", "@", "x" * (PATH_LIMIT + 1), "@" + "x" * PATH_LIMIT, "a\0b", "/no/such/dir/s"]
)
def test_impossible_paths_are_refused(path):
    with leftovers() as left:
        with pytest.raises(ConfigError) as caught:
            Lender(PAGE, path)
        assert caught.value.field == "listen"
    assert not left()


def test_nobody_there_is_a_typed_error(tmp_path):
    with leftovers() as left:
        for path in (new_name(), str(tmp_path / "none")):
            with pytest.raises(LenderError, match="no lender answers"):
                connect(path, PAGE)
    assert not left()
    with lending(PAGE) as running, Borrower(running.path) as borrower:
        for size in (0, -1, 2**63, True, "1"):
            with pytest.raises(ProtocolError):
                borrower.borrow(size)
