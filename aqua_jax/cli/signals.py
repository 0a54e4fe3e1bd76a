"""Signals as a flag that loops look at between steps, and Ctrl-C that isn't lost before them.

Python raises KeyboardInterrupt wherever it happens to be; inside a callback or a finaliser of a
library it is swallowed, and the command would run on. A flag is never lost (`stop_signals`). Before
there is a loop, while libraries are imported and a model is loaded, what was swallowed is raised
again (`SwallowedInterrupts`).
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

_AGAIN_S = 0.02  # until a swallowed KeyboardInterrupt is raised again


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


class SwallowedInterrupts:
    """Raises KeyboardInterrupt again in the main thread when a library has swallowed it.

    In a callback (jax has one in the garbage collector) Python hands it to `sys.unraisablehook` and
    goes on. In the import of an extension module numpy's C interface hands it to `sys.excepthook`,
    and raises an ImportError without a cause.

    Attributes:
      seen: whether one was swallowed.
    """

    def __init__(self) -> None:
        self.seen = False

    def install(self) -> None:
        """Hooks into both, for the rest of the process."""
        unraisable, uncaught = sys.unraisablehook, sys.excepthook

        def on_unraisable(what: sys.UnraisableHookArgs, /) -> None:
            if not self._again(what.exc_type):
                unraisable(what)

        def on_uncaught(
            kind: type[BaseException], error: BaseException, trace: TracebackType | None
        ) -> None:
            if not self._again(kind):
                uncaught(kind, error, trace)

        sys.unraisablehook, sys.excepthook = on_unraisable, on_uncaught

    def _again(self, kind: type[BaseException]) -> bool:
        if not issubclass(kind, KeyboardInterrupt):
            return False
        self.seen = True
        # Later: raised here, it would be swallowed once more. A real signal ends a wait as well.
        main = threading.main_thread().ident
        assert main is not None
        timer = threading.Timer(_AGAIN_S, signal.pthread_kill, (main, signal.SIGINT))
        timer.daemon = True
        timer.start()
        return True
