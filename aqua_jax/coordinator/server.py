"""The coordinator as a gRPC server at a Unix socket that only this user can reach."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc

from aqua_jax.coordinator import messages_pb2 as messages
from aqua_jax.coordinator import translate
from aqua_jax.coordinator.door import Door, Peer
from aqua_jax.coordinator.service import Service, Session
from aqua_jax.coordinator.sockets import directory_lock, door_of, remove_stale, target_of
from aqua_jax.errors import AquaError, ConfigError, LedgerError

_log = logging.getLogger(__name__)

NAME = "aqua_jax.coordinator.Coordinator"
TOKEN = "aqua-token"
HELLO_S = 5.0  # for a connection to say who it is
MOST_MESSAGE = 4 << 20


def _options(most_clients: int) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", MOST_MESSAGE),
        ("grpc.max_metadata_size", 4096),
        ("grpc.max_concurrent_streams", 4),
        # Connections without a call; those of clients have one as long as they live.
        ("grpc.max_connection_idle_ms", 5000),
        ("grpc.max_allowed_incoming_connections", 2 * most_clients + 16),
        ("grpc.server_handshake_timeout_ms", 5000),
    ]


def _parser(kind: Any) -> Callable[[bytes], Any]:
    """Messages from bytes; None where they are none, which is answered, not dropped."""
    def parse(data: bytes) -> Any:
        try:
            return kind.FromString(data)
        except Exception:  # protobuf's DecodeError, whatever module it comes from
            return None

    return parse


class Server:
    """A coordinator that listens at `path`.

    Raises:
      ConfigError: the path can't be listened on.
    """

    def __init__(self, path: str, service: Service, *, max_clients: int = 64) -> None:
        """
        Args:
          path: of the socket, or @name; the door is beside it.
          service: what to do.
          max_clients: at a time.
        """
        self.path, self.service = path, service
        self._most = max_clients
        self._door: Door | None = None
        self._server: Any = None
        self._attached: set[bytes] = set()

    async def start(self) -> None:
        """Begins to serve, on the running loop.

        Raises:
          ConfigError: the path can't be listened on.
        """
        # The door comes first: two coordinators can't both have it.
        self._door = Door(door_of(self.path), 2 * self._most)
        try:
            remove_stale(self.path)
            self._server = grpc.aio.server(
                options=_options(self._most), maximum_concurrent_rpcs=2 * self._most
            )
            self._server.add_generic_rpc_handlers((self._handlers(),))
            self._bind()
        except (AquaError, OSError):
            self._door.close()
            raise
        self._door.open()
        self.service.start()
        await self._server.start()

    def _bind(self) -> None:
        # Nobody, such as a janitor of the last coordinator, must see the socket bound and not yet
        # listening: it would take it away.
        with directory_lock(self.path):
            before = os.umask(0o177)
            try:
                self._server.add_insecure_port(target_of(self.path))
            except RuntimeError as error:
                raise ConfigError(
                    "socket", self.path, f"where a socket can be made ({error})"
                ) from error
            finally:
                os.umask(before)

    async def stop(self) -> None:
        """Ends all connections and removes the sockets."""
        await self.service.stop()
        if self._server is not None:
            await self._server.stop(0.2)
        with contextlib.suppress(ConfigError, OSError):
            remove_stale(self.path)
        if self._door is not None:  # last: whoever has the door has the path
            self._door.close()

    def _handlers(self) -> Any:
        return grpc.method_handlers_generic_handler(NAME, {
            "Attach": grpc.stream_stream_rpc_method_handler(
                self._attach, request_deserializer=_parser(messages.FromClient),
                response_serializer=messages.ToClient.SerializeToString,
            ),
            "Status": grpc.unary_unary_rpc_method_handler(
                self._status, request_deserializer=_parser(messages.StatusRequest),
                response_serializer=messages.StatusReply.SerializeToString,
            ),
        })

    async def _peer(self, context: Any) -> Peer:
        """Who calls; ends the call of somebody who hasn't come through the door."""
        token = b""
        for name, value in context.invocation_metadata() or ():
            if name == TOKEN:
                with contextlib.suppress(ValueError):
                    token = bytes.fromhex(value)
        peer = self._door.peers.get(token) if self._door is not None else None
        if peer is None:
            await context.abort(
                grpc.StatusCode.UNAUTHENTICATED, f"no token of {door_of(self.path)}"
            )
            raise AssertionError  # abort raises
        return peer

    async def _status(self, request: Any, context: Any) -> messages.StatusReply:
        await self._peer(context)
        return translate.status(self.service.ledger, self.service.started)

    async def _attach(
        self, requests: AsyncIterator[Any], context: Any
    ) -> AsyncIterator[messages.ToClient]:
        peer = await self._peer(context)
        if peer.token in self._attached:
            await context.abort(grpc.StatusCode.ALREADY_EXISTS, "the token is in use")
        if len(self._attached) >= self._most:
            await context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED, f"{self._most} clients are the most"
            )
        each = -(-self._most // 2)  # so that no process has all places
        if self._most > 1 and self._of(peer.pid) >= each:
            await context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED, f"{each} clients of one process are the most"
            )
        self._attached.add(peer.token)
        peer.attached = True
        session = Session(peer)
        peer.on_close = session.end
        reader = asyncio.create_task(self._read(session, requests))
        try:
            while (message := await session.outbox.get()) is not None:
                yield message
        finally:
            reader.cancel()
            self._attached.discard(peer.token)
            self.service.ended(session)
            peer.on_close = lambda: None
            peer.close()

    def _of(self, pid: int) -> int:
        """Clients of one process."""
        assert self._door is not None
        return sum(peer.attached and peer.pid == pid for peer in self._door.peers.values())

    async def _read(self, session: Session, requests: AsyncIterator[Any]) -> None:
        try:
            async with asyncio.timeout(HELLO_S):
                first = await anext(requests)
            try:
                if first is None or first.WhichOneof("body") != "hello":
                    raise LedgerError("message", first, "hello, the first message")
                self.service.hello(session, first.id, first.hello)
            except AquaError as error:
                session.say(translate.error(0 if first is None else first.id, error))
                return
            async for message in requests:
                if message is None:
                    session.say(translate.error(
                        0, LedgerError("message", "bytes", "a message of messages.proto")
                    ))
                    return
                await self.service.handle(session, message)
        except (TimeoutError, StopAsyncIteration, asyncio.CancelledError):
            pass
        except Exception:
            # Ours, not the client's: it loses its connection, others go on.
            _log.exception("a client's message could not be dealt with")
        finally:
            session.end()
