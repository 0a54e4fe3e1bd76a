"""A real server in a thread, over a two-layer model with a real tokenizer."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import pathlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from aqua_jax.config import EngineConfig
from aqua_jax.engine.async_engine import AsyncEngine
from aqua_jax.server import http
from aqua_jax.server.app import Server
from aqua_jax.server.config import ServerConfig
from aqua_jax.server.keys import Keys
from tests.cli.text_model import write_text_model

MODEL = "tiny-text"


def text_engine_config(folder: pathlib.Path, **settings: Any) -> EngineConfig:
    """Over a model written into `folder`; keyword arguments override."""
    model = folder / MODEL
    if not model.exists():
        write_text_model(model)
    defaults = {
        "load_format": "dummy", "dtype": "float32", "kv_cache_tokens": 8192, "max_num_seqs": 16,
        "max_step_tokens": 128, "warmup": "none",
    }
    return EngineConfig(model=str(model), **{**defaults, **settings})


@dataclasses.dataclass
class Served:
    """A running server and how to reach it."""

    server: Server
    engine: AsyncEngine
    url: str
    port: int
    stop: Callable[[], None]  # begins to drain
    thread: threading.Thread

    def pages_in_use(self) -> int:
        """Pages that requests hold."""
        return int(self.engine.stats()["pages"]["in_use"])

    def idle(self, seconds: float = 20.0) -> bool:
        """Whether every request is gone, from server and engine, in time."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            stats = self.engine.stats()
            if not (self.server.gate.live or stats["live_requests"] or stats["pages"]["in_use"]):
                return True
            time.sleep(0.01)
        return False


@contextlib.contextmanager
def serving(
    config: EngineConfig, keys: list[str] | None = None, engine: AsyncEngine | None = None,
    **settings: Any,
) -> Iterator[Served]:
    """A server in a thread of its own until the context ends; then no thread of it is left.

    Args:
      config: of the engine.
      keys: that are let in.
      engine: to serve instead of a new one; it isn't shut down.
      **settings: of `ServerConfig`.
    """
    before = set(threading.enumerate())
    inner = engine or AsyncEngine(config)
    bound = http.bind("127.0.0.1", 0)
    started = threading.Event()
    server = Server(
        inner, ServerConfig(**{"drain_timeout_s": 5.0, **settings}), model=inner.model_name,
        max_model_len=inner.max_model_len, keys=Keys(keys or []),
    )
    loop = asyncio.new_event_loop()
    holder: list[http.HttpServer] = []

    async def run() -> None:
        holder.append(http.HttpServer(server, bound, on_start=started.set))
        await holder[0].run_until_stopped()

    def work() -> None:
        with contextlib.closing(loop):
            loop.run_until_complete(run())
            loop.run_until_complete(loop.shutdown_asyncgens())

    thread = threading.Thread(target=work, name="aqua-http")
    thread.start()
    assert started.wait(30)

    def stop() -> None:
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(holder[0].stop)

    try:
        url = http.url(bound)
        yield Served(server, inner, url, bound.getsockname()[1], stop, thread)
    finally:
        stop()
        thread.join(60)
        if engine is None:
            inner.shutdown()
    assert not thread.is_alive()
    left = [one for one in set(threading.enumerate()) - before if one.name.startswith("aqua")]
    assert not left, left


def post_bytes(path: str, body: Any, *headers: str) -> bytes:
    """A request as it goes over the wire."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [
        f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json",
        f"Content-Length: {len(data)}", *headers, "", "",
    ]
    return "\r\n".join(lines).encode() + data


def connect(port: int, seconds: float = 20.0) -> socket.socket:
    """A plain connection."""
    return socket.create_connection(("127.0.0.1", port), timeout=seconds)


def read_response(connection: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """(status, headers, body) of one response; streams until their last chunk."""
    file = connection.makefile("rb")
    status = int(file.readline().split()[1])
    headers = {}
    while (line := file.readline().strip()):
        name, _, value = line.decode().partition(":")
        headers[name.lower()] = value.strip()
    if headers.get("transfer-encoding") == "chunked":
        parts = []
        while size := int(file.readline(), 16):
            parts.append(file.read(size))
            file.readline()
        return status, headers, b"".join(parts)
    return status, headers, file.read(int(headers.get("content-length", 0)))


def ask(port: int, path: str, body: Any, *headers: str) -> tuple[int, dict[str, str], Any]:
    """(status, headers, decoded JSON) of a POST."""
    with connect(port) as connection:
        connection.sendall(post_bytes(path, body, *headers))
        status, found, data = read_response(connection)
    return status, found, json.loads(data) if data else None


def get(port: int, path: str, *headers: str) -> tuple[int, dict[str, str], bytes]:
    """(status, headers, body) of a GET."""
    with connect(port) as connection:
        lines = [f"GET {path} HTTP/1.1", "Host: x", *headers, "", ""]
        connection.sendall("\r\n".join(lines).encode())
        return read_response(connection)
