"""`aqua-jax top`: what a server is doing, live in a terminal."""

from __future__ import annotations

import http.client
import importlib.util
import json
import sys
import time
import urllib.parse
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from aqua_jax.cli.board import Line, board, rates
from aqua_jax.cli.flagset import FlagSet, UsageError
from aqua_jax.cli.signals import stop_signals
from aqua_jax.errors import DependencyError

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions
    from rich.segment import Segment

_TIMEOUT_S = 10.0
_BUSY_S = 30.0  # that a first look may take: programs are compiled on first use, in a step
_PLAIN_WIDTH, _PLAIN_HEIGHT = 140, 60


def define(flags: FlagSet) -> None:
    """Defines the command's flags."""
    with flags.group("Server"):
        flags.string("url", "http://127.0.0.1:8000", "Where `aqua-jax serve` listens.", "URL")
        flags.string("api_key_file", None, "File whose first key is sent along.", "FILE")
    with flags.group("Display"):
        flags.number("interval_s", 0.5, "Time between two looks.", 0.05, 3600.0)
        flags.switch("once", False, "Print one look and end, as is done without a terminal.")


class BusyError(OSError):
    """The server has no time to look: its engine compiles, or has died."""


class Watcher:
    """Asks one server for its state over a kept connection.

    Args:
      url: of the server.
      key: sent as bearer token, or None.

    Raises:
      UsageError: no http:// URL.
    """

    def __init__(self, url: str, key: str | None) -> None:
        parts = urllib.parse.urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme != "http" or not parts.hostname:
            raise UsageError(f"flag --url={url}: allowed: http://HOST:PORT")
        self._host, self._port = parts.hostname, parts.port or 80
        self._path = parts.path.rstrip("/") + "/debug/state"
        self._headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self._connection: http.client.HTTPConnection | None = None
        self._version: int | None = None  # seen last
        self._rows: dict[tuple[Any, ...], list[Any]] = {}

    def look(self) -> dict[str, Any]:
        """The state now.

        Raises:
          OSError: no server, or one that doesn't answer so; the message says why.
        """
        try:
            return self._ask()
        except (http.client.HTTPException, ConnectionError):
            self.close()  # the kept connection may have ended; a fresh one says more
        try:
            return self._ask()
        except http.client.HTTPException as error:
            raise OSError(f"no HTTP server: {error!r}") from None
        finally:
            if self._connection is not None and self._connection.sock is None:
                self.close()

    def _ask(self) -> dict[str, Any]:
        if self._connection is None:
            self._connection = http.client.HTTPConnection(
                self._host, self._port, timeout=_TIMEOUT_S
            )
        since = "" if self._version is None else f"?since={self._version}"
        self._connection.request("GET", self._path + since, headers=self._headers)
        response = self._connection.getresponse()
        body = response.read()
        if response.status != 200:
            kind = BusyError if response.status == 503 else OSError
            raise kind(f"status {response.status}: {body[:200].decode('utf-8', 'replace')}")
        try:
            state: dict[str, Any] = json.loads(body)
        except ValueError:
            state = {}
        if not (isinstance(state, dict) and "rows" in state):
            raise OSError("this is no aqua-jax server")
        if state["since"] is None:
            self._rows.clear()
        for key in state["gone"]:
            self._rows.pop(tuple(key), None)
        for row in state["rows"]:
            self._rows[tuple(row[:2])] = row
        self._version = state["version"]
        return {**state, "rows": list(self._rows.values())}

    def close(self) -> None:
        """Ends the connection."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class _Screen:
    """Lines for rich to draw; styles are looked up once."""

    def __init__(self) -> None:
        from rich.style import Style

        self._parse = Style.parse
        self._styles: dict[str, Any] = {}
        self.lines: list[Line] = []

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        from rich.segment import Segment

        for line in self.lines:
            for text, style in line:
                if style not in self._styles:
                    self._styles[style] = self._parse(style)
                yield Segment(text, self._styles[style])
            yield Segment.line()


def _first_key(path: str | None) -> str | None:
    if path is None:
        return None
    try:
        with open(path, encoding="utf-8") as file:
            lines = [line.strip() for line in file]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"flag --api_key_file={path}: {error}") from None
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise UsageError(f"flag --api_key_file={path}: allowed: a file with at least one key")
    return keys[0]


def _first_look(watcher: Watcher) -> dict[str, Any]:
    """The state, waited for while the server is busy."""
    end = time.monotonic() + _BUSY_S
    while True:
        try:
            return watcher.look()
        except BusyError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


def run(flags: FlagSet) -> int:
    """Shows a server until interrupted.

    Returns:
      0; 2: the server can't be reached.
    """
    watcher = Watcher(flags.url, _first_key(flags.api_key_file))
    try:
        state = _first_look(watcher)
        if flags.once or not sys.stdout.isatty():
            time.sleep(min(flags.interval_s, 1.0))
            later = watcher.look()
            for line in board(later, rates(state, later), _PLAIN_WIDTH, _PLAIN_HEIGHT):
                print("".join(text for text, _ in line).rstrip())
            return 0
        if importlib.util.find_spec("rich") is None:
            raise DependencyError("`top` needs rich: pip install 'aqua-jax[top]'")
        _show(watcher, state, flags.interval_s)
    except OSError as error:
        why = str(error)
        if error.strerror:  # the system's, not an answer
            why = f"{error.strerror}; is `aqua-jax serve` running there?"
        print(f"aqua-jax top: {flags.url}: {why}", file=sys.stderr)
        return 2
    finally:
        watcher.close()
    return 0


def _show(watcher: Watcher, state: dict[str, Any], interval_s: float) -> None:
    """Redraws until a signal comes; a server that goes away is said so and asked again."""
    from rich.console import Console
    from rich.live import Live

    console, screen = Console(), _Screen()
    before, problem = None, ""
    looked = time.monotonic()
    with (
        stop_signals() as stop,
        Live(screen, console=console, screen=True, auto_refresh=False) as live,
    ):
        while not stop():
            screen.lines = board(state, rates(before, state), console.width, console.height)
            if problem:
                screen.lines[0] = [(f"lost the server: {problem}; asking again", "bold red")]
            live.refresh()
            while not stop() and (left := looked + interval_s - time.monotonic()) > 0:
                time.sleep(min(left, 0.1))
            looked = time.monotonic()  # before the answer, which may take a step of the engine
            try:
                state, before, problem = watcher.look(), state, ""
            except OSError as error:
                problem = str(error)
