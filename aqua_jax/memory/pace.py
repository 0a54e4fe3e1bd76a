"""The bandwidth term of a lease: copies to and from a lender's memory, never faster than it allows.

A lender says how many bytes a second a borrower may copy. Copies are asked for, admitted, and end.
One is admitted when it and all others that are under way, or ended within the last window, are no
more than the cap allows in a window. When a copy really happens is known only to lie between its
admission and the moment its end is seen; both count, so that in no window of that length more is
copied, whenever copies happen.
"""

from __future__ import annotations

import collections
import math
import time
from collections.abc import Callable, Hashable, Sequence

from aqua_jax.errors import ConfigError

WINDOW_S = 0.1


class Pace:
    """What may be copied to and from one lender's memory. Belongs to one thread.

    Attributes:
      cap: bytes a second.
      page_s: seconds that a page of the size given takes at that rate.
      delayed: copies that had to wait for their turn.
      delay_s: how long, in all.
    """

    def __init__(
        self, cap: int, page_bytes: int, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """
        Args:
          cap: bytes a second, at least 1.
          page_bytes: the largest copy; windows are long enough for one.
          clock: in seconds.

        Raises:
          ConfigError: not a rate, or not a size.
        """
        if cap < 1:
            raise ConfigError("cap", cap, "at least 1 byte a second")
        if page_bytes < 1:
            raise ConfigError("page_bytes", page_bytes, "at least 1")
        self.cap, self.page_s = cap, page_bytes / cap
        self.delayed, self.delay_s = 0, 0.0
        self._clock = clock
        self._window_s = max(WINDOW_S, self.page_s)
        # Not a byte less than a page, whatever division and product round to.
        self._most = max(page_bytes, int(cap * self._window_s))
        self._queued: dict[Hashable, int] = {}
        self._refused: dict[Hashable, float] = {}  # of these, since when
        self._under_way: dict[Hashable, int] = {}
        self._ended: collections.deque[tuple[float, int]] = collections.deque()
        self._backlog = self._used = 0  # bytes queued; under way or ended in the window

    @property
    def congested(self) -> bool:
        """Whether what is asked for already fills the present window."""
        self._forget()
        return self._used + self._backlog >= self._most

    def room(self, size: int) -> bool:
        """Whether a copy of `size` bytes, at most a page, would be admitted now."""
        self._forget()
        return self._used + size <= self._most

    def ask(self, what: Hashable, size: int) -> None:
        """A copy is planned; `admit` follows, or `ended`."""
        self._queued[what] = size
        self._backlog += size

    def admit(self, what: Hashable) -> bool:
        """Whether a copy that was asked for may begin now; if so it is under way."""
        size = self._queued[what]
        if not self.room(size):
            self.put_off(what)
            return False
        since = self._refused.pop(what, None)
        if since is not None:
            self.delayed += 1
            self.delay_s += self._clock() - since
        del self._queued[what]
        self._backlog -= size
        self.begin(what, size)
        return True

    def put_off(self, what: Hashable) -> None:
        """A copy that was asked for waits from now on, if it doesn't already."""
        if what not in self._refused:
            self._refused[what] = self._clock()

    def begin(self, what: Hashable, size: int) -> None:
        """A copy for which there was `room` is under way; counted once if both ends are here."""
        if what not in self._under_way:
            self._under_way[what] = size
            self._used += size

    def ended(self, what: Hashable) -> None:
        """A copy has been seen to have ended, or won't be made; unknown ones are ignored."""
        size = self._under_way.pop(what, None)
        if size is not None:
            self._ended.append((self._clock(), size))
            return
        size = self._queued.pop(what, None)
        if size is not None:
            self._backlog -= size
            self._refused.pop(what, None)

    def ready_in(self) -> float:
        """Seconds until something that was refused may be admitted; infinite if that depends on
        copies under way, 0 if nothing was refused or it may be tried now."""
        self._forget()
        if not self._refused:
            return 0.0
        size = min(self._queued[what] for what in self._refused)
        used = self._used
        if used + size <= self._most:
            return 0.0
        now = self._clock()
        for at, gone in self._ended:
            used -= gone
            if used + size <= self._most:
                return max(0.0, at + self._window_s - now)
        return math.inf

    def _forget(self) -> None:
        """What ended before the window counts no more."""
        if not self._ended:
            return
        before = self._clock() - self._window_s
        while self._ended and self._ended[0][0] < before:
            self._used -= self._ended.popleft()[1]


class JointPace:
    """What a copy keeps to that is made in parts, to and from several lenders' memory at once.

    Attributes:
      page_s: seconds that a page takes at the rate of the slowest.
    """

    def __init__(self, paces: Sequence[tuple[Pace, int]], page_bytes: int) -> None:
        """
        Args:
          paces: each lender's that has one, and the bytes of a page in its memory; one that is
            named more often has as many of them.
          page_bytes: of a whole page.
        """
        self._page_bytes = page_bytes
        self._shares: dict[Pace, int] = {}
        for pace, size in paces:
            self._shares[pace] = self._shares.get(pace, 0) + size
        self.page_s = max(size / pace.cap for pace, size in self._shares.items())
        self._queued: dict[Hashable, int] = {}

    def _parts(self, size: int) -> list[tuple[Pace, int]]:
        return [(pace, size * share // self._page_bytes) for pace, share in self._shares.items()]

    @property
    def congested(self) -> bool:
        """Whether what is asked for already fills the present window of one."""
        return any(pace.congested for pace in self._shares)

    def room(self, size: int) -> bool:
        """Whether a copy of `size` bytes would be admitted by all now."""
        return all(pace.room(part) for pace, part in self._parts(size))

    def ask(self, what: Hashable, size: int) -> None:
        """A copy is planned; `admit` follows, or `ended`."""
        self._queued[what] = size
        for pace, part in self._parts(size):
            pace.ask(what, part)

    def admit(self, what: Hashable) -> bool:
        """Whether a copy that was asked for may begin now; if so it is under way."""
        parts = self._parts(self._queued[what])
        refusing = [pace for pace, part in parts if not pace.room(part)]
        for pace in refusing:  # the others would count it as under way
            pace.put_off(what)
        if not refusing:
            del self._queued[what]
            for pace, _ in parts:
                pace.admit(what)
        return not refusing

    def begin(self, what: Hashable, size: int) -> None:
        """A copy for which there was `room` is under way."""
        for pace, part in self._parts(size):
            pace.begin(what, part)

    def ended(self, what: Hashable) -> None:
        """A copy has been seen to have ended, or won't be made; unknown ones are ignored."""
        self._queued.pop(what, None)
        for pace in self._shares:
            pace.ended(what)
