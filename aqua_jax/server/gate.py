"""How many requests may be alive at a time, and what the ones too many are told."""

from __future__ import annotations

import math
import time

_SMOOTHING = 0.1  # weight of the latest interval between two ends
_LONGEST_WAIT_S = 60


class Busy(Exception):
    """The queue is full.

    Attributes:
      retry_after_s: when it is worth trying again, by the present rate; whole seconds >= 1.
    """

    def __init__(self, limit: int, retry_after_s: int) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(
            f"{limit} requests are being answered or wait already; try again in {retry_after_s} s"
        )


class Gate:
    """Counts live requests. For one event loop alone.

    Args:
      limit: most live requests; a request with several prompts counts as many.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.live = 0
        self.refused = 0
        self._last_end: float | None = None
        self._interval = 1.0  # seconds between two ends while there was work, smoothed

    def enter(self, count: int) -> None:
        """Admits `count` requests, all or none.

        Raises:
          Busy: there is no room for them.
        """
        self.check(count)
        if not self.live:
            self._last_end = time.monotonic()  # idle time says nothing about the rate
        self.live += count

    def check(self, count: int = 1) -> None:
        """Whether `enter` would admit them.

        Raises:
          Busy: it wouldn't.
        """
        if self.live + count > self.limit:
            self.refused += 1
            wait = self._interval * (self.live + count - self.limit)
            raise Busy(self.limit, min(_LONGEST_WAIT_S, max(1, math.ceil(wait))))

    def leave(self, count: int) -> None:
        """`count` requests have ended."""
        now = time.monotonic()
        if self._last_end is not None:
            interval = (now - self._last_end) / count
            self._interval += _SMOOTHING * (interval - self._interval)
        self._last_end = now
        self.live -= count
