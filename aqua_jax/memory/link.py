"""The connection to a coordinator: a thread that keeps it up, asks, and hears.

While the coordinator is away the thread tries to reach it again and its owner goes on with what it
has; nobody waits, except those who ask something.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from aqua_jax import errors
from aqua_jax.coordinator import door, sockets
from aqua_jax.errors import (
    AquaError,
    CoordinatorError,
    DependencyError,
    FieldError,
    LenderError,
)

try:
    import grpc

    from aqua_jax.coordinator import messages_pb2 as messages
except ImportError as missing:
    raise DependencyError(
        "talking to a coordinator needs gRPC: pip install 'aqua-jax[coordinator]'"
    ) from missing

__all__ = ["Entry", "Link", "messages", "status"]

_log = logging.getLogger(__name__)

ATTACH = "/aqua_jax.coordinator.Coordinator/Attach"
STATUS = "/aqua_jax.coordinator.Coordinator/Status"
_CHANNEL = (
    ("grpc.use_local_subchannel_pool", 1),  # no memory of earlier failures
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_receive_message_length", 4 << 20),
)
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.02, 1.0
_GONE = object()  # instead of an answer
_DOOR_S = 5.0  # for a descriptor that is on its way


def raise_error(told: Any) -> None:
    """Raises the error that the coordinator has sent, as the class it was there."""
    kind = getattr(errors, told.kind, None)
    if isinstance(kind, type) and issubclass(kind, FieldError):
        raise kind(told.field, told.value, told.allowed)
    if isinstance(kind, type) and issubclass(kind, AquaError):
        raise kind(told.allowed)
    raise CoordinatorError(f"{told.kind} {told.field} {told.allowed}")


class Entry:
    """The door of a coordinator, passed: a socket for descriptors, and a token.

    Raises:
      CoordinatorError: nobody answers there, or not to us.
    """

    def __init__(self, path: str, timeout_s: float) -> None:
        name = sockets.door_of(path)
        try:
            self.socket = sockets.connect(name, timeout_s, socket.SOCK_SEQPACKET)
        except LenderError as error:
            # What the caller named, not the door beside it.
            why = getattr(error.__cause__, "strerror", None) or "it is too busy"
            raise CoordinatorError(f"no coordinator answers at {path}: {why}") from error
        try:
            letter, _, token, fds = door.receive(self.socket)
            for fd in fds:
                os.close(fd)
            if letter != b"T" or len(token) != door.TOKEN_BYTES:
                raise CoordinatorError(f"the coordinator at {path} lets nobody in")
        except (OSError, AquaError) as error:
            self.socket.close()
            raise CoordinatorError(f"no coordinator answers at {path}: {error}") from error
        self.token = token
        self.socket.settimeout(_DOOR_S)
        self._lock = threading.Lock()
        self._came: dict[tuple[bytes, int], list[int]] = {}

    def take(self, letter: bytes, number: int) -> int:
        """The descriptor that came under this letter and number; the caller's.

        Raises:
          CoordinatorError: it doesn't come.
        """
        with self._lock:
            while not self._came.get((letter, number)):
                try:
                    found, tag, _, fds = door.receive(self.socket)
                except (OSError, AquaError) as error:
                    raise CoordinatorError(f"no descriptor came: {error}") from error
                if not found:
                    raise CoordinatorError("no descriptor came: the connection has ended")
                self._came.setdefault((found, tag), []).extend(fds)
            return self._came[letter, number].pop(0)

    def give(self, tag: int, fds: list[int]) -> None:
        """Hands descriptors over.

        Raises:
          CoordinatorError: they can't be.
        """
        try:
            door.send(self.socket, b"D", tag, fds)
        except OSError as error:
            raise CoordinatorError(f"the descriptors can't be handed over: {error}") from error

    def close(self) -> None:
        """Ends it, with all descriptors that nobody took."""
        # Wakes up who waits in `take`.
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        with self._lock:
            self.socket.close()
            for fds in self._came.values():
                for fd in fds:
                    os.close(fd)
            self._came.clear()


def status(path: str, timeout_s: float = 5.0) -> Any:
    """The coordinator's `StatusReply`.

    Raises:
      CoordinatorError: nobody answers.
    """
    entry = Entry(path, timeout_s)
    try:
        with grpc.insecure_channel(sockets.target_of(path), options=_CHANNEL) as channel:
            call = channel.unary_unary(
                STATUS, request_serializer=messages.StatusRequest.SerializeToString,
                response_deserializer=messages.StatusReply.FromString,
            )
            return call(
                messages.StatusRequest(), timeout=timeout_s,
                metadata=(("aqua-token", entry.token.hex()),),
            )
    except grpc.RpcError as error:
        why = getattr(error, "details", lambda: None)() or type(error).__name__
        raise CoordinatorError(f"no answer from the coordinator at {path}: {why}") from error
    finally:
        entry.close()


@dataclasses.dataclass(frozen=True)
class Question:
    """A question under way."""

    number: int
    inbox: queue.SimpleQueue[Any]


class Link:
    """Keeps a connection to the coordinator at `path`.

    `hello(key)` makes the first message of each connection, `joined()` is called by the thread when
    it has been welcomed, `heard(message)` for what the coordinator says unasked. They must not
    wait.
    """

    def __init__(
        self, path: str, timeout_s: float, *, hello: Callable[[int], Any],
        joined: Callable[[Link], None], heard: Callable[[Link, Any], None],
        answered: Callable[[Link, Any, bool], Any],
    ) -> None:
        """
        Args:
          path: of the coordinator's socket.
          timeout_s: for connecting, and for each answer.
          hello: see the class.
          joined: see the class.
          heard: see the class.
          answered: called by the thread with each answer and whether somebody waits for it;
            returns what those get.
        """
        self.path, self.timeout_s = path, timeout_s
        self._hello, self._joined, self._heard = hello, joined, heard
        self._answered = answered
        self._lock = threading.Lock()  # over what follows; never held while waiting
        self._number = 0
        self._asked: dict[int, Question] = {}
        self._outgoing: queue.SimpleQueue[Any] | None = None
        self._call: Any = None
        self.key = 0
        self.term_s = 10.0
        self.connected = False
        self.connections = 0  # so far; the number of the present one
        self.entry: Entry | None = None
        self._why = ""
        self._closing = threading.Event()
        self._welcome = threading.Event()
        self._first = threading.Event()
        self._thread = threading.Thread(target=self._run, name="aqua-client", daemon=True)

    def start(self, wait: bool) -> None:
        """Begins; with `wait`, returns when connected.

        Raises:
          CoordinatorError: with `wait`, nobody answers in time. The link is closed.
        """
        self._thread.start()
        if not wait:
            return
        self._first.wait(self.timeout_s)
        if not self.connected:
            why = self._why or f"no answer in {self.timeout_s} s"
            self.close()
            raise CoordinatorError(f"no coordinator answers at {self.path}: {why}")

    # What any thread may call.

    def ask(self, timeout_s: float | None = None, **body: Any) -> Any:
        """Asks, and waits for the answer.

        Raises:
          CoordinatorError: no answer: the coordinator is away, or too slow.
          AquaError: what it answered.
        """
        return self.answer(self.begin(**body), timeout_s)

    def begin(self, connection: int | None = None, **body: Any) -> Question:
        """Asks; `answer` waits. Several questions under way at once cost one wait.

        Args:
          connection: by which alone it may be asked; None: by any.
          body: the message.

        Raises:
          CoordinatorError: the coordinator is away, or that connection has ended.
        """
        with self._lock:
            ended = connection not in (None, self.connections)
            if ended or not self.connected or self._outgoing is None:
                raise CoordinatorError(f"the coordinator at {self.path} is away{self._because()}")
            self._number += 1
            question = Question(self._number, queue.SimpleQueue())
            self._asked[question.number] = question
            self._outgoing.put(messages.FromClient(id=question.number, **body))
        return question

    def answer(self, question: Question, timeout_s: float | None = None) -> Any:
        """Waits for the answer to what `begin` asked; once.

        Raises:
          CoordinatorError: no answer.
          AquaError: what it answered.
        """
        limit = self.timeout_s if timeout_s is None else timeout_s
        try:
            answer = question.inbox.get(timeout=limit)
        except queue.Empty:
            with self._lock:
                gone = self._asked.pop(question.number, None) is not None
            if gone:
                raise CoordinatorError(
                    f"no answer from the coordinator at {self.path} in {limit:.3g} s"
                ) from None
            answer = question.inbox.get()
        if answer is _GONE:
            raise CoordinatorError(f"the coordinator at {self.path} went away{self._because()}")
        if isinstance(answer, messages.Error):
            raise_error(answer)
        return answer

    def tell(self, **body: Any) -> int:
        """Says something without waiting for the answer.

        During a greeting it is said after it: what changes once the greeting has been composed
        isn't lost.

        Returns:
          The number that the answer will have; 0 when nobody is there to hear.
        """
        with self._lock:
            if self._outgoing is None:
                return 0
            self._number += 1
            self._outgoing.put(messages.FromClient(id=self._number, **body))
            return self._number

    def _because(self) -> str:
        return f" ({self._why})" if self._why else ""

    def close(self) -> None:
        """Ends connection and thread; may be repeated."""
        self._closing.set()
        self._hang_up()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()

    def _hang_up(self) -> None:
        with self._lock:
            call, outgoing = self._call, self._outgoing
        if outgoing is not None:
            outgoing.put(None)
        if call is not None:
            call.cancel()

    # The thread.

    def _run(self) -> None:
        pause = _FIRST_PAUSE_S
        while not self._closing.is_set():
            self._welcome.clear()
            try:
                self._attach()
            except AquaError as error:
                self._why = str(error).removeprefix(f"no coordinator answers at {self.path}: ")
            except Exception as error:
                # Ours. The next connection begins anew; without a thread there would be none.
                _log.exception("what the coordinator at %s says can't be dealt with", self.path)
                self._why = type(error).__name__
            if self._welcome.is_set() and not self._closing.is_set():
                pause = _FIRST_PAUSE_S
                _log.info("the coordinator at %s is away%s", self.path, self._because())
            self._first.set()
            self._closing.wait(pause)
            # A coordinator that has been restarted waits a term for us.
            pause = min(2 * pause, _LONGEST_PAUSE_S, self.term_s / 4)

    def _attach(self) -> None:
        """One connection, from beginning to end."""
        entry = Entry(self.path, self.timeout_s)
        outgoing: queue.SimpleQueue[Any] = queue.SimpleQueue()
        channel = grpc.insecure_channel(sockets.target_of(self.path), options=_CHANNEL)
        call: Any = None
        with self._lock:
            # Before the greeting is composed: what is told after that must go somewhere.
            self.connections += 1
            self._outgoing, self.entry = outgoing, entry
        try:
            attach = channel.stream_stream(
                ATTACH, request_serializer=messages.FromClient.SerializeToString,
                response_deserializer=messages.ToClient.FromString,
            )
            call = attach(
                self._say(outgoing), metadata=(("aqua-token", entry.token.hex()),)
            )
            with self._lock:
                self._call = call
            if self._closing.is_set():
                call.cancel()
            for message in call:
                self._hear(message)
        except grpc.RpcError as error:
            details = getattr(error, "details", lambda: None)()
            self._why = details or type(error).__name__
            # The error is the call itself. In a circle with its traceback it would live until the
            # interpreter ends, and its finalizer then waits for a lock that a thread of gRPC's took
            # along: 1 process in 60 hung.
            error.__traceback__ = None
        finally:
            with self._lock:
                self.connected = False
                self._call = self._outgoing = self.entry = None
                asked, self._asked = self._asked, {}
            outgoing.put(None)
            for question in asked.values():
                question.inbox.put(_GONE)
            channel.close()
            entry.close()
            call = None  # so that it ends here, by this thread

    def _say(self, outgoing: queue.SimpleQueue[Any]) -> Iterator[Any]:
        """What this side says, run by a thread of gRPC's."""
        yield messages.FromClient(id=0, hello=self._hello(self.key))
        deadline = time.monotonic() + self.timeout_s
        while True:
            try:
                message = outgoing.get(timeout=min(1.0, self.term_s / 4))
            except queue.Empty:
                if self._welcome.is_set():
                    yield messages.FromClient(renew=messages.Renew())
                elif time.monotonic() > deadline:
                    self._why = f"no answer in {self.timeout_s} s"
                    self._hang_up()
                continue
            if message is None:
                return
            yield message

    def _hear(self, message: Any) -> None:
        kind = message.WhichOneof("body")
        if kind == "welcome":
            self.key, self.term_s = message.welcome.key, message.welcome.term_ms / 1000
            with self._lock:
                self.connected = True
                self._why = ""
            self._welcome.set()
            self._joined(self)
            self._first.set()
        elif kind in ("revoke", "lost", "returned", "scrub"):
            self._heard(self, message)
        elif kind == "error" and not self._welcome.is_set():
            raise CoordinatorError(
                f"it refuses: {message.error.field} {message.error.value}, allowed: "
                f"{message.error.allowed}"
            )
        else:
            with self._lock:
                question = self._asked.pop(message.id, None)
            result: Any = _GONE  # should the answer be of no use, whoever waits must not wait on
            try:
                result = self._answered(self, message, question is not None)
            finally:
                if question is not None:
                    question.inbox.put(result)
