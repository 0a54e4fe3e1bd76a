"""Unix sockets between processes of one user: addresses, listening, and who is at the other end."""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import os
import select
import socket
import stat
import struct
import time
from collections.abc import Iterator

from aqua_jax.errors import ConfigError, LenderError

PATH_LIMIT = 107  # bytes: sockaddr_un has 108 with the final zero
_SO_PEERPIDFD = 77  # Linux 6.5; the socket module doesn't name it
_CREDENTIALS = struct.Struct("iII")
_LOCK_TRIES, _LOCK_PAUSE_S = 200, 0.01


def address_of(path: str) -> bytes:
    """The socket address that `path` names.

    Args:
      path: a path; or "@name", a name that is in no file system and so can't be left behind.

    Raises:
      ConfigError: empty, too long, or with a zero byte.
    """
    raw = os.fsencode(path)
    bare = raw[1:] if raw.startswith(b"@") else raw
    if not bare or len(raw) > PATH_LIMIT or b"\0" in raw:
        raise ConfigError("listen", path, f"a path, or @name, of at most {PATH_LIMIT} bytes")
    return b"\0" + bare if raw.startswith(b"@") else raw


def door_of(path: str) -> str:
    """Where the coordinator at `path` takes and gives descriptors: beside it."""
    return f"{path}.fd"


def target_of(path: str) -> str:
    """`path` as gRPC writes it."""
    if path.startswith("@"):
        return f"unix-abstract:{path[1:]}"
    return f"unix:{os.path.abspath(path)}"


def remove_stale(path: str, kind: int = socket.SOCK_STREAM) -> None:
    """Removes a socket file that nobody listens on.

    Raises:
      ConfigError: somebody does, or it is something else.
    """
    if not path.startswith("@"):
        with directory_lock(path):
            if _is_stale(path, kind):
                os.unlink(path)


@contextlib.contextmanager
def directory_lock(path: str) -> Iterator[None]:
    """One process at a time judges whether a socket file is stale, or makes one.

    A socket that is bound and doesn't listen yet looks stale. Leaves nothing behind; where `path`
    is @name there is nothing to lock.

    Raises:
      ConfigError: no such directory, or somebody else keeps it locked.
    """
    if path.startswith("@"):
        yield
        return
    folder = os.path.dirname(os.path.abspath(path))
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigError("listen", path, f"a path in a directory ({error.strerror})") from error
    try:
        # Counted in tries: by the clock, whoever was stopped meanwhile would never try again.
        for left in reversed(range(_LOCK_TRIES)):
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not left:
                    raise ConfigError(
                        "listen", path, "a path in a directory that nobody else has locked"
                    ) from None
                time.sleep(_LOCK_PAUSE_S)
        yield
    finally:
        os.close(fd)


def _is_stale(path: str, kind: int = socket.SOCK_STREAM) -> bool:
    """Whether a socket file lies at `path` that nobody listens on.

    Raises:
      ConfigError: somebody does, or it is something else.
    """
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return False
    if not stat.S_ISSOCK(mode):
        raise ConfigError("listen", path, "a path where there is no file")
    with socket.socket(socket.AF_UNIX, kind) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return True
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EINPROGRESS):
                raise ConfigError("listen", path, f"one's own socket ({error})") from error
    raise ConfigError("listen", path, "a path that nobody listens on")


class Listener:
    """A listening socket that only this user can reach.

    A stale socket file (of a lender that was killed) is replaced; a live one, or any other file, is
    refused with `ConfigError`.
    """

    def __init__(self, path: str, backlog: int = 64, kind: int = socket.SOCK_STREAM) -> None:
        """
        Args:
          path: where, or @name.
          backlog: connections that may wait.
          kind: SOCK_STREAM, or SOCK_SEQPACKET for sockets that keep messages apart.
        """
        self.path, self._kind = path, kind
        self._identity: tuple[int, int] | None = None
        address = address_of(path)
        self.socket = socket.socket(
            socket.AF_UNIX, kind | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        )
        try:
            # The file takes its mode from the socket: no moment in which others could connect.
            os.fchmod(self.socket.fileno(), 0o600)
            if address[0] == 0:
                self.socket.bind(address)
                self.socket.listen(backlog)
            else:
                self._bind_file(backlog)
        except OSError as error:
            self.socket.close()
            raise ConfigError("listen", path, f"where a socket can be made ({error})") from error
        except ConfigError:
            self.socket.close()
            raise

    def _bind_file(self, backlog: int) -> None:
        with directory_lock(self.path):
            if _is_stale(self.path, self._kind):
                os.unlink(self.path)
            self.socket.bind(self.path)
            self.socket.listen(backlog)
            found = os.lstat(self.path)
            self._identity = found.st_dev, found.st_ino

    def close(self) -> None:
        """Stops listening and removes the socket file, if it is still ours; may be repeated."""
        identity, self._identity = self._identity, None
        if identity is not None:
            with contextlib.suppress(OSError, ConfigError), directory_lock(self.path):
                found = os.lstat(self.path)
                if (found.st_dev, found.st_ino) == identity:
                    os.unlink(self.path)
        self.socket.close()


def connect(path: str, timeout_s: float, kind: int = socket.SOCK_STREAM) -> socket.socket:
    """A connected socket with a timeout.

    Raises:
      LenderError: nobody listens there, or not to us.
      ConfigError: no possible path.
    """
    address = address_of(path)
    connection = socket.socket(socket.AF_UNIX, kind | socket.SOCK_CLOEXEC)
    connection.settimeout(timeout_s)
    end = time.monotonic() + timeout_s
    while True:
        try:
            connection.connect(address)
            return connection
        except BlockingIOError as error:  # its queue is full just now
            if time.monotonic() > end:
                connection.close()
                raise LenderError(f"the lender at {path} is too busy to answer") from error
            time.sleep(0.005)
        except OSError as error:
            connection.close()
            raise LenderError(f"no lender answers at {path}: {error}") from error


def receive(connection: socket.socket, most_fds: int) -> tuple[bytes, list[int]]:
    """Bytes and the descriptors beside them, which no child process will inherit.

    `socket.recv_fds` won't do: it ignores its flags, and a child that inherits a descriptor keeps
    the lender's memory from going back to the system.
    """
    fds = array.array("i")
    data, ancillary, _, _ = connection.recvmsg(
        4096, socket.CMSG_LEN(most_fds * fds.itemsize), socket.MSG_CMSG_CLOEXEC
    )
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
    return data, list(fds)


def peer_of(connection: socket.socket) -> tuple[int, int, int]:
    """The process that connected.

    Returns:
      (process id, user id, descriptor that becomes readable when the process has exited).

    Raises:
      OSError: it has exited already, or can't be seen from here.
    """
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, user, _ = _CREDENTIALS.unpack(raw)
    if pid <= 0:
        raise ProcessLookupError("the process is in another namespace")
    try:
        # Not by number where that can be had: numbers are reused.
        return pid, user, connection.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    except OSError as error:
        if error.errno not in (errno.ENOPROTOOPT, errno.EOPNOTSUPP):
            raise
    return pid, user, os.pidfd_open(pid)


def started(pid: int) -> int:
    """When a process started, in ticks since the system did: with its id, a name for ever.

    Raises:
      OSError: it is gone, or can't be seen from here.
    """
    with open(f"/proc/{pid}/stat", "rb") as file:
        # The second field, the command's name, may contain anything.
        return int(file.read().rpartition(b")")[2].split()[19])


def has_exited(pidfd: int) -> bool:
    """Whether the process of a pidfd has exited."""
    poll = select.poll()  # select() stops at descriptor 1023
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))
