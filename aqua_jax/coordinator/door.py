"""Where descriptors go in and out, and where it is seen who a client is.

gRPC can carry neither descriptors nor the name of the process at the other end. So a client first
connects here, to a second Unix socket beside gRPC's: the system says which process it is, and the
client gets a token that its gRPC calls must show. Without one they are refused, so only processes
that can come in here (of this user) have any say.

The socket keeps messages apart (SOCK_SEQPACKET). A message is a letter, a number (64 bits), and
descriptors beside it:

| from | letter | number | descriptors |
|---|---|---|---|
| door | `T` | 0; then 16 bytes, the token | |
| door | `A` | arena | its memory |
| door | `J` | arena | its journal, to be kept |
| client | `D` | tag | an arena's memory, and its journal if it has one |
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import fcntl
import os
import secrets
import socket
import struct
from collections.abc import Callable

from aqua_jax.coordinator.sockets import Listener, peer_of, started
from aqua_jax.errors import LedgerError

HEAD = struct.Struct("<cQ")
TOKEN_BYTES = 16
_MOST_TAGS = 64  # descriptors of a client that no message has asked for yet
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_FORBIDDEN = 0x0008 | 0x0010  # F_SEAL_WRITE, F_SEAL_FUTURE_WRITE: it couldn't be zeroed


def receive(connection: socket.socket) -> tuple[bytes, int, bytes, list[int]]:
    """A message: letter, number, the rest, descriptors (owned); (b"", 0, b"", []) at the end.

    Raises:
      OSError: nothing there, or the connection has broken.
      LedgerError: no message. Its descriptors have been closed.
    """
    fds = array.array("i")
    data, ancillary, flags, _ = connection.recvmsg(
        64, socket.CMSG_LEN(4 * fds.itemsize), socket.MSG_CMSG_CLOEXEC
    )
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
    if not data and not fds:
        return b"", 0, b"", []
    if len(data) < HEAD.size or flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC) or len(fds) > 2:
        for fd in fds:
            os.close(fd)
        raise LedgerError("message", data[:40], "a letter, a number, at most two descriptors")
    letter, number = HEAD.unpack_from(data)
    return letter, number, data[HEAD.size :], list(fds)


def send(
    connection: socket.socket, letter: bytes, number: int, fds: list[int], rest: bytes = b""
) -> None:
    """Sends a message; doesn't wait where the connection doesn't.

    Raises:
      OSError: it can't be sent (now).
    """
    socket.send_fds(connection, [HEAD.pack(letter, number) + rest], fds)


def check_memory(fd: int, size: int, lent: int) -> tuple[int, int]:
    """The identity of memory of `size` bytes, if `lent` of them can be lent.

    Raises:
      LedgerError: it isn't sealed shared memory of that size that is really there.
    """
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        found = os.fstat(fd)
    except OSError as error:
        raise LedgerError("descriptor", str(error), "shared memory") from error
    if seals & _SEALS != _SEALS or seals & _FORBIDDEN:
        raise LedgerError("seals", seals, f"{_SEALS}: it can't change its size, and be written")
    if found.st_size < size:
        raise LedgerError("size", size, f"at most {found.st_size}, the memory's")
    if found.st_blocks * 512 < lent:
        raise LedgerError("lent", lent, f"at most {found.st_blocks * 512}, what is really there")
    return found.st_dev, found.st_ino


class Peer:
    """A process that has come to the door.

    Attributes:
      pid: its id.
      identity: id and start time.
      pidfd: readable when it has exited; the peer's.
      token: what its calls show.
      attached: whether it has a connection of gRPC's.
    """

    def __init__(self, connection: socket.socket, pid: int, pidfd: int) -> None:
        self.connection, self.pid, self.pidfd = connection, pid, pidfd
        self.identity = pid, started(pid)
        self.token = secrets.token_bytes(TOKEN_BYTES)
        self._given: dict[int, list[int]] = {}  # by tag
        self._news = asyncio.Event()
        self.closed = self.attached = False
        self.left: Callable[[Peer], None] = lambda peer: None  # for the door
        self.on_close: Callable[[], None] = lambda: None

    def give(self, letter: bytes, number: int, fd: int) -> None:
        """Hands over a descriptor.

        Raises:
          OSError: the client doesn't take them.
        """
        send(self.connection, letter, number, [fd])

    async def taken(self, tag: int, timeout_s: float) -> list[int]:
        """The descriptors that the client has given under `tag`; they are the caller's now.

        Raises:
          LedgerError: there are none.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while tag not in self._given and not self.closed:
                    self._news.clear()
                    await self._news.wait()
        if tag not in self._given:
            raise LedgerError("tag", tag, "one under which descriptors have come")
        return self._given.pop(tag)

    def _readable(self) -> None:
        try:
            letter, number, _, fds = receive(self.connection)
        except BlockingIOError:
            return
        except (OSError, LedgerError):
            self.close()
            return
        good = letter == b"D" and fds and number not in self._given
        if not good or len(self._given) >= _MOST_TAGS:
            for fd in fds:
                os.close(fd)
            self.close()
            return
        self._given[number] = fds
        self._news.set()

    def close(self) -> None:
        """Ends the connection; may be repeated."""
        if self.closed:
            return
        self.closed = True
        loop = asyncio.get_running_loop()
        loop.remove_reader(self.connection)
        self.connection.close()
        os.close(self.pidfd)
        for fds in self._given.values():
            for fd in fds:
                os.close(fd)
        self._given.clear()
        self._news.set()
        self.left(self)
        self.on_close()


