"""A lender in a thread, and a raw connection to it, for tests."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator

from aqua_jax.coordinator.sockets import connect, receive
from aqua_jax.memory import protocol
from aqua_jax.memory.lender import Lender

_names = itertools.count()


def new_name() -> str:
    """An address in no file system that no other test uses."""
    return f"@aqua-test-{os.getpid()}-{next(_names)}"


def wait_for(condition: Callable[[], object], what: str = "", seconds: float = 60.0) -> None:
    """Waits until `condition` holds; fails with `what` otherwise.

    Of a time between two looks a second counts at most: when all of us have been stopped
    for a minute, what is waited for had no more time than we had.
    """
    left, seen = seconds, time.monotonic()
    while not condition():
        now = time.monotonic()
        left, seen = left - min(now - seen, 1.0), now
        assert left > 0, f"not within {seconds} s: {what or condition}"
        time.sleep(0.002)


class Running:
    """A lender that serves in a thread."""

    def __init__(self, size: int, path: str | None = None, **options: object) -> None:
        self.path = path or new_name()
        self.lines: list[str] = []
        self.lender = Lender(size, self.path, report=self.lines.append, **options)  # type: ignore[arg-type]
        self.thread = threading.Thread(target=self.lender.serve, name="test-lender")
        self.thread.start()

    def said(self, words: str) -> bool:
        """Whether a status line has these words."""
        return any(words in line for line in self.lines)


@contextlib.contextmanager
def lending(size: int, path: str | None = None, **options: object) -> Iterator[Running]:
    """A lender for the length of a block; afterwards everything must have come back."""
    running = Running(size, path, **options)
    try:
        yield running
        running.lender.stop()
        running.thread.join(60)
        assert not running.thread.is_alive(), running.lines
        assert running.lender.grants.held == 0
    finally:
        running.lender.stop()
        running.thread.join(60)
        running.lender.close()


class Raw:
    """A connection that says what it is told to, well-behaved or not."""

    def __init__(self, path: str | socket.socket, *, hello: bool = True) -> None:
        self.socket = connect(path, 60.0) if isinstance(path, str) else path
        self.socket.settimeout(60.0)
        self.decoder = protocol.Decoder()
        if hello:
            self.say("hello", version=1, name="raw")
            assert self.hear()["type"] == "welcome"

    def say(self, kind: str, **fields: object) -> None:
        """Sends a message."""
        self.socket.sendall(protocol.encode(kind, **fields))  # type: ignore[arg-type]

    def hear(self) -> dict:
        """The next message; {"type": "end"} when the connection has ended."""
        while (message := self.decoder.next()) is None:
            try:
                data, fds = receive(self.socket, 4)
            except ConnectionError:
                data, fds = b"", []
            for fd in fds:
                os.close(fd)
            if not data:
                return {"type": "end"}
            self.decoder.feed(data)
        return message

    def grant(self) -> None:
        """As a lender: grants what is asked next, from the start of the arena."""
        asked = self.hear()
        self.say("granted", id=asked["id"], generation=1, offset=0, bytes=asked["bytes"])

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()
