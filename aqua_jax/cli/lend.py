"""`aqua-jax lend`: memory for other processes of this user."""

from __future__ import annotations

import os
import signal
import sys
import threading

from aqua_jax.cli.flagset import FlagSet, UsageError
from aqua_jax.cli.parsers import format_size
from aqua_jax.cli.signals import StopSignal, stop_signals
from aqua_jax.errors import ConfigError

# Flags that mean something only with --socket, or with --listen.
_ONLY = {
    "socket": ("domain", "lend_bandwidth", "scrub"), "listen": ("max_clients", "resize"),
}
_LOOK_S = 0.1  # between two looks at what has come back


def define(flags: FlagSet) -> None:
    """Defines the command's flags."""
    with flags.group("Memory"):
        flags.size("bytes", None, "Memory to lend. Required.")
        flags.switch("huge_pages", False, "Advise the system to use huge pages for it.")
    with flags.group("Borrowers"):
        flags.string(
            "socket", None, "Socket of the coordinator to lend through: a path, or @name. This or "
            "--listen is required.", "PATH",
        )
        flags.string(
            "listen", None, "Lend without a coordinator: the socket to listen at, a path or @name "
            "for one that is in no file system. Only this user can connect.", "PATH",
        )
        flags.string("name", "", "Name told to borrowers.", "NAME")
        flags.number(
            "drain_s", 10.0, "Seconds that borrowers are given when memory is wanted back. Later "
            "than that it is still theirs until they give it back or exit.", 0.0, 86400.0,
        )
    with flags.group("With --socket"):
        flags.string(
            "domain", "", "Where the memory is, from the outside in, such as node0/gpu1. Borrowers "
            "prefer what is near.", "NAME",
        )
        flags.size("lend_bandwidth", 0, "Bytes a second that a borrower may use; 0: all.")
        flags.switch("scrub", False, "Have memory zeroed before it comes back.")
    with flags.group("With --listen"):
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


def _through_coordinator(flags: FlagSet, stop: StopSignal) -> None:
    """Lends until interrupted; then waits until everything is back."""
    from aqua_jax.memory.arena import Arena
    from aqua_jax.memory.client import Client

    wake = threading.Event()  # waits without using the processor; signals end a wait
    with (
        Arena.create(flags.bytes, "aqua-lend", huge_pages=flags.huge_pages) as arena,
        Client(flags.socket, name=flags.name or "aqua-jax lend", domain=flags.domain) as client,
    ):
        lending = client.lend(
            arena, name=flags.name, cap=flags.lend_bandwidth, scrub=flags.scrub
        )
        _report(
            f"{format_size(arena.size)} through the coordinator at {flags.socket}; Ctrl-C asks "
            "for it back"
        )
        leaving, away = False, False
        while not leaving or lending.lent:
            if stop() and not leaving:
                leaving = True
                left = lending.reclaim(0, flags.drain_s)
                _report(
                    f"leaving when everything is back ({left >> 20} MiB are held); a second "
                    "signal leaves at once"
                )
            if client.connected == away:
                away = not away
                _report("the coordinator is away" if away else "the coordinator is back")
            if not lending.alive:
                _report("the coordinator lends it no more")
                return
            for start, end in lending.take_returned():
                arena.vacate(start, end - start)
            if not leaving or lending.lent:
                wake.wait(_LOOK_S)
        _report("everything is back, leaving")
        lending.close()


def run(flags: FlagSet) -> int:
    """Lends until interrupted; then waits until everything is back.

    Returns:
      0.
    """
    if bool(flags.listen) == bool(flags.socket):
        raise UsageError(
            "either --socket, a coordinator's, or --listen is required: the path of a socket, or "
            "@name"
        )
    for way, names in _ONLY.items():
        for name in names:
            if flags.given(name) and not getattr(flags, way):
                raise UsageError(f"flag --{name} means nothing without --{way}")
    if flags.bytes is None:
        raise UsageError("--bytes is required: how much to lend, such as 1GiB")

    if flags.resize:
        if not flags.listen:
            raise UsageError("--resize needs --listen: the socket of the lender")
        from aqua_jax.memory.borrower import Borrower

        with Borrower(flags.listen, name="aqua-jax lend --resize") as borrower:
            borrower.resize(flags.bytes)
        return 0
    try:
        if flags.socket:
            with stop_signals() as stop:
                _through_coordinator(flags, stop)
        else:
            _listening(flags)
    except ConfigError as error:
        raise UsageError(f"flag --{error.field}={error.value}: allowed: {error.allowed}") from None
    return 0


def _listening(flags: FlagSet) -> None:
    from aqua_jax.memory.lender import Lender

    lender = Lender(
        flags.bytes, flags.listen, name=flags.name, huge_pages=flags.huge_pages,
        drain_s=flags.drain_s, max_clients=flags.max_clients, report=_report,
    )
    with lender, stop_signals() as stop:
        # A signal writes to the pipe that wakes the lender up; the flag says why.
        before = signal.set_wakeup_fd(lender.wake_fd, warn_on_full_buffer=False)
        try:
            _report(f"{format_size(lender.arena.size)} at {flags.listen}; Ctrl-C asks for it back")
            lender.serve(stop)
        finally:
            signal.set_wakeup_fd(before)
