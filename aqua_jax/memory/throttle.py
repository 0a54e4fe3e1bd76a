"""A lender's bandwidth term where copies are made one by one, by whoever wants them.

`pace` is the same for the copy queue, which is told beforehand and never waits. Here each copy
begins no earlier than the one before would have ended at the rate allowed, so that in no time more
is begun than that rate allows and one copy.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from aqua_jax.errors import ConfigError


class Throttle:
    """What may be copied to and from one lender's memory. Any thread.

    Attributes:
      cap: bytes a second.
      delay_s: seconds that copies have waited, in all.
    """

    def __init__(
        self, cap: int, *, clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        """
        Args:
          cap: bytes a second, at least 1.
          clock: in seconds.
          sleep: waits so many.

        Raises:
          ConfigError: not a rate.
        """
        if cap < 1:
            raise ConfigError("cap", cap, "at least 1 byte a second")
        self.cap, self.delay_s = cap, 0.0
        self._clock, self._sleep = clock, sleep
        self._lock = threading.Lock()
        self._next = float("-inf")  # when a copy may begin

    @property
    def ready(self) -> bool:
        """Whether a copy may begin now."""
        return self._clock() >= self._next

    def begin(self, size: int) -> float:
        """A copy of `size` bytes will begin; seconds until it may."""
        with self._lock:
            now = self._clock()
            start = max(now, self._next)
            self._next = start + size / self.cap
            return start - now

    def wait(self, size: int) -> None:
        """Returns when a copy of `size` bytes may begin."""
        delay = self.begin(size)
        if delay > 0.0:
            with self._lock:
                self.delay_s += delay
            self._sleep(delay)
