"""Signals as a flag that loops look at between steps.

Python raises KeyboardInterrupt wherever it happens to be; inside a callback or a finaliser of a
library it is swallowed, and the command would run on. A flag is never lost.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopSignal:
    """Whether Ctrl-C or a request to end has come, and which.

    Attributes:
      number: of the signal; 0: none.
    """

    def __init__(self, message: str) -> None:
        self.number = 0
        self._message = message

    def __call__(self) -> bool:
        """Whether one has come."""
        return self.number != 0

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Signal handler: the first asks to stop after the current step, a second stops at once."""
        if self.number:
            raise KeyboardInterrupt
        self.number = number
        if self._message:
            print(self._message, file=sys.stderr)


@contextmanager
def stop_signals(message: str = "") -> Iterator[StopSignal]:
    """Within, SIGINT and SIGTERM set a flag instead of ending the process.

    Args:
      message: shown when the first one comes.
    """
    stop = StopSignal(message)
    before = {
        number: signal.signal(number, stop.handle) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
