"""A coordinator as a process, and raw connections to it, for tests."""

from __future__ import annotations

import contextlib
import queue
import signal
from collections.abc import Iterator
from typing import Any

import grpc

from aqua_jax.coordinator import messages_pb2 as messages
from aqua_jax.coordinator import sockets
from aqua_jax.memory.link import ATTACH, Entry, status
from tests.faults.processes import Process
from tests.memory.lending import wait_for


class Running:
    """`aqua-jax coordinator`, as users run it."""

    def __init__(self, path: str, *flags: str) -> None:
        self.path, self.flags = path, flags
        self.start()

    def start(self) -> None:
        """Starts it (again)."""
        self.process = Process(
            "-m", "aqua_jax.cli.main", "coordinator", f"--socket={self.path}", *self.flags
        )
        listens = f"at {self.path}"
        ended = self.process.child.poll
        wait_for(
            lambda: self.process.said(listens) or ended() is not None, "the coordinator listens",
        )
        assert self.process.said(listens), (ended(), self.process.lines)

    def kill(self) -> None:
        """Kills it, without a word."""
        self.process.end()

    def signal(self, number: int) -> None:
        """Sends it a signal."""
        self.process.signal(number)

    def stop(self) -> int:
        """Ends it as Ctrl-C does; its exit status."""
        self.process.signal(signal.SIGINT)
        return self.process.wait()

    def status(self) -> Any:
        """Who lends, who holds."""
        return status(self.path)

    def held(self) -> int:
        """Bytes that all consumers hold."""
        return sum(row.held for row in self.status().arenas)


@contextlib.contextmanager
def coordinator(path: str, *flags: str) -> Iterator[Running]:
    """A coordinator for the length of a block."""
    running = Running(path, *flags)
    try:
        yield running
    finally:
        running.process.end()


class Raw:
    """A connection that says what it is told to, well-behaved or not."""

    def __init__(self, path: str, *, hello: bool = True, **fields: Any) -> None:
        self.entry = Entry(path, 10.0)
        self.channel = grpc.insecure_channel(
            sockets.target_of(path), options=(("grpc.use_local_subchannel_pool", 1),)
        )
        self.said: queue.SimpleQueue[Any] = queue.SimpleQueue()
        attach = self.channel.stream_stream(
            ATTACH,
            request_serializer=lambda m: m if isinstance(m, bytes) else m.SerializeToString(),
            response_deserializer=messages.ToClient.FromString,
        )
        self.call = attach(
            iter(self.said.get, None), timeout=30,
            metadata=(("aqua-token", self.entry.token.hex()),),
        )
        self.key = 0
        self.number = 100
        if hello:
            self.key = self.ask(hello=messages.Hello(name="raw", **fields)).welcome.key

    def say(self, **body: Any) -> int:
        """Sends a message; its number."""
        self.number += 1
        self.said.put(messages.FromClient(id=self.number, **body))
        return self.number

    def hear(self) -> Any:
        """The next message; None when the connection has ended."""
        try:
            return next(self.call)
        except (StopIteration, grpc.RpcError):
            return None

    def ask(self, **body: Any) -> Any:
        """The answer to a message; what else is said meanwhile is dropped."""
        number = self.say(**body)
        while (message := self.hear()) is not None:
            if message.id == number:
                return message
        raise AssertionError("the connection has ended")

    def close(self) -> None:
        """Ends the connection."""
        self.said.put(None)
        self.call.cancel()
        self.channel.close()
        self.entry.close()

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
