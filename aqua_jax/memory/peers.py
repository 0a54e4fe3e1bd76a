"""The tier of borrowed memory: grows by leases, on demand or from a thread in the background."""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from aqua_jax.errors import AquaError, ArenaError, ConfigError
from aqua_jax.memory.lease import Lease
from aqua_jax.memory.pinning import Pins
from aqua_jax.memory.segments import STEP, LeaseSegment, Segment, growth
from aqua_jax.memory.sources import LeaseSource

_log = logging.getLogger(__name__)

# After a refusal a source is left alone for so long; in the background, longer with each further
# one. After a question that was waited for in vain, PATIENCE times as long as that took.
RETRY_S = 1.0
MOST_RETRY_S = 30.0
PATIENCE = 10


class PeerTier:
    """Leases from one or several sources, nearest first.

    `grow` asks a source and waits for its answer. `wish` lets a thread do that; what it gets lies
    in `arrivals` until somebody adopts it.
    """

    name = "peer"

    def __init__(
        self, sources: Sequence[LeaseSource], limit: int | None = None, *, step: int = STEP,
        wait_s: float = 2.0, pauses_s: tuple[float, float] = (RETRY_S, MOST_RETRY_S),
        clock: Callable[[], float] = time.monotonic, pins: Pins | None = None,
    ) -> None:
        """
        Args:
          sources: whom to ask, in this order; owned.
          limit: most bytes to hold; None: what they lend.
          step: least bytes to ask for.
          wait_s: seconds that `grow` waits while another thread asks.
          pauses_s: in the background, between two questions in vain: the first pause, the longest.
          clock: in seconds.
          pins: makes what is borrowed ready for a device's copies before anybody sees it, until
            the lease is closed. None: it is ready as it is.

        Raises:
          ConfigError: a limit below 0.
        """
        if limit is not None and limit < 0:
            raise ConfigError("peer_bytes", limit, "0 or more, or None")
        self.limit = limit
        self.segments: tuple[Segment, ...] = ()
        self.arrivals: deque[Segment] = deque()
        self._sources, self._step = tuple(sources), step
        self._wait_s, self._pauses_s, self._clock = wait_s, pauses_s, clock
        self._pins = pins
        self._asking = threading.Lock()  # one question at a time
        self._not_before = [float("-inf")] * len(self._sources)
        self._leases: list[LeaseSegment] = []  # all that may still hold bytes
        self._wished = 0
        self._ends: deque[Callable[[], None]] = deque()  # what the thread is to close
        self._wake, self._closing = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    def grow(self, need: int) -> Segment | None:
        """Borrows `need` bytes, or as much of them as there is.

        Returns:
          One segment; further ones are in `arrivals`. None when nobody has room, or all have been
          asked in vain a moment ago.
        """
        if min(self._not_before, default=0.0) > self._clock():
            return None
        if not self._asking.acquire(timeout=self._wait_s):
            return None
        try:
            return self._borrow(need, patient=False)
        finally:
            self._asking.release()

    def _borrow(self, need: int, *, patient: bool) -> Segment | None:
        self._leases = [s for s in self._leases if not s.lease.closed]
        held = sum(s.lease.held.total for s in self._leases)
        size = growth(need, held, self._step)
        if self.limit is not None:
            size = min(size, self.limit - held)
        if size < 1 or self._closing.is_set():
            return None
        for index, source in enumerate(self._sources):
            if not patient and self._clock() < self._not_before[index]:
                continue
            start = self._clock()
            try:
                found = [LeaseSegment(one) for one in source.borrow(size) if self._ready(one)]
                pause = RETRY_S
            except AquaError as error:
                _log.info("no memory to borrow: %s", error)
                found, pause = [], max(RETRY_S, PATIENCE * (self._clock() - start))
            if found:
                self._leases += found
                self.arrivals += found[1:]
                return found[0]
            self._not_before[index] = self._clock() + pause
        return None

    def _ready(self, lease: Lease) -> bool:
        if self._pins is None or lease.kind != "host":
            return True
        try:
            self._pins.pin(lease.address, lease.size)
        except ArenaError as error:
            _log.warning("borrowed memory is given back unused: %s", error)
            lease.close()
            return False
        # What is given back before that stays in memory until then, though nobody uses it here.
        lease.before_unmap = functools.partial(self._pins.unpin, lease.address, lease.size)
        return True

    def wish(self, size: int) -> None:
        """Says how many bytes more would be of use; 0: none. Doesn't wait."""
        self._wished = size
        if size > 0 and self._sources:
            self._work()

    def end(self, close: Callable[[], None]) -> None:
        """Closes memory that nobody uses any more. Where it has to be made unready for a device's
        copies first, which takes long, the thread does it; `close` ends what is left."""
        if self._pins is None or self._closing.is_set():
            close()
        else:
            self._ends.append(close)
            self._work()

    def _work(self) -> None:
        if self._closing.is_set():
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="aqua-peers", daemon=True)
            self._thread.start()
        self._wake.set()

    def _end_all(self) -> None:
        while self._ends:
            self._ends.popleft()()

    def _run(self) -> None:
        first, longest = self._pauses_s
        delay = first
        while not self._closing.is_set():
            self._wake.wait()
            self._wake.clear()
            self._end_all()
            while self._wished > 0 and not self._closing.is_set():
                with self._asking:
                    segment = self._borrow(self._wished, patient=True)
                self._end_all()
                if segment is None:
                    self._closing.wait(delay)
                    delay = min(2 * delay, longest)
                else:
                    delay = first
                    self._wished -= segment.extents.size
                    self.arrivals.append(segment)

    def close(self) -> None:
        """Ends the thread, gives back what nobody adopted, and ends the connections. Repeatable.

        Segments in use are closed before.
        """
        self._closing.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join()
        self._end_all()
        while self.arrivals:
            self.arrivals.popleft().close()
        for source in self._sources:
            source.close()
