"""Lends through a coordinator what the batches of a job leave over.

`memory.lender.Lender` is the same at a socket of its own, for borrowers that know it; this one is
in the coordinator's ledger, beside everybody else who lends.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator

from aqua_jax.closing import Closing
from aqua_jax.errors import AquaError, ConfigError, LenderError
from aqua_jax.memory.arena import Arena, round_up
from aqua_jax.memory.client import Client
from aqua_jax.memory.loan import DRAIN_S

_log = logging.getLogger(__name__)

# Between two looks at what has come back: while it is waited for, and otherwise.
_SOON_S, _LATER_S = 0.001, 0.25


class BatchLender(Closing):
    """Lends `size` bytes, and takes back what the next batch needs.

    Memory that has come back goes to the system, from which the batch takes its own; none of it is
    used at its place here. What comes too late for a batch is lent again by a thread. For one batch
    at a time.

    Attributes:
      arena: the memory.
      lending: it, as the coordinator has it.

    Raises:
      ConfigError: the memory isn't there.
      CoordinatorError: nobody answers at the socket.
      DependencyError: gRPC isn't installed.
    """

    def __init__(
        self, size: int, socket: str, *, name: str = "", domain: str = "", cap: int = 0,
        scrub: bool = False, drain_s: float = 10.0, huge_pages: bool = False,
        timeout_s: float = 10.0,
    ) -> None:
        """
        Args:
          size: bytes to lend.
          socket: the coordinator's, a path or @name.
          name: told to people.
          domain: where the memory is; near memory is lent first.
          cap: bytes/s that a borrower may use; 0: all.
          scrub: zeroed before it comes back.
          drain_s: seconds that borrowers are given when memory is wanted back.
          huge_pages: advise them for the arena.
          timeout_s: for connecting, and for each answer.
        """
        self._drain_s = drain_s
        with contextlib.ExitStack() as stack:
            self.arena = stack.enter_context(
                Arena.create(size, "aqua-batch", huge_pages=huge_pages)
            )
            self._client = stack.enter_context(
                Client(socket, name=name, domain=domain, timeout_s=timeout_s)
            )
            self.lending = self._client.lend(self.arena, name=name, cap=cap, scrub=scrub)
            self._stack = stack.pop_all()
        self._vacated: list[tuple[int, int]] = []
        self._lock = threading.Lock()  # over memory that isn't lent
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._tidy, name="aqua-batch", daemon=True)
        self._thread.start()

    @property
    def lent(self) -> int:
        """Bytes that are lent or on their way back."""
        return self.lending.lent

    @contextlib.contextmanager
    def room(self, size: int, timeout_s: float = 30.0) -> Iterator[None]:
        """Keeps `size` bytes for the caller for the length of a block, and lends the rest.

        The block begins when that much has gone back to the system. Afterwards all is lent again.

        Raises:
          ConfigError: more than there is. Nothing changes.
          LenderError: borrowers, or a coordinator that is away, haven't given it back in time. All
            is lent as before.
          StaleHandleError: the coordinator lends it no more, or the lender is closed.
        """
        if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= self.arena.size:
            raise ConfigError("bytes", size, f"0 to {self.arena.size}, the size of the arena")
        limit = self.arena.size - round_up(size)
        end = time.monotonic() + timeout_s
        with self._lock:
            try:
                self.lending.reclaim(limit, self._drain_s)
                while self.lending.lent > limit:
                    if time.monotonic() > end:
                        raise LenderError(
                            f"{self.lending.lent} bytes are still lent; wanted: at most {limit}, "
                            f"within {timeout_s} s"
                        )
                    time.sleep(_SOON_S)
                self._vacate()
                yield
            finally:
                self._lend_all()

    def _tidy(self) -> None:
        while not self._closing.wait(_LATER_S):
            late = self.lending.news or self._vacated
            if late and self._lock.acquire(blocking=False):  # otherwise a batch runs
                try:
                    self._lend_all()
                finally:
                    self._lock.release()

    def _vacate(self) -> None:
        for start, end in self.lending.take_returned():
            self.arena.vacate(start, end - start)
            self._vacated.append((start, end))

    def _lend_all(self) -> None:
        """Takes the wish back, and memory from the system again for what has come."""
        if not self.lending.alive:
            return
        if self.lending.wish is not None:
            self.lending.reclaim(self.arena.size, 0.0)
        self._vacate()
        spans, self._vacated = self._vacated, []
        for index, (start, end) in enumerate(spans):
            try:
                self.arena.occupy(start, end - start)
                self.lending.lend(start, end - start)
            except AquaError as error:
                _log.info("not all can be lent again now: %s", error)
                self._vacated += spans[index:]
                return

    def close(self, drain_s: float = DRAIN_S) -> int:
        """Lends nothing any more and lets the memory go; may be repeated.

        Args:
          drain_s: seconds that borrowers have; who keeps it longer is told that it is lost.

        Returns:
          Bytes that had not come back.
        """
        self._closing.set()
        self._thread.join()
        left = self.lending.close(drain_s)
        self._stack.close()
        return left
