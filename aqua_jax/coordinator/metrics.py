"""The coordinator's figures for Prometheus, at a port of localhost."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from aqua_jax.coordinator import messages_pb2 as messages
from aqua_jax.coordinator.service import Service
from aqua_jax.errors import ConfigError

_MEANINGS = {
    "grants": "requests granted", "granted_bytes": "bytes granted",
    "refused": "requests without room", "revokes": "times a holder was asked to give back",
    "returned_bytes": "bytes returned to lenders", "lost": "ranges lost with their lender",
    "exits": "client processes that exited", "kills": "holders killed",
    "errors": "requests answered with an error", "zeroed_bytes": "bytes zeroed",
}


class Metrics:
    """Serves the figures of a service, as they were at its last look, a moment ago.

    Raises:
      ConfigError: the port can't be had.
    """

    def __init__(self, service: Service, port: int) -> None:
        """
        Args:
          service: whose.
          port: of localhost; 0: any free one.
        """
        self._service = service
        registry = CollectorRegistry()
        registry.register(self)
        try:
            self._server, self._thread = start_http_server(
                port, addr="127.0.0.1", registry=registry
            )
        except OSError as error:
            raise ConfigError("metrics_port", port, f"a free port ({error})") from error
        self.port = self._server.server_port

    def collect(self) -> Iterator[Any]:
        """What Prometheus calls, in a thread of its own."""
        reply = self._service.snapshot()
        yield from _gauges(reply)
        for name, value in dataclasses.asdict(self._service.counters).items():
            family = CounterMetricFamily(f"aqua_coordinator_{name}", _MEANINGS[name])
            family.add_metric([], value)
            yield family

    def close(self) -> None:
        """Stops serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _gauges(reply: messages.StatusReply) -> Iterator[Any]:
    clients = GaugeMetricFamily(
        "aqua_coordinator_clients", "clients by state", labels=["state"]
    )
    for state in ("connected", "away", "quarantined"):
        clients.add_metric([state], sum(row.state == state for row in reply.clients))
    yield clients
    # By process: an engine lends each extent by itself, and its number says nothing to anybody.
    yield _by_process(
        "aqua_coordinator_lent_bytes", "lent bytes by lender and what becomes of them", "lender", [
            ((arena.lender, str(arena.pid), state), getattr(arena, state))
            for arena in reply.arenas for state in ("lent", "free", "dirty", "held", "wanted")
        ],
    )
    yield _by_process(
        "aqua_coordinator_held_bytes", "borrowed bytes by holder", "holder", [
            ((lease.holder, str(lease.pid), state), value)
            for lease in reply.leases
            for state, value in (
                ("held", lease.held), ("wanted", lease.wanted),
                ("quarantined", lease.held if lease.quarantined else 0),
            )
        ],
    )


def _by_process(
    name: str, meaning: str, who: str, values: Iterable[tuple[tuple[str, str, str], int]]
) -> GaugeMetricFamily:
    """Sums by (name, process id, state)."""
    totals: dict[tuple[str, str, str], int] = {}
    for label, value in values:
        totals[label] = totals.get(label, 0) + value
    family = GaugeMetricFamily(name, meaning, labels=[who, "pid", "state"])
    for label, value in totals.items():
        family.add_metric(list(label), value)
    return family

