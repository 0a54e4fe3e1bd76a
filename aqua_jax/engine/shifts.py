"""Copies between stores beside the steps: down when memory is wanted back, up when there is more.

The copy queue moves pages between the pool and stores; what goes from store to store takes a thread
of its own, without the interpreter's lock, so that no step waits for it. The planner keeps both
slots until a shift has ended, so their memory stays mapped.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable

from aqua_jax.errors import ArenaError, StaleHandleError
from aqua_jax.memory import copies
from aqua_jax.paging.moves import Shift

_NAP_S = 100e-6
_log = logging.getLogger(__name__)

_Pieces = list[tuple[int, int, int]]  # to where, from where, bytes


class Shifter:
    """Carries shifts out, in the order in which they begin. The thread starts with the first one.

    Attributes:
      bytes: copied so far.
      busy_s: how long that took.
    """

    def __init__(self, copy: Callable[[int, int, int, int], None] | None = None) -> None:
        """
        Args:
          copy: (to, from, bytes, device) where stores may lie on a GPU; None: a memcpy.
        """
        self.bytes, self.busy_s = 0, 0.0
        self._begun = self._done = 0  # each is counted by one thread
        self._copy = copy or (lambda to, source, size, device: copies.copy(to, source, size))
        self._jobs: queue.SimpleQueue[tuple[Shift, _Pieces] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def begin(self, shift: Shift) -> None:
        """Queues a copy; for the thread that the stores belong to. Doesn't wait."""
        try:
            pieces = _pieces(
                shift.target.spans(shift.place),  # type: ignore[attr-defined]
                shift.source.spans(shift.slot),  # type: ignore[attr-defined]
            )
        except StaleHandleError:
            shift.done = True  # a lender has just gone; the planner will see that
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="aqua-shifts", daemon=True)
            self._thread.start()
        self._begun += 1
        self._jobs.put((shift, pieces))

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            shift, pieces = job
            started = time.perf_counter()
            try:
                # Each of several is a device's part, in memory that this one reaches.
                for device, (target, source, size) in enumerate(pieces):
                    self._copy(target, source, size, device)
            except ArenaError:
                # Not done, ever: both slots stay taken, and nobody reads the new one.
                _log.exception("a page did not get from %s to %s", shift.source.name,
                               shift.target.name)
                shift.failed = True
                self._done += 1
                continue
            self.busy_s += time.perf_counter() - started
            self.bytes += shift.source.slot_bytes
            shift.done = True
            self._done += 1

    def linger(self, limit_s: float) -> None:
        """Waits a moment for what was begun."""
        end = time.perf_counter() + limit_s
        while self.under_way and time.perf_counter() < end:
            time.sleep(_NAP_S)

    @property
    def under_way(self) -> int:
        """Shifts begun and not done."""
        return self._begun - self._done

    def close(self) -> None:
        """Waits for what was begun, ends the thread; may be repeated."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join()
            self._thread = None


def _pieces(targets: list[tuple[int, int]], sources: list[tuple[int, int]]) -> _Pieces:
    """The copies from some ranges, one after the other, to others of as many bytes in all.

    One, or as many as there are devices: a slot lies in one piece, or in equal ones of theirs.
    """
    found: _Pieces = []
    targets, sources = targets[::-1], sources[::-1]
    while targets and sources:
        (to, room), (start, left) = targets.pop(), sources.pop()
        size = min(room, left)
        found.append((to, start, size))
        if room > size:
            targets.append((to + size, room - size))
        if left > size:
            sources.append((start + size, left - size))
    return found
