"""Zeroes lent memory of devices as the coordinator asks for it, in a thread of its own.

Only the lender's process can write to such memory for sure; the host memory of others the
coordinator zeroes itself. One piece after the other, and what was asked over a connection that has
ended isn't said to be done over the next: the coordinator asks again, and nothing may be zeroed
after it has been lent.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

from aqua_jax.errors import AquaError
from aqua_jax.memory.loan import Lending

_log = logging.getLogger(__name__)

_Asked = tuple[Lending, int, int, int]  # start, end, number


class Scrubber:
    """A thread that begins with the first question and ends with `close`."""

    def __init__(self, done: Callable[[Lending, int], None]) -> None:
        """
        Args:
          done: told that what was asked under a number is zero; must not wait.
        """
        self._done = done
        self._lock = threading.Lock()
        self._at_work = threading.Lock()  # held while memory is written
        self._asked: queue.SimpleQueue[_Asked | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._latest: dict[int, int] = {}  # by arena, the number that counts
        self._closed = False

    def ask(self, lending: Lending, start: int, end: int, number: int) -> None:
        """[start, end) of an arena is to be zeroed; what was asked of it before counts no more."""
        with self._lock:
            if self._closed:
                return
            self._latest[lending.id] = number
            self._asked.put((lending, start, end, number))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="aqua-scrub", daemon=True)
                self._thread.start()

    def forget(self) -> None:
        """The connection has ended: nothing asked so far counts, or is written, any more.

        Waits for what is being written now: milliseconds.
        """
        with self._lock:
            self._latest.clear()
        self.settle()

    def settle(self) -> None:
        """Waits until nothing is written that doesn't count any more."""
        with self._at_work:
            pass

    def _counts(self, lending: Lending, number: int) -> bool:
        with self._lock:
            return self._latest.get(lending.id) == number and lending.alive

    def _run(self) -> None:
        while (asked := self._asked.get()) is not None:
            with self._at_work:
                self._zero(*asked)

    def _zero(self, lending: Lending, start: int, end: int, number: int) -> None:
        if not self._counts(lending, number):
            return
        try:
            lending.arena.scrub(start, end - start)
        except AquaError as error:
            # Never free again, so never anybody's.
            _log.error("arena %d can't be zeroed: %s", lending.id, error)
            return
        if self._counts(lending, number):
            self._done(lending, number)

    def close(self) -> None:
        """Ends the thread, after what it is at; may be repeated."""
        with self._lock:
            self._closed = True
            thread, self._thread = self._thread, None
        if thread is not None:
            self._asked.put(None)
            thread.join()
