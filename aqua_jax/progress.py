"""Progress on stderr: a bar on a terminal, now and then a log line elsewhere. No jax."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from typing import Any

from aqua_jax.closing import Closing

LOG_EVERY_S = 10.0

_log = logging.getLogger("aqua_jax.progress")


def duration(seconds: float) -> str:
    """Seconds as people say them: 42s, 3m05s, 2h10m."""
    whole = int(seconds + 0.5)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def counting_bar(label: str, unit: str) -> Callable[[int, int], None]:
    """A callback `(done, total)` that draws a bar on a terminal, and nothing elsewhere.

    Args:
      label: words before the bar.
      unit: what is counted.
    """
    bar: Any = None

    def show(done: int, total: int) -> None:
        nonlocal bar
        if not sys.stderr.isatty():
            return
        if bar is None:
            from tqdm import tqdm

            bar = tqdm(total=total, desc=label, unit=unit, file=sys.stderr, leave=False)
        bar.update(done - bar.n)
        if done == total:
            bar.close()

    return show


class Progress(Closing):
    """Counts requests and output tokens, shows tokens/s and the time left.

    The share that is done comes from `amount` out of `total`: requests when their number is known,
    bytes of the input otherwise.
    """

    def __init__(
        self,
        total: float,
        *,
        label: str = "",
        enabled: bool = True,
        initial: float = 0,
        terminal: bool | None = None,
    ):
        """
        Args:
          total: amount that is everything.
          label: words before the bar.
          enabled: False shows nothing.
          initial: amount done before this run (it doesn't count into rates).
          terminal: draw a bar; None: if stderr is a terminal.
        """
        self._total, self._done, self._initial = total, initial, initial
        self._label = label
        self._tokens = self._requests = 0
        self._start = self._logged = time.monotonic()
        self._failed = 0
        self._enabled = enabled
        self._on_terminal = sys.stderr.isatty() if terminal is None else terminal
        self._bar: Any = None  # drawn at the first sign of progress, below what loading logs

    def _draw(self) -> None:
        from tqdm import tqdm

        label = f"{self._label}: " if self._label else ""
        self._bar = tqdm(
            total=self._total, initial=self._done, file=sys.stderr, dynamic_ncols=True,
            smoothing=0.05, bar_format=label + "{percentage:3.0f}%|{bar}| {desc}, {remaining} left",
        )

    @property
    def tokens_per_second(self) -> float:
        """Output tokens over the time since the start."""
        return self._tokens / max(time.monotonic() - self._start, 1e-9)

    def restart_clock(self) -> None:
        """Counts rates from now: loading a model isn't generating."""
        self._start = self._logged = time.monotonic()

    def skip(self, amount: float) -> None:
        """Notes that `amount` of the total was done before this run."""
        self._done += amount
        self._initial += amount
        if self._bar is not None:
            self._bar.initial += amount
            self._bar.update(amount)

    def generated(self, tokens: int) -> None:
        """Notes `tokens` more output tokens, of requests that may still be running."""
        self._tokens += tokens
        self._show(0)

    def advance(
        self, amount: float, tokens: int = 0, *, requests: int = 1, failed: int = 0
    ) -> None:
        """Notes that `requests` requests making up `amount` of the total have ended."""
        self._done += amount
        self._tokens += tokens
        self._requests += requests
        self._failed += failed
        self._show(amount)

    def _show(self, amount: float) -> None:
        if not self._enabled:
            return
        if self._on_terminal:
            if self._bar is None:
                self._draw()
            else:
                self._bar.update(amount)
            self._bar.set_description_str(self._counts(), refresh=False)
        elif time.monotonic() - self._logged >= LOG_EVERY_S:
            self._logged = time.monotonic()
            _log.info("%s", self.line())

    def line(self) -> str:
        """Where things stand, in one line."""
        elapsed = time.monotonic() - self._start
        share = self._done / self._total if self._total else 1.0
        fresh = self._done - self._initial
        left = (self._total - self._done) / fresh * elapsed if fresh > 0 else 0.0
        label = f"{self._label}: " if self._label else ""
        return f"{label}{100 * share:.0f}%, {self._counts()}, about {duration(left)} left"

    def _counts(self) -> str:
        failed = f", {self._failed} errors" if self._failed else ""
        return f"{self._requests} done{failed}, {self.tokens_per_second:.0f} tok/s"

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.refresh()
            self._bar.close()
            self._bar = None
