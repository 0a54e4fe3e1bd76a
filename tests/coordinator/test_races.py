"""Messages that cross, come late, twice, or under a number used before: bytes stay one owner's."""

import asyncio
import contextlib
import fcntl
import os
import resource
import signal
import socket
import threading
import time

import grpc
import pytest

from aqua_jax.coordinator import messages_pb2 as messages
from aqua_jax.coordinator.door import Peer
from aqua_jax.coordinator.journal import Journal, room_for
from aqua_jax.coordinator.records import MOST_RANGES, PAGE, ArenaTerms, Entry
from aqua_jax.coordinator.server import Server
from aqua_jax.coordinator.service import Service, Session
from aqua_jax.errors import CoordinatorError, LedgerError
from aqua_jax.memory.arena import Arena
from aqua_jax.memory.client import Client
from aqua_jax.memory.link import Link
from tests.coordinator.running import Raw, coordinator
from tests.faults.coordinated import borrower
from tests.memory.lending import new_name, wait_for

MIB = 1 << 20


def test_an_arena_after_a_refused_one_keeps_the_journal_that_is_written():
    """Both would have had the same number; an empty journal would give a holder's bytes away."""
    path = new_name()
    with coordinator(path, "--term_s=1") as running, borrower(path, "one") as one:
        with Arena.create(MIB) as arena, Client(path, name="lender") as client:
            with pytest.raises(LedgerError):
                client.lend(arena, [(0, PAGE + 1)])
            client.lend(arena)
            assert one.ask(f"borrow {MIB}") == "clean"
            one.signal(signal.SIGSTOP)  # nobody but the journal knows of it
            running.kill()
            running.start()
            wait_for(lambda: running.status().arenas, "the lender is back")
            assert running.held() == MIB
            with Client(path, name="two") as two:
                assert two.borrow(PAGE) is None


@pytest.mark.parametrize("restarted", [False, True])
def test_what_is_lent_while_the_coordinator_comes_back_has_one_owner(monkeypatch, restarted):
    """The word that it is lent and the list of all that is lent go out at the same moment."""
    path = new_name()
    with coordinator(path, "--term_s=5") as running, Arena.create(4 * MIB) as arena:
        with Client(path, name="lender", timeout_s=5.0) as client:
            lending = client.lend(arena, [(0, MIB)])
            begin, tell, listed = client._link.begin, client._link.tell, threading.Event()

            def late(*args, **body):
                if "lend" in body and not listed.is_set():
                    if restarted:
                        running.kill()
                        running.start()
                    else:
                        client._link._call.cancel()
                    listed.wait(1.0)
                return begin(*args, **body)

            def told(**body):
                number = tell(**body)
                if "register" in body:
                    listed.set()
                return number

            monkeypatch.setattr(client._link, "begin", late)
            monkeypatch.setattr(client._link, "tell", told)
            refused = []
            try:
                lending.lend(MIB, MIB)
            except LedgerError as error:
                refused.append(error)
            assert listed.wait(60.0)
            wait_for(lambda: running.status().arenas)
            for _ in range(2):  # and it stays so
                wait_for(lambda: lending.lent == running.status().arenas[0].lent, "one owner")
                time.sleep(0.2)
            assert not refused and lending.lent in (MIB, 2 * MIB)


def test_an_arena_that_is_registered_too_late_is_not_lent(running):
    """Whoever offered it has been told that it failed, and uses the memory."""
    with Arena.create(MIB) as arena, Client(running.path, name="hasty", timeout_s=0.3) as client:
        running.signal(signal.SIGSTOP)
        try:
            with pytest.raises(CoordinatorError):
                client.lend(arena)
        finally:
            running.signal(signal.SIGCONT)
        wait_for(lambda: _answers(client))
        wait_for(lambda: not running.status().arenas, "it is lent no more")
        again = client.lend(arena)
        assert again.alive and [row.lent for row in running.status().arenas] == [MIB]
        again.close()


def _answers(client):
    with contextlib.suppress(CoordinatorError):
        return client.borrow(1 << 40) is None
    return False


def test_bytes_come_back_once_even_if_they_do_while_their_lender_is_cut_off(running):
    with Arena.create(2 * MIB) as arena, Client(running.path, name="holder") as holder:
        whole = [messages.Span(start=0, end=2 * MIB)]
        terms = messages.Terms(size=2 * MIB)
        with Raw(running.path) as raw:
            raw.entry.give(1, [arena.fd])
            number = raw.ask(register=messages.Register(tag=1, terms=terms, lent=whole))
            number = number.registered.arena
            journal = raw.entry.take(b"J", number)
            (loan,) = holder.borrow(MIB)
            raw.ask(reclaim=messages.Reclaim(
                arena=number, limit=MIB, revoke=True, deadline_ms=9000
            ))
            key = raw.key
        wait_for(lambda: not any(r.state == "connected" and r.name == "raw"
                                 for r in running.status().clients))
        with Raw(running.path, key=key, arenas=[number]) as raw:
            loan.close()
            wait_for(lambda: running.held() == 0)
            raw.ask(reclaim=messages.Reclaim(
                arena=number, limit=0, revoke=True, deadline_ms=9000
            ))
            time.sleep(0.1)
            raw.entry.give(2, [arena.fd, journal])
            os.close(journal)
            raw.say(register=messages.Register(tag=2, arena=number, terms=terms, lent=whole))
            last = raw.say(renew=messages.Renew())
            back = []
            while (message := raw.hear()).id != last:
                if message.HasField("returned"):
                    back.append((message.returned.span.start, message.returned.span.end))
            assert sum(end - start for start, end in back) <= 2 * MIB, back
            raw.ask(leave=messages.Leave())


