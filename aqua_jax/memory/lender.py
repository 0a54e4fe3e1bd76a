"""A process that owns an arena and lends it: the simplest lender there is.

One thread, one `select`: sleeping when nothing happens. A borrower is a connection with a process
behind it. What it holds comes back when it says so, or when its process has exited; a connection
that closes while the process lives on proves nothing, so such bytes wait (`grants.py`).

Nobody gets to see what others wrote: bytes that come back are zeroed before they are lent again.
Every borrower gets the descriptor of the whole arena, though, so all of them must be processes that
this user trusts; others can't connect.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator

from aqua_jax.closing import Closing
from aqua_jax.coordinator.sockets import Listener, has_exited, peer_of
from aqua_jax.errors import AquaError, ConfigError, FieldError, LenderError, ProtocolError
from aqua_jax.memory import protocol
from aqua_jax.memory.arena import Arena, round_up
from aqua_jax.memory.grants import Grant, Grants
from aqua_jax.memory.lendable import LentMemory

SCRUB_BYTES = 16 << 20  # between two looks at the sockets: about 3 ms
HELLO_S = 5.0  # for a connection to say who it is
_LOOK_S = 0.001  # between two looks at what has come back
MOST_UNSENT = 64 << 10  # a borrower that reads nothing is dropped after so many bytes


@dataclasses.dataclass(eq=False)
class _Client:
    """A borrower's process; `socket` is None once the connection has ended."""

    number: int
    pid: int
    pidfd: int
    socket: socket.socket | None
    hello_by: float
    name: str = ""
    greeted: bool = False
    unsent: bytearray = dataclasses.field(default_factory=bytearray)
    decoder: protocol.Decoder = dataclasses.field(default_factory=protocol.Decoder)
    deadline: float | None = None  # of what it was asked to give back
    overdue: bool = False

    def __str__(self) -> str:
        return f"pid {self.pid}" + (f" ({self.name})" if self.name else "")


