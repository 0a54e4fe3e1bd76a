"""When a model lends memory, and how much: a decision from its load, without clocks or threads.

What the model needs is what it uses, what its waiting requests will use, what is expected to arrive
while memory comes back, and a reserve. What is left of its capacity is lent. Two rules keep that
steady:

- need that grows is met at once: the next decision lends less;
- need that shrinks is believed after `hold_s`: what is lent is what the *largest* need of the last
  `hold_s` leaves over. So after memory was taken back none of it is lent again for so long, and a
  load that swings faster than that is lent by its peaks.

The unit is the caller's: bytes, or pages.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque

from aqua_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class InformerConfig:
    """How an `Informer` decides.

    Attributes:
      capacity: units that can be lent at all, > 0.
      reserve: units that are never lent, 0 to capacity.
      per_request: units that one request takes, as far as is known beforehand; 0: unknown.
      step: what is lent is a multiple of this, so that small changes of need change nothing.
      hold_s: seconds before less need is believed, >= 0.
      horizon_s: seconds that it takes to get memory back; arrivals expected within them count.
      rate_s: seconds over which the rate of arrivals is averaged, > 0.

    Raises:
      ConfigError: a value out of its range.
    """

    capacity: int
    reserve: int = 0
    per_request: int = 0
    step: int = 1
    hold_s: float = 10.0
    horizon_s: float = 1.0
    rate_s: float = 5.0

    def __post_init__(self) -> None:
        for name, low, high in (
            ("capacity", 1, math.inf), ("reserve", 0, self.capacity), ("per_request", 0, math.inf),
            ("step", 1, math.inf), ("hold_s", 0, math.inf), ("horizon_s", 0, math.inf),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ConfigError(name, value, f"{low} to {high}")
        if not 0 < self.rate_s < math.inf:
            raise ConfigError("rate_s", self.rate_s, "above 0")


@dataclasses.dataclass(frozen=True)
class Load:
    """A model's load at one moment.

    Attributes:
      used: units that its running work takes, >= 0.
      queue: requests that wait.
      arrived: requests that have come since it started: a counter.
      per_request: units that one request takes, if that was measured; 0: the configuration knows.
    """

    used: int
    queue: int = 0
    arrived: int = 0
    per_request: float = 0.0


class Informer:
    """Decides what to lend. Asked as often as one likes, by one thread."""

    def __init__(self, config: InformerConfig) -> None:
        """An informer that lends nothing yet."""
        self.config = config
        self.lent = 0  # what the last decision said
        self._peaks: deque[tuple[float, int]] = deque()  # (time, need), need falling
        self._since: float | None = None
        self._now = 0.0
        self._arrived = 0
        self._rate = 0.0

    @property
    def rate(self) -> float:
        """Arrivals a second, averaged over `rate_s`."""
        return self._rate

    def need(self, load: Load) -> int:
        """Units that the model should have for itself under this load, reserve included."""
        config = self.config
        waiting = load.queue + self._rate * config.horizon_s
        per_request = load.per_request or config.per_request
        return config.reserve + load.used + math.ceil(waiting * per_request)

    def decide(self, now: float, load: Load) -> int:
        """What to lend at most, from now on.

        Args:
          now: seconds, of any clock that doesn't go back.
          load: the model's.

        Returns:
          Units, a multiple of `step`, at most capacity - reserve. Nothing before the load has been
          watched for `hold_s`.

        Raises:
          ConfigError: time or counters that go back, or a negative load.
        """
        self._check(now, load)
        self._measure(now, load)
        need = self.need(load)
        while self._peaks and self._peaks[-1][1] <= need:
            self._peaks.pop()
        self._peaks.append((now, need))
        while now - self._peaks[0][0] > self.config.hold_s:
            self._peaks.popleft()
        assert self._since is not None
        if now - self._since < self.config.hold_s:
            return 0
        left = max(0, self.config.capacity - self._peaks[0][1])
        self.lent = left // self.config.step * self.config.step
        return self.lent

    def _check(self, now: float, load: Load) -> None:
        if self._since is not None and now < self._now:
            raise ConfigError("now", now, f"{self._now} or later")
        if min(load.used, load.queue, load.per_request) < 0:
            raise ConfigError("load", load, "nothing below 0")
        if load.arrived < self._arrived and self._since is not None:
            raise ConfigError("arrived", load.arrived, f"{self._arrived} or more: a counter")

    def _measure(self, now: float, load: Load) -> None:
        """An average that forgets exponentially; right at once for a steady rate."""
        if self._since is None:
            self._since = now
        else:
            passed = now - self._now
            if passed > 0:
                fresh = (load.arrived - self._arrived) / passed
                weight = -math.expm1(-passed / self.config.rate_s)
                self._rate += weight * (fresh - self._rate)
            elif load.arrived > self._arrived:
                return  # counted with the next decision that takes time
        self._now, self._arrived = now, load.arrived