class Door:
    """The listening socket and those who have come in.

    Raises:
      ConfigError: the path can't be listened on.
    """

    def __init__(self, path: str, most: int) -> None:
        """
        Args:
          path: of the socket.
          most: peers at a time.
        """
        self._listener = Listener(path, kind=socket.SOCK_SEQPACKET)
        self._most = most
        self.peers: dict[bytes, Peer] = {}
        self._pause: asyncio.TimerHandle | None = None

    def open(self) -> None:
        """Starts to let clients in, on the running loop."""
        asyncio.get_running_loop().add_reader(self._listener.socket, self._accept)

    def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        for _ in range(16):  # then others have their turn
            try:
                connection, _ = self._listener.socket.accept()
            except BlockingIOError:
                return
            except OSError:
                # Out of descriptors: who waits in the queue would wake us at once.
                loop.remove_reader(self._listener.socket)
                self._pause = loop.call_later(0.1, self.open)
                return
            try:
                connection.setblocking(False)
                pid, user, pidfd = peer_of(connection)
            except OSError:
                connection.close()
                continue
            if user not in (os.geteuid(), 0) or not self._room(pid):
                connection.close()
                os.close(pidfd)
                continue
            try:
                peer = Peer(connection, pid, pidfd)
                send(connection, b"T", 0, [], peer.token)
            except OSError:  # gone meanwhile
                connection.close()
                os.close(pidfd)
                continue
            self.peers[peer.token] = peer
            peer.left = self._left
            loop.add_reader(connection, peer._readable)

    def _room(self, pid: int) -> bool:
        """Whether a process may come in.

        Where all places are taken, one that isn't used goes, of whoever has the most of these: a
        process that comes again and again shuts out nobody but itself.
        """
        if len(self.peers) < self._most:
            return True
        idle: dict[int, list[Peer]] = {}
        for peer in self.peers.values():
            if not peer.attached:
                idle.setdefault(peer.pid, []).append(peer)
        most = max(idle.values(), key=len, default=[])
        if len(most) < 2 or most[0].pid == pid:
            return False
        most[0].close()
        return True

    def _left(self, peer: Peer) -> None:
        self.peers.pop(peer.token, None)

    def close(self) -> None:
        """Ends all connections, and listening."""
        if self._pause is not None:
            self._pause.cancel()
        asyncio.get_running_loop().remove_reader(self._listener.socket)
        for peer in list(self.peers.values()):
            peer.close()
        self._listener.close()
