"""uvicorn around the application: sockets, time limits of connections, a shutdown that drains."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterator

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from aqua_jax.errors import ConfigError
from aqua_jax.server.app import Server

_BACKLOG = 2048
_KEEP_ALIVE_S = 75
# A peer that has acknowledged, or taken, nothing for so long is gone. The system sees to it: a time
# limit around every send was a fifth of the event loop's work a token.
_UNACKED_MS = 600_000
_LAST_WORDS_S = 2.0  # for answers that were cut off to be written out


def bind(host: str, port: int) -> socket.socket:
    """A bound TCP socket that doesn't listen yet: taken ports are errors before a model loads.

    Raises:
      ConfigError: the address is unknown or taken.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        bound = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError("host", host, f"an address of this machine ({error})") from None
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Accepted sockets inherit these: connections to machines that are gone end by themselves.
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNACKED_MS)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise ConfigError("port", port, f"a free port at {host} ({error})") from None
    return bound


def url(bound: socket.socket) -> str:
    """Where a socket is reached."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Connection(HttpToolsProtocol):
    """A connection that must say what it wants in time.

    uvicorn limits how long a connection may idle between requests; this one limits every request's
    head as well, the first one from the beginning, so that half-open connections end.
    """

    read_timeout_s = 30.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """asyncio."""
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """asyncio."""
        self._head_due.cancel()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        """httptools: the first byte of a request."""
        super().on_message_begin()
        if self.cycle is not None:  # the first one's time has begun before
            self._await_head()

    def on_headers_complete(self) -> None:
        """httptools: a request's head is there."""
        self._head_due.cancel()
        super().on_headers_complete()

    def _await_head(self) -> None:
        self._head_due = self.loop.call_later(self.read_timeout_s, self._close_unless_busy)

    def _close_unless_busy(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._await_head()  # half a request behind one that is being answered
        elif not self.transport.is_closing():
            self.transport.close()


class HttpServer(uvicorn.Server):
    """Serves an application from a bound socket until `stop`; then drains.

    Draining: no new connections; live requests have `drain_timeout_s` to end, then they are
    aborted, and their clients told.
    """

    def __init__(
        self, server: Server, bound: socket.socket, on_start: Callable[[], None] = lambda: None
    ) -> None:
        """`on_start` is called when connections are accepted."""
        self._server, self._bound, self._on_start = server, bound, on_start
        read_timeout_s = server.config.read_timeout_s
        protocol = type("Connection", (_Connection,), {"read_timeout_s": read_timeout_s})
        super().__init__(uvicorn.Config(
            server.app, http=protocol, ws="none", lifespan="off", log_config=None,
            access_log=False, server_header=False, backlog=_BACKLOG,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=server.config.drain_timeout_s + _LAST_WORDS_S,  # type: ignore
        ))

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the caller's business."""
        yield

    async def run_until_stopped(self) -> None:
        """Listens, serves, and after `stop` returns when everything has ended."""
        await self.serve(sockets=[self._bound])

    def stop(self) -> None:
        """Begins to drain; a second call ends at once. Call it on the event loop."""
        if self.should_exit:
            self.force_exit = True
            self._server.abort_all()
        self.should_exit = True
        self._server.draining = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Called by uvicorn."""
        await super().startup(sockets)
        self._on_start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Called by uvicorn when `stop` has been."""
        loop = asyncio.get_running_loop()
        end = loop.call_later(self._server.config.drain_timeout_s, self._server.abort_all)
        try:
            await super().shutdown(sockets)
        finally:
            end.cancel()
            for connection in list(self.server_state.connections):
                connection.transport.abort()  # readers that never took the last of their answer
            self._server.close()
