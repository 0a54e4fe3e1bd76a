"""Hostile and broken clients get typed errors; nobody else notices."""

import contextlib
import os
import socket

import grpc
import pytest

from aqua_jax.coordinator import messages_pb2 as messages
from aqua_jax.coordinator import sockets
from aqua_jax.errors import CoordinatorError
from aqua_jax.memory.arena import PAGE, Arena
from aqua_jax.memory.client import Client
from aqua_jax.memory.link import STATUS, Entry
from tests.coordinator.running import Raw
from tests.faults.coordinated import borrower
from tests.memory.lending import wait_for

MIB = 1 << 20


BAD = [-1, -(2**63), 2**63 - 1, 2**62 + 1]


def _bad_messages(loan):
    generation, other = loan.generation, 1
    for bad in BAD:
        yield {"borrow": messages.Borrow(bytes=bad, unit=1, pieces=1, minimum=1)}
        yield {"borrow": messages.Borrow(bytes=PAGE, unit=bad, pieces=1, minimum=1)}
        yield {"borrow": messages.Borrow(bytes=PAGE, unit=1, pieces=bad, minimum=1)}
        yield {"borrow": messages.Borrow(bytes=PAGE, unit=1, pieces=1, minimum=bad)}
        if bad != -1:
            yield {"borrow": messages.Borrow(
                bytes=PAGE, unit=1, pieces=1, minimum=1, priority=bad
            )}
        yield {"give_back": messages.GiveBack(generation=generation, start=bad, end=PAGE)}
        yield {"reclaim": messages.Reclaim(arena=loan.arena, limit=bad, revoke=True)}
        yield {"reclaim": messages.Reclaim(arena=loan.arena, deadline_ms=bad, revoke=True)}
        yield {"lend": messages.Lend(arena=loan.arena, span=messages.Span(start=bad, end=0))}
    yield {"borrow": messages.Borrow(bytes=PAGE, unit=1, pieces=1, minimum=1, prefer=["x"] * 99)}
    yield {"borrow": messages.Borrow(bytes=PAGE, unit=1, pieces=1, minimum=1, prefer=["x\n"])}
    for number in (generation, other, 0, 2**63, 2**64 - 1):  # somebody else's, never, ...
        yield {"give_back": messages.GiveBack(generation=number, start=0, end=PAGE)}
        yield {"give_up": messages.GiveUp(generation=number)}
    for number in (loan.lease, 0, other, 2**64 - 1):
        yield {"free": messages.Free(lease=number)}
    for number in (loan.arena, 0, 2**64 - 1):
        yield {"unregister": messages.Unregister(arena=number)}
        yield {"reclaim": messages.Reclaim(arena=number, limit=0, revoke=False)}
        for told in (0, 1, 2**64 - 1):
            yield {"scrubbed": messages.Scrubbed(arena=number, number=told)}
    one = {"bytes": PAGE, "unit": 1, "pieces": 1, "minimum": 1}
    yield {"borrow": messages.Borrow(kinds=["x"] * 99, **one)}
    yield {"borrow": messages.Borrow(kinds=["x\n"], **one)}
    yield {"borrow": messages.Borrow(avoid=range(1 << 17), **one)}
    yield {"hello": messages.Hello(name="again")}
    yield {"hello": messages.Hello(key=5, name="somebody")}
    yield {}


def test_nonsense_is_answered_with_typed_errors(running, undisturbed):
    with Raw(running.path) as raw:
        for body in _bad_messages(undisturbed):
            answer = raw.ask(**body)
            assert answer.WhichOneof("body") == "error", body
            assert answer.error.kind in ("LedgerError", "StaleHandleError"), answer
            assert answer.error.field or answer.error.kind == "StaleHandleError"
        assert raw.ask(renew=messages.Renew()).WhichOneof("body") == "done", "it may go on"


@pytest.mark.parametrize(
    "hello",
    [
        {"key": 12345}, {"name": "x" * 201}, {"name": "a\nb"}, {"domain": "x" * 999},
        {"claims": [messages.Claim(generation=7), messages.Claim(generation=7)]},
    ],
)
def test_greetings_that_cannot_be_true(running, undisturbed, hello):
    if "key" in hello:  # nothing is known of it, so whoever says it is a new client
        with Raw(running.path, key=undisturbed.generation) as raw:
            assert raw.key == undisturbed.generation and raw.ask(free=messages.Free(
                lease=undisturbed.lease)).WhichOneof("body") == "error"
        return
    with Raw(running.path, hello=False) as raw:
        raw.say(hello=messages.Hello(**hello))
        assert raw.hear().error.kind == "LedgerError"
        assert raw.hear() is None, "and that was it"


def test_somebody_elses_lease_cannot_be_claimed(running, undisturbed):
    span = messages.Span(start=0, end=PAGE)
    claim = messages.Claim(generation=undisturbed.generation, arena=undisturbed.arena, held=[span])
    with Raw(running.path, hello=False) as raw:
        raw.say(hello=messages.Hello(claims=[claim]))
        assert raw.hear().error.field == "generation"
        assert raw.hear() is None


def test_bytes_that_are_no_message(running, undisturbed):
    for first in (True, False):
        with Raw(running.path, hello=not first) as raw:
            raw.said.put(b"\xff" * 50)
            assert raw.hear().error.field == "message"
            assert raw.hear() is None
    with Raw(running.path, hello=False) as raw:
        raw.said.put(b"\0" * (5 << 20))
        assert raw.hear() is None


def test_calls_without_a_token_are_refused(running, undisturbed):
    for token in ((), (("aqua-token", "00" * 16),), (("aqua-token", "x"),)):
        with grpc.insecure_channel(sockets.target_of(running.path)) as channel:
            with pytest.raises(grpc.RpcError) as caught:
                channel.unary_unary(STATUS)(b"", timeout=60, metadata=token)
            assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED


