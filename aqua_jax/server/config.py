"""What a server is built from; `aqua-jax serve` flags map one to one onto it."""

from __future__ import annotations

import dataclasses

from aqua_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class ServerConfig:
    """Limits and names of the HTTP side.

    Raises:
      ConfigError: a field is out of range.
    """

    host: str = "127.0.0.1"
    port: int = 8000  # 0: any free one
    served_model_name: str | None = None  # None: the model's own
    max_live_requests: int = 1024  # answered or waiting; more are told to come back (429)
    # Of one body. Parsing holds the interpreter, and with it the step loop: 10 ms for a MiB.
    max_body_bytes: int = 4 * 1024 * 1024
    read_timeout_s: float = 30.0  # for the head and the body of a request to arrive
    drain_timeout_s: float = 30.0  # on SIGTERM, for live requests to end
    api_key_file: str | None = None  # None: everybody is let in

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError("port", self.port, "an integer from 0 to 65535")
        for name in ("max_live_requests", "max_body_bytes"):
            if getattr(self, name) < 1:
                raise ConfigError(name, getattr(self, name), "an integer >= 1")
        if not self.read_timeout_s > 0:
            raise ConfigError("read_timeout_s", self.read_timeout_s, "seconds > 0")
        if not self.drain_timeout_s >= 0:
            raise ConfigError("drain_timeout_s", self.drain_timeout_s, "seconds >= 0")
