"""`aqua-jax lend`: memory for other processes of this user."""

from __future__ import annotations

import os
import signal
import sys

from aqua_jax.cli.flagset import FlagSet, UsageError
from aqua_jax.cli.parsers import format_size
from aqua_jax.cli.signals import stop_signals
from aqua_jax.errors import ConfigError


def define(flags: FlagSet) -> None:
    """Defines the command's flags."""
    with flags.group("Memory"):
        flags.size("bytes", None, "Memory to lend. Required.")
        flags.switch("huge_pages", False, "Advise the system to use huge pages for it.")
    with flags.group("Borrowers"):
        flags.string(
            "listen", None, "Socket to listen at: a path, or @name for one that is in no file "
            "system. Only this user can connect. Required.", "PATH",
        )
        flags.string("name", "", "Name told to borrowers.", "NAME")
        flags.number(
            "drain_s", 10.0, "Seconds that borrowers are given when memory is wanted back. Later "
            "than that it is still theirs until they give it back or exit.", 0.0, 86400.0,
        )
        flags.integer("max_clients", 64, "Most borrowers at a time.", 1, 4096)
        flags.switch(
            "resize", False, "Don't lend: tell the lender that listens there to lend at most "
            "--bytes from now on.",
        )


def _report(line: str) -> None:
    try:
        print(f"aqua-jax lend: {line}", file=sys.stderr, flush=True)
    except OSError:
        # Nobody reads it any more, but borrowers still need us.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stderr.fileno())
        os.close(nowhere)


def run(flags: FlagSet) -> int:
    """Lends until interrupted; then waits until everything is back.

    Returns:
      0.
    """
    if not flags.listen:
        raise UsageError("--listen is required: the path of a socket, or @name")
    if flags.bytes is None:
        raise UsageError("--bytes is required: how much to lend, such as 1GiB")

    if flags.resize:
        from aqua_jax.memory.borrower import Borrower

        with Borrower(flags.listen, name="aqua-jax lend --resize") as borrower:
            borrower.resize(flags.bytes)
        return 0

    from aqua_jax.memory.lender import Lender

    try:
        lender = Lender(
            flags.bytes, flags.listen, name=flags.name, huge_pages=flags.huge_pages,
            drain_s=flags.drain_s, max_clients=flags.max_clients, report=_report,
        )
    except ConfigError as error:
        raise UsageError(f"flag --{error.field}={error.value}: allowed: {error.allowed}") from None
    with lender, stop_signals() as stop:
        # A signal writes to the pipe that wakes the lender up; the flag says why.
        before = signal.set_wakeup_fd(lender.wake_fd, warn_on_full_buffer=False)
        try:
            _report(f"{format_size(lender.arena.size)} at {flags.listen}; Ctrl-C asks for it back")
            lender.serve(stop)
        finally:
            signal.set_wakeup_fd(before)
    return 0
