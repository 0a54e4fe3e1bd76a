"""Signals as a flag that loops look at between steps, and Ctrl-C that does no harm before them.

Python raises KeyboardInterrupt wherever it happens to be; inside a callback or a finaliser of a
library it is swallowed, and the command would run on. A flag is never lost (`stop_signals`). There
is no loop yet while libraries are imported and a model is loaded; `gentle_interrupts` is for then.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED = 130  # exit status
_AGAIN_S = 0.02  # until Ctrl-C that had to wait, or was swallowed, is raised again


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


def gentle_interrupts() -> None:
    """From now on Ctrl-C ends the process as ever, but at no bad moment, nor in vain.

    An extension module whose import is cut short stays half initialised: numpy's raise an
    ImportError without a cause, and jaxlib crashed. So Ctrl-C waits until it is there. In a
    callback (jax has one in the garbage collector) Python tells `sys.unraisablehook` of the
    KeyboardInterrupt and goes on; there it is raised again a moment later.

    Where SIGINT is ignored, as in a shell's background jobs, it stays so.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return
    unraisable = sys.unraisablehook

    def on_unraisable(what: sys.UnraisableHookArgs, /) -> None:
        if issubclass(what.exc_type, KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, _AGAIN_S)
        else:
            unraisable(what)

    sys.unraisablehook = on_unraisable
    # A timer's signal, not a thread: threads can't be started safely in a signal handler.
    signal.signal(signal.SIGALRM, lambda number, frame: signal.raise_signal(signal.SIGINT))
    signal.signal(signal.SIGINT, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    while frame is not None:
        if frame.f_code.co_qualname.startswith("ExtensionFileLoader."):
            signal.setitimer(signal.ITIMER_REAL, _AGAIN_S)
            return
        frame = frame.f_back
    raise KeyboardInterrupt


def interrupted() -> int:
    """Says that Ctrl-C has ended the command, and ignores further ones.

    Returns:
      The exit status.
    """
    # A second Ctrl-C while we clean up shouldn't end in a traceback.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    print("\naqua-jax: interrupted", file=sys.stderr)
    return INTERRUPTED
