"""`aqua-jax lend`: memory for other processes of this user."""

from __future__ import annotations

import contextlib
import functools
import signal
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from aqua_jax.cli.flagset import FlagSet, UsageError
from aqua_jax.cli.parsers import format_size
from aqua_jax.cli.signals import StopSignal, stop_signals
from aqua_jax.cli.telling import tell
from aqua_jax.errors import ConfigError

if TYPE_CHECKING:
    from aqua_jax.engine.device_lending import Gpu
    from aqua_jax.memory.arena import Arena
    from aqua_jax.memory.lendable import LentMemory

# Flags that mean something only with --socket, or with --listen.
_ONLY = {
    "socket": ("domain", "lend_bandwidth", "scrub"), "listen": ("max_clients", "resize"),
}
_LOOK_S = 0.1  # between two looks at what has come back


def define(flags: FlagSet) -> None:
    """Defines the command's flags."""
    with flags.group("Memory"):
        flags.size("bytes", None, "Memory to lend. Required.")
        flags.string(
            "device", "", "GPU whose memory is lent, such as cuda:1; default: the host's memory. "
            "Borrowers are engines whose GPUs reach it over NVLink or PCIe.", "cuda:N",
        )
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
            "prefer what is near. Default with --device: NUMA node and PCI address.", "NAME",
        )
        flags.size("lend_bandwidth", 0, "Bytes a second that a borrower may use; 0: all.")
        flags.switch("scrub", False, "Have memory zeroed before it comes back.")
    with flags.group("With --listen"):
        flags.integer("max_clients", 64, "Most borrowers at a time.", 1, 4096)
        flags.switch(
            "resize", False, "Don't lend: tell the lender that listens there to lend at most "
            "--bytes from now on.",
        )


_report = functools.partial(tell, "lend")


def _host_arena(flags: FlagSet) -> Arena:
    from aqua_jax.memory.arena import Arena

    return Arena.create(flags.bytes, "aqua-lend", huge_pages=flags.huge_pages)


def _gpu(flags: FlagSet) -> Gpu:
    """The GPU whose memory is lent.

    Raises:
      ConfigError: there is none; the host's huge pages were asked for.
    """
    if flags.huge_pages:
        raise ConfigError("huge_pages", True, f"false with --device={flags.device}")
    from aqua_jax.engine.device_lending import Gpu

    return Gpu(flags.device)


def _through_coordinator(flags: FlagSet, stop: StopSignal) -> None:
    """Lends until interrupted; then waits until everything is back.

    Memory of a GPU is lent in segments, and each goes back to it when all of it has come back.
    """
    from aqua_jax.memory.client import Client

    wake = threading.Event()  # waits without using the processor; signals end a wait
    with contextlib.ExitStack() as opened:
        domain = flags.domain
        if flags.device:
            gpu = _gpu(flags)
            domain = domain or gpu.identity.domain
            arenas: list[LentMemory] = list(gpu.segments(flags.bytes))
        else:
            arenas = [_host_arena(flags)]
        for arena in arenas:
            opened.callback(arena.close)
        client = opened.enter_context(
            Client(flags.socket, name=flags.name or "aqua-jax lend", domain=domain)
        )
        lendings = [
            client.lend(
                arena, name=flags.name, kind=arena.kind, device=arena.device,
                cap=flags.lend_bandwidth, scrub=flags.scrub,
            )
            for arena in arenas
        ]
        _report(
            f"{format_size(sum(arena.size for arena in arenas))} "
            f"{_where(flags, arenas)}through the coordinator at {flags.socket}; Ctrl-C asks for it "
            "back"
        )
        leaving, away = False, False
        while not leaving or any(lending.lent for lending in lendings):
            if stop() and not leaving:
                leaving = True
                left = sum(lending.reclaim(0, flags.drain_s) for lending in lendings)
                _report(
                    f"leaving when everything is back ({left >> 20} MiB are held); a second "
                    "signal leaves at once"
                )
            if client.connected == away:
                away = not away
                _report("the coordinator is away" if away else "the coordinator is back")
            if not any(lending.alive for lending in lendings):
                _report("the coordinator lends it no more")
                return
            for lending, arena in zip(lendings, arenas, strict=True):
                for start, end in lending.take_returned():
                    arena.vacate(start, end - start)
                if leaving and lending.alive and not lending.lent:
                    lending.close()
                    arena.close()
            if not leaving or any(lending.lent for lending in lendings):
                wake.wait(_LOOK_S)
        _report("everything is back, leaving")


def _where(flags: FlagSet, arenas: Sequence[LentMemory]) -> str:
    if not flags.device:
        return ""
    parts = f" in {len(arenas)} segments" if len(arenas) > 1 else ""
    return f"of {flags.device} ({arenas[0].device}){parts} "


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
    if flags.socket:
        with stop_signals() as stop:
            _through_coordinator(flags, stop)
    else:
        _listening(flags)
    return 0


def _listening(flags: FlagSet) -> None:
    from aqua_jax.memory.lender import Lender

    # A borrower gets one descriptor for all: one segment.
    segments = _gpu(flags).segments(flags.bytes, flags.bytes) if flags.device else []
    try:
        lender = Lender(
            flags.bytes, flags.listen, name=flags.name, huge_pages=flags.huge_pages,
            drain_s=flags.drain_s, max_clients=flags.max_clients, report=_report,
            arena=segments[0] if segments else None,
        )
    except ConfigError:
        for one in segments:
            one.close()
        raise
    with lender, stop_signals() as stop:
        # A signal writes to the pipe that wakes the lender up; the flag says why.
        before = signal.set_wakeup_fd(lender.wake_fd, warn_on_full_buffer=False)
        try:
            _report(
                f"{format_size(lender.arena.size)} {_where(flags, segments)}at {flags.listen}; "
                "Ctrl-C asks for it back"
            )
            lender.serve(stop)
        finally:
            signal.set_wakeup_fd(before)