def test_an_answer_that_cannot_be_used_keeps_nobody_waiting(running, lent, monkeypatch):
    with Client(running.path, timeout_s=2.0) as client:
        taken, came = type(client._link.entry).take, []

        def take(entry, letter, number):
            if not came:
                came.append(number)
                raise CoordinatorError("no descriptor came: too many open files")
            return taken(entry, letter, number)

        monkeypatch.setattr(type(client._link.entry), "take", take)
        failed = []

        def ask():
            try:
                client.borrow(MIB)
            except CoordinatorError as error:
                failed.append(error)

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(60.0)
        assert failed and not thread.is_alive(), "it waits for ever"
        wait_for(lambda: client.connected)
        wait_for(lambda: running.held() == 0, "and nothing is held for it")
        assert client.borrow(MIB) is not None


def test_what_is_said_during_the_greeting_is_said_after_it(running):
    """It isn't in the greeting, and mustn't be nowhere."""
    numbers = []
    links = []

    def hello(key):
        numbers.append(links[-1].tell(renew=messages.Renew()))
        return messages.Hello(key=key, name="quick")

    for _ in range(20):
        links.append(Link(
            running.path, 5.0, hello=hello, joined=lambda link: None,
            heard=lambda link, message: None, answered=lambda link, message, awaited: None,
        ))
        links[-1].start(True)
        links[-1].close()
    assert len(numbers) == 20 and all(numbers)


def test_a_greeting_of_somebody_who_has_hung_up_names_no_other_process():
    """Its descriptor of the process is closed by then, and the number may be another's."""

    async def greet():
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        service = Service(term_s=5)
        service.start()
        try:
            peer = Peer(here, os.getpid(), os.pidfd_open(os.getpid()))
            session = Session(peer)
            peer.on_close = session.end
            asyncio.get_running_loop().add_reader(here, lambda: None)
            number = peer.pidfd
            peer.close()
            other = os.open(os.devnull, os.O_RDONLY)
            if other != number:
                os.dup2(other, number)
                os.close(other)
            service.hello(session, 1, messages.Hello(name="gone"))
            assert not service.ledger.clients and not service._processes
            os.close(number)
        finally:
            there.close()
            await service.stop()

    asyncio.run(greet())


def test_a_journal_for_which_there_is_no_memory_keeps_what_it_said():
    """A cut write is an error, and the next one spares what the last good one wrote."""
    size = 64 * PAGE
    journal = Journal.create(size)
    first = [Entry(1, 1, 1, "one", (1, 1), 0, PAGE, ((0, PAGE),), 0, 0.0)]
    second = [Entry(2, 2, 2, "two", (2, 2), PAGE, PAGE, ((PAGE, 2 * PAGE),), 0, 0.0)]
    journal.write(first)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        # Memory that ends in the middle of the second half.
        resource.setrlimit(resource.RLIMIT_FSIZE, (room_for(size) + 40, hard))
        for _ in range(2):
            with pytest.raises(OSError):
                journal.write(second)
            assert Journal.adopt(journal.fd, size)[1] == first
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    journal.write(second)
    assert Journal.adopt(journal.fd, size)[1] == second
    journal.close()


def test_no_janitor_sees_a_socket_that_does_not_listen_yet(tmp_path, monkeypatch):
    """Between being bound and listening it looks like one that a dead coordinator left."""
    path, seen, there = str(tmp_path / "socket"), [], []
    made = grpc.aio.server

    class Watched:
        def __init__(self, **options):
            self.server = made(**options)

        def __getattr__(self, name):
            return getattr(self.server, name)

        def add_insecure_port(self, address):
            fd = os.open(tmp_path, os.O_RDONLY)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                seen.append("anybody may look")
            except BlockingIOError:
                seen.append("locked")
            finally:
                os.close(fd)
            return self.server.add_insecure_port(address)

    monkeypatch.setattr(grpc.aio, "server", Watched)

    async def serve():
        server = Server(path, Service(term_s=5))
        await server.start()
        there.extend(os.listdir(tmp_path))
        await server.stop()

    asyncio.run(serve())
    assert sorted(there) == ["socket", "socket.fd"]
    assert seen == ["locked"] and not os.listdir(tmp_path)


def test_whoever_has_all_ranges_is_told_that_all_are_lost():
    """At once, when their lender dies; that is no reason to hang up."""

    async def lose():
        service = Service(term_s=5)
        service.start()
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            asyncio.get_running_loop().add_reader(here, lambda: None)
            peer = Peer(here, os.getpid(), os.pidfd_open(os.getpid()))
            session = Session(peer)
            service.hello(session, 1, messages.Hello(key=2))
            ledger = service.ledger
            ledger.join(1)
            size = MOST_RANGES * PAGE
            arena = ledger.register(1, ArenaTerms(size), [(0, size)]).id
            ledger.next_dirty(size)
            ledger.scrubbed(arena, 0, size)
            for _ in range(MOST_RANGES):
                ledger.borrow(2, PAGE)
            before = session.outbox.qsize()
            ledger.remove(1)
            service.flush()
            assert session.outbox.qsize() == before + MOST_RANGES and not session.ended
            peer.close()
        finally:
            there.close()
            await service.stop()

    asyncio.run(lose())