class Lender(Closing):
    """Lends `size` bytes at a socket until told to stop.

    Use as a context manager around `serve`, or with `start`, which does so in a thread; `stop`,
    `resize` and `room` may be called by other threads.

    Raises:
      ConfigError: the memory isn't there, or the path can't be listened on.
    """

    def __init__(
        self, size: int, listen: str, *, name: str = "", huge_pages: bool = False,
        drain_s: float = 10.0, max_clients: int = 64, report: Callable[[str], None] | None = None,
        arena: LentMemory | None = None,
    ) -> None:
        """
        Args:
          size: bytes to lend.
          listen: path of the socket, or @name.
          name: told to borrowers.
          huge_pages: advise them for the arena.
          drain_s: seconds borrowers are given when memory is wanted back.
          max_clients: connections, and processes that still hold memory, at a time.
          report: called with a line of text on every change.
          arena: a device's, instead of the host's; owned once the lender is made.
        """
        if len(name) > 200 or not name.isprintable():
            raise ConfigError("name", name, "at most 200 printable characters")
        self._report = report or (lambda line: None)
        self._name, self._drain_s, self._max_clients = name, drain_s, max_clients
        with contextlib.ExitStack() as stack:
            self._listener = Listener(listen)
            stack.callback(self._listener.close)
            lent: LentMemory = arena or Arena.create(size, "aqua-lend", huge_pages=huge_pages)
            self.arena = lent
            stack.callback(self.arena.close)
            self.grants = Grants(self.arena.size)
            self._wake_read, self.wake_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            stack.callback(os.close, self._wake_read)
            stack.callback(os.close, self.wake_fd)
            self._selector = selectors.DefaultSelector()
            stack.callback(self._selector.close)
            self._selector.register(self._listener.socket, selectors.EVENT_READ, None)
            self._selector.register(self._wake_read, selectors.EVENT_READ, None)
            self._stack = stack.pop_all()
        self._clients: dict[int, _Client] = {}
        self._numbers = 0
        self._accept_at = 0.0  # after running out of descriptors
        self._leaving = False
        self._closed = False
        self._new_limit: int | None = None
        self._thread: threading.Thread | None = None

    # What other threads and signal handlers may call.

    def start(self) -> Lender:
        """Serves in a thread of its own until `close`; returns the lender."""
        self._thread = threading.Thread(target=self.serve, name="aqua-lender", daemon=True)
        self._thread.start()
        return self

    @contextlib.contextmanager
    def room(self, size: int, timeout_s: float = 30.0) -> Iterator[None]:
        """Keeps `size` bytes for the caller for the length of a block, and lends the rest.

        What borrowers hold of it is wanted back; the block begins when its memory has gone back to
        the system. Afterwards all is lent again.

        Raises:
          ConfigError: more than the lender has. Nothing changes.
          LenderError: borrowers haven't given it back in time. All is lent as before.
        """
        limit = self.arena.size - round_up(size)
        self.resize(limit)
        try:
            end = time.monotonic() + timeout_s
            while self.arena.size - self.grants.withheld.total > limit:
                if time.monotonic() > end or self._closed:
                    raise LenderError(
                        f"borrowers keep {self.grants.held} bytes; wanted: at most {limit}, within "
                        f"{timeout_s} s"
                    )
                time.sleep(_LOOK_S)
            yield
        finally:
            self.resize(self.arena.size)

    def stop(self) -> None:
        """Asks for everything back; `serve` returns when it has come."""
        self._leaving = True
        self._wake()

    def resize(self, size: int) -> None:
        """Sets how many bytes are lent at most, from 0 to the arena's size.

        What is above is asked back, and its memory returned to the system as it comes.
        """
        Grants(self.arena.size).resize(size)  # raises for what isn't possible
        self._new_limit = size
        self._wake()

    def _wake(self) -> None:
        if not self._closed:
            self._knock()

    def _knock(self) -> None:
        with contextlib.suppress(BlockingIOError):  # full: it is awake already
            os.write(self.wake_fd, b"x")

    # The loop.

    def serve(self, stopping: Callable[[], bool] = lambda: False) -> None:
        """Lends until told to stop, and everything lent has been given back.

        Args:
          stopping: looked at whenever the loop wakes up (a signal handler that sets a flag writes
            to `wake_fd` by `signal.set_wakeup_fd`).
        """
        while True:
            if stopping() and not self._leaving:
                self._leaving = True
                self._say("leaving when everything is back; a second signal leaves at once")
            if self._closed:
                return
            self._settle()
            if self._leaving and not self.grants.held:
                self._say("everything is back, leaving")
                return
            for key, mask in self._selector.select(self._patience()):
                if key.fileobj is self._listener.socket:
                    self._accept()
                elif key.fd == self._wake_read:
                    with contextlib.suppress(BlockingIOError):
                        os.read(self._wake_read, 4096)
                elif key.data.number in self._clients:  # not ended by an earlier event
                    self._client_event(key.data, key.fd, mask)
            self._scrub(SCRUB_BYTES)
            self._watch_time()

    def _patience(self) -> float | None:
        """Seconds that `select` may sleep; None: until something happens."""
        if self.grants.dirty.total:
            return 0.0
        times = [c.hello_by for c in self._clients.values() if not c.greeted]
        times += [
            c.deadline for c in self._clients.values() if c.deadline is not None and not c.overdue
        ]
        if self._accept_at:
            times.append(self._accept_at)
        return max(0.0, min(times) - time.monotonic()) if times else None

    def _watch_time(self) -> None:
        now = time.monotonic()
        if self._accept_at and now >= self._accept_at:
            self._accept_at = 0.0
            self._selector.register(self._listener.socket, selectors.EVENT_READ, None)
        for client in list(self._clients.values()):
            if not client.greeted and now >= client.hello_by:
                self._drop(client, "said nothing")
            elif client.deadline is not None and now >= client.deadline and not client.overdue:
                client.overdue = True
                self._say(f"{client} is late; its memory stays its own until it gives it back")

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.socket.accept()
            except BlockingIOError:
                return
            except OSError:
                # No descriptors left: the connection stays in the queue and would wake us at once.
                self._selector.unregister(self._listener.socket)
                self._accept_at = time.monotonic() + 0.1
                return
            try:
                connection.setblocking(False)
                pid, user, pidfd = peer_of(connection)
            except OSError:
                connection.close()  # exited meanwhile
                continue
            if user not in (os.geteuid(), 0) or len(self._clients) >= self._max_clients:
                with contextlib.suppress(OSError):
                    connection.send(protocol.encode(
                        "error", field="connections", value=str(len(self._clients)),
                        allowed=f"{self._max_clients}, of this user",
                    ))
                os.close(pidfd)
                connection.close()
                continue
            self._numbers += 1
            client = _Client(
                self._numbers, pid, pidfd, connection, time.monotonic() + HELLO_S
            )
            self._clients[client.number] = client
            self._selector.register(connection, selectors.EVENT_READ, client)
            self._selector.register(pidfd, selectors.EVENT_READ, client)

    def _client_event(self, client: _Client, fd: int, mask: int) -> None:
        if fd == client.pidfd:
            self._exited(client)
            return
        if mask & selectors.EVENT_WRITE:
            self._flush(client)
        if mask & selectors.EVENT_READ and client.socket is not None:
            self._receive(client, client.socket)

    def _receive(self, client: _Client, connection: socket.socket) -> None:
        try:
            data = connection.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._drop(client, "hung up")
            return
        client.decoder.feed(data)
        try:
            while client.socket is not None and (message := client.decoder.next()) is not None:
                self._handle(client, message)
        except FieldError as error:
            self._send(
                client, "error", field=error.field, value=repr(error.value)[:100],
                allowed=error.allowed[:500],
            )
            self._drop(client, f"sent a bad message ({str(error)[:200]})")
        except AquaError as error:
            self._send(client, "error", field="generation", value="", allowed=str(error)[:500])
            self._drop(client, f"sent a bad message ({error})")

    # What borrowers ask.

    def _handle(self, client: _Client, message: protocol.Message) -> None:
        kind = message["type"]
        if not client.greeted and kind != "hello":
            raise ProtocolError("type", kind, "hello, the first message")
        handler = {
            "hello": self._hello, "borrow": self._borrow, "give_back": self._give_back,
            "resize": self._resize, "status": self._status,
        }.get(kind)
        if handler is None:
            raise ProtocolError("type", kind, "a message that borrowers send")
        handler(client, message)

    def _hello(self, client: _Client, message: protocol.Message) -> None:
        if client.greeted:
            raise ProtocolError("type", "hello", "once")
        protocol.whole(message, "version", protocol.VERSION, protocol.VERSION)
        client.name = protocol.text(message, "name")
        client.greeted = True
        welcome = protocol.encode(
            "welcome", version=protocol.VERSION, name=self._name, bytes=self.arena.size,
            memory=self.arena.kind, device=self.arena.device,
        )
        assert client.socket is not None
        try:
            # The first bytes to a fresh socket: there is room for them.
            socket.send_fds(client.socket, [welcome], [self.arena.fd])
        except OSError:
            self._drop(client, "hung up")

    def _borrow(self, client: _Client, message: protocol.Message) -> None:
        number = protocol.whole(message, "id")
        size = protocol.whole(message, "bytes", 1)
        grant = None if self._leaving else self.grants.grant(client.number, size)
        if grant is None and not self._leaving and self.grants.dirty.total:
            self._scrub(self.grants.dirty.total)
            grant = self.grants.grant(client.number, size)
        if grant is None:
            free = 0 if self._leaving else self.grants.free.total
            longest = 0 if self._leaving else self.grants.free.longest
            self._send(client, "refused", id=number, free=free, longest=longest)
            self._say(f"refused {_mib(size)} to {client}")
            return
        self._send(
            client, "granted", id=number, generation=grant.generation, offset=grant.offset,
            bytes=grant.size,
        )
        self._say(f"lent {_mib(grant.size)} to {client}")

    def _give_back(self, client: _Client, message: protocol.Message) -> None:
        number = protocol.whole(message, "id")
        size = protocol.whole(message, "bytes", 1)
        self.grants.give_back(
            client.number, protocol.whole(message, "generation"),
            protocol.whole(message, "offset"), size,
        )
        self._send(client, "freed", id=number)
        self._say(f"{client} gave back {_mib(size)}")

    def _resize(self, client: _Client, message: protocol.Message) -> None:
        number = protocol.whole(message, "id")
        self.grants.resize(protocol.whole(message, "bytes", 0, self.arena.size))
        self._send(client, "resized", id=number)
        self._say(f"{client} asks to lend at most {_mib(self.grants.limit)}")

    def _status(self, client: _Client, message: protocol.Message) -> None:
        grants = self.grants
        self._send(
            client, "status", id=protocol.whole(message, "id"), bytes=grants.size,
            limit=grants.limit, free=grants.free.total + grants.dirty.total, lent=grants.held,
            asked=grants.wanted, leases=len(grants.all()),
        )

    # Keeping the books true.

    def _settle(self) -> None:
        """Brings memory, limit and what borrowers have been told together."""
        if self._new_limit is not None:
            limit, self._new_limit = self._new_limit, None
            self.grants.resize(limit)
            self._say(f"lending at most {_mib(self.grants.limit)}")
        if self._leaving:
            self.grants.resize(0)
        while (taken := self.grants.next_to_withhold()) is not None:
            self.arena.vacate(taken[0], taken[1] - taken[0])
        while (taken := self.grants.next_to_restore()) is not None:
            try:
                self.arena.occupy(taken[0], taken[1] - taken[0])
            except AquaError as error:
                self.grants.not_restored(*taken)
                self._say(str(error))
            else:
                self.grants.restored(*taken)
        for grant in self.grants.ask():
            self._ask(grant)
        wanted = {grant.owner for grant in self.grants.all() if grant.wanted}
        for client in self._clients.values():
            if client.number not in wanted:
                client.deadline, client.overdue = None, False

    def _ask(self, grant: Grant) -> None:
        client = self._clients.get(grant.owner)
        if client is None:  # it exited while others were told
            return
        if grant.wanted and client.deadline is None:
            client.deadline = time.monotonic() + self._drain_s
        left = max(0.0, (client.deadline or 0.0) - time.monotonic())
        if grant.wanted:
            self._say(f"asked {client} for {_mib(grant.wanted)} within {left:.1f} s")
        self._send(
            client, "reclaim", generation=grant.generation, keep=grant.keep,
            deadline_ms=int(left * 1000),
        )

    def _scrub(self, most: int) -> None:
        while most > 0 and (taken := self.grants.next_dirty(most)) is not None:
            self.arena.scrub(taken[0], taken[1] - taken[0])
            self.grants.scrubbed(*taken)
            most -= taken[1] - taken[0]

    # Connections.

    def _send(self, client: _Client, kind: str, **fields: int | str) -> None:
        if client.socket is not None:
            client.unsent += protocol.encode(kind, **fields)
            self._flush(client)

    def _flush(self, client: _Client) -> None:
        if client.socket is None:
            return
        try:
            while client.unsent:
                del client.unsent[: client.socket.send(client.unsent)]
        except BlockingIOError:
            pass
        except OSError:
            return  # the read side will say so
        if len(client.unsent) > MOST_UNSENT:
            self._drop(client, "doesn't read")
            return
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if client.unsent else 0)
        self._selector.modify(client.socket, events, client)

    def _drop(self, client: _Client, why: str) -> None:
        """Ends a connection; what its process holds waits for the process to exit."""
        if client.number not in self._clients:
            return
        if client.socket is not None:
            self._selector.unregister(client.socket)
            client.socket.close()
            client.socket, client.greeted = None, True
        client.deadline = None
        held = self.grants.quarantine(client.number)
        if not held:
            self._forget(client)
            if why != "hung up":
                self._say(f"{client} {why}")
        elif has_exited(client.pidfd):
            self._exited(client)
        else:
            self._say(f"{client} {why} with {_mib(held)}, which waits for it to exit")

    def _exited(self, client: _Client) -> None:
        freed = self.grants.exited(client.number)
        self._forget(client)
        if freed:
            self._say(f"{client} exited with {_mib(freed)}, which is back")

    def _forget(self, client: _Client) -> None:
        if client.socket is not None:
            self._selector.unregister(client.socket)
            client.socket.close()
            client.socket = None
        self._selector.unregister(client.pidfd)
        os.close(client.pidfd)
        del self._clients[client.number]

    def _say(self, event: str) -> None:
        grants, count = self.grants, len(self.grants.all())
        free = grants.free.total + grants.dirty.total
        self._report(
            f"{event}; {_mib(grants.held)} lent in {count} lease{'' if count == 1 else 's'}, "
            f"{_mib(free)} free"
        )

    def close(self) -> None:
        """Ends all connections and the arena, whoever holds it: their mappings stay valid.

        May be repeated.
        """
        closed, self._closed = self._closed, True
        if not closed:
            self._knock()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        for client in list(self._clients.values()):
            self._forget(client)
        self._stack.close()


def _mib(size: int) -> str:
    return f"{size / 2**20:.4g} MiB"
