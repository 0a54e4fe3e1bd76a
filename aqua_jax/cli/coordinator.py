"""`aqua-jax coordinator`: keeps the ledger of lent memory on this machine."""

from __future__ import annotations

import asyncio
import functools
import resource
import signal
from typing import Any

from aqua_jax.cli.flagset import FlagSet, UsageError
from aqua_jax.cli.telling import tell
from aqua_jax.errors import ConfigError, DependencyError


def define(flags: FlagSet) -> None:
    """Defines the command's flags."""
    with flags.group("Where"):
        flags.string(
            "socket", None, "Socket of the coordinator: a path, or @name for one that is in no "
            "file system. Only this user can connect. A second one, PATH.fd, is beside it. "
            "Required.", "PATH",
        )
        flags.switch("status", False, "Ask the coordinator there who lends and who holds.")
    with flags.group("Leases"):
        flags.number(
            "term_s", 10.0, "Seconds after a client's last word until what it holds is "
            "quarantined.", 0.1, 3600.0,
        )
        flags.number(
            "drain_s", 10.0, "Most seconds that borrowers are given when memory is wanted back.",
            0.0, 3600.0,
        )
        flags.choice(
            "forced_reclaim", "never", ("never", "kill"), "What happens to a process that keeps "
            "memory beyond term and drain limit: its memory waits for it, or it is killed.",
        )
        flags.size("quota", None, "Most memory that one borrower may hold.")
        flags.integer(
            "max_clients", 64, "Most clients at a time, of one process half of them.", 1, 4096
        )
    with flags.group("Watching"):
        flags.integer(
            "metrics_port", None, "Port on localhost for Prometheus metrics.", 0, 65535
        )


_report = functools.partial(tell, "coordinator")


def run(flags: FlagSet) -> int:
    """Serves until interrupted, or shows the status of the one that serves.

    Returns:
      0.
    """
    if not flags.socket:
        raise UsageError("--socket is required: the path of a socket, or @name")
    if flags.status:
        from aqua_jax.coordinator.report import table
        from aqua_jax.memory.link import status

        print(table(status(flags.socket)))
        return 0
    try:
        from aqua_jax.coordinator.janitor import janitor
        from aqua_jax.coordinator.server import Server
        from aqua_jax.coordinator.service import Service

        if flags.metrics_port is not None:
            from aqua_jax.coordinator.metrics import Metrics
    except ImportError as error:
        raise DependencyError(
            f"a coordinator needs more packages ({error}): pip install 'aqua-jax[coordinator]'"
        ) from error

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard if hard > soft else soft, hard))

    async def serve() -> None:
        service = Service(
            term_s=flags.term_s, drain_s=flags.drain_s, quota=flags.quota,
            forced=flags.forced_reclaim == "kill", report=_report,
        )
        server = Server(flags.socket, service, max_clients=flags.max_clients)
        await server.start()
        metrics: Any = None
        try:
            if flags.metrics_port is not None:
                metrics = Metrics(service, flags.metrics_port)
                _report(f"metrics at http://localhost:{metrics.port}/metrics")
            stop = asyncio.Event()
            loop = asyncio.get_running_loop()
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, stop.set)
            _report(f"at {flags.socket}")
            await stop.wait()
        finally:
            if metrics is not None:
                metrics.close()
            await server.stop()

    with janitor(flags.socket):
        try:
            asyncio.run(serve())
        except ConfigError as error:
            flag, value = error.field, error.value
            if flag == "listen":  # at the path, or at the one beside it
                flag, value = "socket", flags.socket
            raise UsageError(f"flag --{flag}={value}: allowed: {error.allowed}") from None
    return 0