def test_a_token_serves_one_connection(running, undisturbed):
    with Raw(running.path) as raw:
        with grpc.insecure_channel(sockets.target_of(running.path)) as channel:
            call = channel.stream_stream("/aqua_jax.coordinator.Coordinator/Attach")(
                iter([b""]), timeout=60, metadata=(("aqua-token", raw.entry.token.hex()),)
            )
            with pytest.raises(grpc.RpcError):
                next(call)
        assert raw.ask(renew=messages.Renew()).HasField("done")


def test_half_messages_and_silence(running, undisturbed):
    """Connections that say nothing, half of something, or the wrong thing, to both sockets."""
    address = sockets.address_of(running.path)
    connections = []
    for data in (b"", b"PRI * HTTP/2.0\r\n\r\nSM\r\n", b"GET / HTTP/1.1\r\n\r\n", os.urandom(500)):
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.connect(address)
        connection.sendall(data)
        connections.append(connection)
    for data in (b"D", b"D" + bytes(8), os.urandom(60), b"Z" + bytes(8)):
        entry = Entry(running.path, 10.0)
        entry.socket.sendall(data)
        assert entry.socket.recv(10) == b"", "it hangs up"
        entry.close()
    for connection in connections:
        connection.close()


def test_a_flood_of_connections(running, undisturbed):
    """More than there is room for: those who are in stay in, later ones get in again."""
    entries, refused = [], 0
    for _ in range(400):
        try:
            entries.append(Entry(running.path, 10.0))
        except CoordinatorError:
            refused += 1
    assert refused > 200
    assert running.process.child.poll() is None
    with pytest.raises(CoordinatorError):
        Client(running.path, timeout_s=0.5)
    # Others' processes come in all the same.
    with borrower(running.path) as other:
        assert other.ask("borrow 4096") == "clean" and other.ask("close") == "ok"
    for entry in entries:
        entry.close()
    wait_for(lambda: Entry(running.path, 10.0).close() is None)


def test_no_process_takes_all_places(running, undisturbed):
    """Of 64; two are taken by the lender and the holder of this test, in this process."""
    with contextlib.ExitStack() as stack:
        for _ in range(30):
            stack.enter_context(Raw(running.path))
        with pytest.raises(CoordinatorError, match="32 clients of one process"):
            Client(running.path, timeout_s=2.0)
        with borrower(running.path) as other:
            assert other.ask("borrow 4096") == "clean" and other.ask("close") == "ok"
    wait_for(lambda: len(running.status().clients) == 2)


def test_a_flood_of_requests(running, undisturbed):
    with Raw(running.path) as raw:
        for _ in range(3000):
            raw.say(borrow=messages.Borrow(bytes=2**40, unit=1, pieces=64, minimum=1 << 40))
        for _ in range(1000):
            raw.say(give_back=messages.GiveBack(generation=1, start=0, end=PAGE))
        last = raw.say(renew=messages.Renew())
        heard = set()
        while last not in heard:
            message = raw.hear()
            assert message is not None
            heard.add(message.id)
        assert len(heard) >= 4001


def test_a_client_that_reads_nothing_stops_nobody(running, undisturbed):
    with Raw(running.path) as raw:
        for _ in range(20000):
            raw.say(give_back=messages.GiveBack(generation=1, start=0, end=PAGE))
        assert running.status().clients


@pytest.mark.parametrize(
    "memory",
    ["unsealed", "small", "file", "none", "two", "hole", "twice"],
)
def test_memory_that_cannot_be_trusted_is_not_lent(running, undisturbed, memory, tmp_path):
    with Arena.create(MIB) as good, Raw(running.path) as raw:
        fds, size, extra = [good.fd], MIB, None
        if memory == "unsealed":
            extra = os.memfd_create("test")
            os.truncate(extra, MIB)
        elif memory == "file":
            extra = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
            os.truncate(extra, MIB)
        elif memory == "small":
            size = 2 * MIB
        elif memory == "two":
            fds = [good.fd, good.fd]
        elif memory == "hole":
            good.vacate(0, MIB)
        if extra is not None:
            fds = [extra]
        if memory != "none":
            raw.entry.give(7, fds)
        register = messages.Register(
            tag=7, terms=messages.Terms(size=size), lent=[messages.Span(start=0, end=size)]
        )
        answer = raw.ask(register=register)
        if memory == "twice":
            assert answer.HasField("registered")
            raw.entry.give(8, fds)
            register.tag = 8
            answer = raw.ask(register=register)
        assert answer.error.kind == "LedgerError", answer
        if extra is not None:
            os.close(extra)
        raw.ask(leave=messages.Leave())


def test_borrowed_memory_cannot_be_lent_on(running, undisturbed):
    """Its borrower has the descriptor of the whole arena."""
    with Raw(running.path) as raw:
        wish = messages.Borrow(bytes=PAGE, unit=PAGE, pieces=1, minimum=PAGE)
        piece = raw.ask(borrow=wish).granted.pieces[0]
        fd = raw.entry.take(b"A", piece.arena)
        raw.entry.give(9, [fd])
        os.close(fd)
        answer = raw.ask(register=messages.Register(
            tag=9, terms=piece.terms, lent=[messages.Span(start=0, end=PAGE)]
        ))
        assert answer.error.field == "descriptor"
        # Nor can an arena be taken over.
        for arena in (piece.arena, 77):
            raw.entry.give(arena, [raw.entry.socket.fileno(), raw.entry.socket.fileno()])
            answer = raw.ask(register=messages.Register(tag=arena, arena=arena, terms=piece.terms))
            assert answer.error.kind == "LedgerError"
        raw.ask(leave=messages.Leave())
