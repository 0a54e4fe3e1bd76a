"""The other end of a lender: a connection, a thread that listens to it, and leases.

The thread sleeps in `select`. It notes the lender's death and what it wants back as flags of the
leases; nothing that a step loop calls waits for it, for the lender, or for a lock that is held over
a system call on the network.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import selectors
import threading
import time

from aqua_jax.closing import Closing
from aqua_jax.coordinator import sockets
from aqua_jax.coordinator.records import DEVICE_KINDS
from aqua_jax.errors import AquaError, LenderError, ProtocolError
from aqua_jax.memory import protocol
from aqua_jax.memory.arena import Arena
from aqua_jax.memory.lease import Lease
from aqua_jax.memory.mapping import Mapper, Mappings, Part

_log = logging.getLogger(__name__)

_LINGER_S = 1.0  # for the last words when closing


class Borrower(Closing):
    """A connection to one lender.

    Raises:
      LenderError: nobody answers, or not what a lender would.
      ConfigError: no possible path.
    """

    def __init__(
        self, path: str, *, name: str = "", timeout_s: float = 10.0,
        mappers: dict[str, Mapper] | None = None,
    ) -> None:
        """
        Args:
          path: where the lender listens, or @name.
          name: shown in the lender's status lines.
          timeout_s: for connecting, and for each question to the lender.
          mappers: for devices' memory, by kind.
        """
        self._mappings = Mappings(mappers)
        self._timeout_s = timeout_s
        self._lock = threading.Lock()  # over what follows; never held while waiting
        self._unsent = bytearray()
        self._answers: dict[int, queue.SimpleQueue[protocol.Message]] = {}
        self._leases: dict[int, tuple[Lease, int]] = {}  # by generation, with its arena offset
        # What was wanted back of leases that aren't there: keep and deadline, by generation.
        self._early: dict[int, tuple[int, float]] = {}
        self._sole = False
        self._number = 0
        self._error = ""
        self.alive = True
        self._closing = False
        self._closed = False
        self._decoder = protocol.Decoder()
        with contextlib.ExitStack() as stack:
            self._socket = stack.enter_context(sockets.connect(path, timeout_s))
            self._fd = self._handshake(path, name)
            stack.callback(self._close_descriptor)
            self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            stack.callback(os.close, self._wake_read)
            stack.callback(os.close, self._wake_write)
            self._stack = stack.pop_all()
        self._thread = threading.Thread(target=self._listen, name="aqua-borrower", daemon=True)
        self._thread.start()

    def _handshake(self, path: str, name: str) -> int:
        """Says hello; returns the arena's descriptor."""
        received: list[int] = []
        try:
            hello = protocol.encode("hello", version=protocol.VERSION, name=name)
            with contextlib.suppress(BrokenPipeError):  # a refusal may be there to read
                self._socket.sendall(hello)
            while (welcome := self._decoder.next()) is None:
                data, fds = sockets.receive(self._socket, 4)
                received += fds
                if not data:
                    raise LenderError(f"the lender at {path} closed the connection")
                self._decoder.feed(data)
            if welcome["type"] == "error":
                raise LenderError(f"the lender at {path} refuses: {welcome}")
            protocol.whole(welcome, "version", protocol.VERSION, protocol.VERSION)
            self.lender_name = protocol.text(welcome, "name")
            self.arena_size = protocol.whole(welcome, "bytes", 1)
            told = {"memory": "host", "device": "", **welcome}
            self.kind = protocol.text(told, "memory", 32)
            self.device = protocol.text(told, "device")
            if self.kind in DEVICE_KINDS and self.kind not in self._mappings.kinds:
                raise LenderError(
                    f"the lender at {path} lends memory of {self.device or self.kind}, which "
                    "this process can't map: it has no device for that"
                )
            if len(received) != 1:
                raise LenderError(f"the lender at {path} sent {len(received)} descriptors, not 1")
            self._socket.setblocking(False)
            return received.pop()
        except (OSError, ProtocolError) as error:
            raise LenderError(f"no lender answers at {path}: {error}") from error
        finally:
            for fd in received:
                os.close(fd)

    # What the owner calls.

    def borrow(self, size: int) -> Lease | None:
        """Asks for `size` bytes in one piece, rounded up to whole pages; waits for the answer.

        Returns:
          The lease, mapped; None when the lender has no room for it.

        Raises:
          LenderError: it doesn't answer, or sends memory that can't be trusted.
        """
        if isinstance(size, bool) or not isinstance(size, int) or not 0 < size <= protocol.LIMIT:
            raise ProtocolError("bytes", size, f"1 to {protocol.LIMIT}")
        answer = self._ask("borrow", bytes=size)
        if answer["type"] == "refused":
            return None
        generation, offset = answer["generation"], answer["offset"]
        try:
            if answer["bytes"] < size:
                raise ProtocolError("bytes", answer["bytes"], f"at least {size}")
            with self._lock:  # while we map, `_lost` may close the descriptor
                fd = os.dup(self._fd) if self._fd >= 0 else -1
            try:
                arena = self._map(fd, offset, answer["bytes"])
            finally:
                if fd >= 0:
                    os.close(fd)
        except AquaError as error:
            self._send("give_back", generation=generation, offset=offset, bytes=answer["bytes"])
            raise LenderError(f"what the lender sent can't be used: {error}") from error
        lease = Lease(arena, generation, self._release, self._forget, kind=self.kind, way=arena.way)
        with self._lock:
            self._leases[generation] = lease, offset
            if generation in self._early:
                lease.keep, lease.deadline = self._early.pop(generation)
            lease.alive = self.alive
        return lease

    def _map(self, fd: int, offset: int, size: int) -> Arena | Part:
        if self.kind not in DEVICE_KINDS:
            return Arena.adopt(fd, offset, size)
        return self._mappings.part(
            0, fd, self.arena_size, offset, size, kind=self.kind, device=self.device
        )

    def resize(self, size: int) -> None:
        """Tells the lender to lend at most `size` bytes.

        Raises:
          LenderError: it doesn't answer, or refuses (then the connection has ended).
        """
        self._ask("resize", bytes=size)

    def status(self) -> dict[str, int]:
        """The lender's totals: bytes, limit, free, lent, asked (bytes), leases.

        Raises:
          LenderError: it doesn't answer.
        """
        answer = self._ask("status")
        return {
            field: protocol.whole(answer, field)
            for field in ("bytes", "limit", "free", "lent", "asked", "leases")
        }

    def _ask(self, kind: str, **fields: int) -> protocol.Message:
        inbox: queue.SimpleQueue[protocol.Message] = queue.SimpleQueue()
        number = self._send(kind, inbox, **fields)
        try:
            answer = inbox.get(timeout=self._timeout_s)
        except queue.Empty:
            with self._lock:
                missing = self._answers.pop(number, None) is not None
            if missing:
                # Should it grant something after all, the thread gives that back.
                raise LenderError(f"no answer from the lender in {self._timeout_s} s") from None
            answer = inbox.get()
        if answer["type"] == "lost":
            raise LenderError(f"the lender is gone{self._error}")
        return answer

    def _send(
        self, kind: str, inbox: queue.SimpleQueue[protocol.Message] | None = None, **fields: int
    ) -> int:
        with self._lock:
            self._number += 1
            number = self._number
            if not self.alive:
                if inbox is not None:
                    raise LenderError(f"the lender is gone{self._error}")
                return number  # nobody to tell
            if inbox is not None:
                self._answers[number] = inbox
            self._unsent += protocol.encode(kind, id=number, **fields)
            self._wake()
        return number

    def _release(self, lease: Lease, offset: int, size: int) -> None:
        with self._lock:
            _, start = self._leases[lease.generation]
        self._send("give_back", generation=lease.generation, offset=start + offset, bytes=size)

    def close_with_leases(self) -> None:
        """Lets the connection end with its last lease."""
        self._sole = True

    def _forget(self, lease: Lease) -> None:
        with self._lock:
            del self._leases[lease.generation]
            last = not self._leases
        if last and self._sole:
            self.close()

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # full: it is awake already
            os.write(self._wake_write, b"x")

    # The thread.

    def _listen(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake_read, selectors.EVENT_READ)
            selector.register(self._socket, selectors.EVENT_READ)
            linger = 0.0
            while self.alive:
                with self._lock:
                    write = bool(self._unsent)
                if self._closing:
                    linger = linger or time.monotonic() + _LINGER_S
                    if not write or time.monotonic() > linger:
                        break
                events = selectors.EVENT_READ | (selectors.EVENT_WRITE if write else 0)
                selector.modify(self._socket, events)
                for key, mask in selector.select(0.1 if self._closing else None):
                    if key.fd == self._wake_read:
                        with contextlib.suppress(BlockingIOError):
                            os.read(self._wake_read, 4096)
                        continue
                    try:
                        self._transfer(mask)
                    except (OSError, AquaError) as error:
                        self._lost(error)
        self._lost(None)

    def _transfer(self, mask: int) -> None:
        if mask & selectors.EVENT_WRITE:
            with self._lock:
                waiting = bytes(self._unsent[:65536])
            with contextlib.suppress(BlockingIOError):
                sent = self._socket.send(waiting)
                with self._lock:
                    del self._unsent[:sent]
        if mask & selectors.EVENT_READ:
            try:
                data = self._socket.recv(65536)
            except BlockingIOError:
                return
            if not data:
                raise ConnectionResetError("it closed the connection")
            self._decoder.feed(data)
            while (message := self._decoder.next()) is not None:
                self._handle(message)

    def _handle(self, message: protocol.Message) -> None:
        kind = message["type"]
        if kind == "reclaim":
            self._wanted(message)
            return
        if kind == "error":
            raise LenderError(f"it refuses: {message}")
        if kind == "granted":
            for field in ("generation", "offset", "bytes"):
                protocol.whole(message, field)
        elif kind not in ("refused", "freed", "resized", "status"):
            raise ProtocolError("type", kind, "a message that lenders send")
        with self._lock:
            inbox = self._answers.pop(protocol.whole(message, "id"), None)
        if inbox is not None:
            inbox.put(message)
        elif kind == "granted":
            self._send("give_back", **{k: message[k] for k in ("generation", "offset", "bytes")})

    def _wanted(self, message: protocol.Message) -> None:
        generation = protocol.whole(message, "generation")
        keep = protocol.whole(message, "keep")
        deadline = time.monotonic() + protocol.whole(message, "deadline_ms") / 1000
        with self._lock:
            found = self._leases.get(generation)
            if found is None:
                # Granted a moment ago and not mapped yet; or given back a moment ago.
                self._early[generation] = keep, deadline
                while len(self._early) > 16:
                    del self._early[next(iter(self._early))]
                return
            lease = found[0]
            # The deadline first: whoever sees something wanted finds it set.
            lease.deadline = deadline if keep < lease.size else None
            lease.keep = keep

    def _lost(self, error: Exception | None) -> None:
        with self._lock:
            if not self.alive:
                return
            self._error = f" ({error})" if error is not None else ""
            self.alive = False
            self._unsent.clear()
            for lease, _ in self._leases.values():
                lease.alive = False
            answers, self._answers = self._answers, {}
        # Nothing can be mapped any more, and the memory of a dead lender is the system's again when
        # the last lease is closed too.
        self._close_descriptor()
        for inbox in answers.values():
            inbox.put({"type": "lost"})
        if error is not None:
            _log.warning("the lender is gone: %s", error)

    def _close_descriptor(self) -> None:
        with self._lock:
            fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def close(self) -> None:
        """Gives every lease back and ends connection and thread; may be repeated."""
        if self._closed:
            return
        self._closed = True
        with self._lock:
            leases = [lease for lease, _ in self._leases.values()]
        for lease in leases:
            lease.close()
        self._closing = True
        self._wake()
        self._thread.join()
        self._stack.close()


def connect(path: str, size: int, *, name: str = "", timeout_s: float = 10.0) -> Lease | None:
    """Borrows `size` bytes from the lender at `path`, over a connection of its own.

    Returns:
      The lease; closing it ends the connection and its thread. None when there is no room.

    Raises:
      LenderError: nobody answers, or not what a lender would.
    """
    borrower = Borrower(path, name=name, timeout_s=timeout_s)
    try:
        lease = borrower.borrow(size)
    except BaseException:
        borrower.close()
        raise
    if lease is None:
        borrower.close()
    else:
        borrower.close_with_leases()
    return lease
