"""`aqua-jax serve`: a model behind HTTP."""

from __future__ import annotations

import asyncio
import dataclasses
import importlib.util
import logging
import resource
import signal
import sys
import threading
from typing import TYPE_CHECKING

from aqua_jax.cli import flags as common
from aqua_jax.cli.flagset import FlagSet
from aqua_jax.errors import ConfigError, DependencyError

if TYPE_CHECKING:
    from aqua_jax.server.http import HttpServer

_log = logging.getLogger(__name__)

# Fields of EngineConfig that this command sets itself, such as {"policy": "fair"}.
ENGINE_DEFAULTS: dict[str, object] = {}

SWITCH_INTERVAL_S = 0.0005


def define(flags: FlagSet) -> None:
    """Defines the command's flags."""
    common.define_model_flags(flags)
    with flags.group("Server"):
        flags.string("host", "127.0.0.1", "Address to listen at; 0.0.0.0: all of them.", "HOST")
        flags.integer("port", 8000, "Port; 0: a free one, which is printed.", 0, 65535)
        flags.string(
            "served_model_name", None, "Name that clients use; default: the model's own.", "NAME"
        )
        flags.string(
            "api_key_file", None, "File with API keys, one a line. Without it everybody who "
            "reaches the port is let in.", "FILE",
        )
        flags.integer(
            "max_live_requests", 1024, "Most requests answered or waiting; more are told to come "
            "back later (429).", 1,
        )
        flags.size("max_body_bytes", 4 << 20, "Longest body of a request.")
        flags.number(
            "read_timeout_s", 30.0, "Time for the head and the body of a request to arrive.",
            0.001, 86400.0,
        )
        flags.number(
            "drain_timeout_s", 30.0, "On SIGTERM or Ctrl-C, time for live requests to end before "
            "they are aborted. A second one aborts them at once.", 0.0, 86400.0,
        )
    common.define_engine_flags(flags)


def _check_extra() -> None:
    for name in ("starlette", "uvicorn", "httptools", "prometheus_client"):
        if importlib.util.find_spec(name) is None:
            raise DependencyError(f"`serve` needs {name}: pip install 'aqua-jax[serve]'")


def _allow_connections() -> None:
    """As many descriptors as this process may have: a stream takes one, and 1,024 is a usual
    limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def run(flags: FlagSet) -> int:
    """Serves until a signal, then drains.

    Returns:
      0.
    """
    _check_extra()
    given = {name: value for name, value in ENGINE_DEFAULTS.items() if not flags.given(name)}
    engine_config = common.engine_config(flags, **given)

    from aqua_jax.server import http
    from aqua_jax.server.config import ServerConfig
    from aqua_jax.server.keys import Keys

    names = [field.name for field in dataclasses.fields(ServerConfig)]
    try:
        config = ServerConfig(**{name: getattr(flags, name) for name in names})
        keys = Keys.read(config.api_key_file) if config.api_key_file else Keys([])
        bound = http.bind(config.host, config.port)
    except ConfigError as error:
        raise common.as_usage(error, flags) from None
    with bound:
        _allow_connections()
        # The event loop works in short bursts; the step loop shouldn't wait for the usual 5 ms
        # when it wants the interpreter back.
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        _log.info("loading: %s", common.summary(engine_config))

        from aqua_jax.engine.async_engine import AsyncEngine
        from aqua_jax.engine.engine import Engine
        from aqua_jax.progress import counting_bar
        from aqua_jax.server.app import Server

        engine = AsyncEngine(
            engine_config,
            make_engine=lambda given: Engine(given, progress=counting_bar("compiling", "program")),
        )
        try:
            server = Server(
                engine, config, model=engine.model_name, max_model_len=engine.max_model_len,
                keys=keys,
            )
            started = f"aqua-jax serve: {server.model} at {http.url(bound)}"
            # So that /metrics tells its processor time from the step loop's.
            threading.current_thread().name = "aqua-http"
            asyncio.run(_serve(http.HttpServer(
                server, bound, on_start=lambda: print(started, flush=True)
            )))
        finally:
            engine.shutdown()
    return 0


async def _serve(server: HttpServer) -> None:
    def stop() -> None:
        _log.info("stopping: live requests may end (again: they may not)")
        server.stop()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop)
    await server.run_until_stopped()
