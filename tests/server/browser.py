"""Chromium without a window, driven over its debugging pipe (Chrome DevTools Protocol)."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import pathlib
import shutil
import subprocess
import time
from collections.abc import Iterator
from typing import Any

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)


class Page:
    """One tab.

    Args:
      process: the browser's.
      asking: descriptor that commands are written to.
      answers: descriptor that answers and events come from.
    """

    def __init__(self, process: subprocess.Popen[bytes], asking: int, answers: int) -> None:
        self.process = process
        self._asking, self._answers, self._rest = asking, answers, b""
        self._numbers = itertools.count(1)
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []

    def command(self, method: str, **parameters: Any) -> dict[str, Any]:
        """What the browser answers to a command."""
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._asking, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._rest:
                data = os.read(self._answers, 1 << 20)
                assert data, "the browser has ended"
                self._rest += data
            text, _, self._rest = self._rest.partition(b"\0")
            answer = json.loads(text)
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def open(self, url: str, *domains: str) -> None:
        """Shows `url` in a new tab. Events come of `domains`, or of all that tell of errors and
        requests."""
        target = self.command("Target.createTarget", url="about:blank")["targetId"]
        attached = self.command("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in domains or ("Runtime", "Log", "Network", "Page"):
            self.command(f"{domain}.enable")
        self.command("Page.navigate", url=url)
        self.wait("document.readyState !== 'loading' && location.href !== 'about:blank'")

    def evaluate(self, expression: str) -> Any:
        """Value of a JavaScript expression in the page."""
        found = self.command("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, expression: str, seconds: float = 30.0) -> Any:
        """The expression's value once it is true. The time is that in which this process could
        look, so that being stopped for a while does no harm."""
        for _ in range(round(seconds / 0.1)):
            if value := self.evaluate(expression):
                return value
            time.sleep(0.1)
        raise AssertionError(f"{expression} stays {value!r}")

    def screenshot(self, path: pathlib.Path) -> None:
        """Saves a picture of the tab as PNG."""
        path.write_bytes(base64.b64decode(self.command("Page.captureScreenshot")["data"]))


@contextlib.contextmanager
def browser(profile: pathlib.Path) -> Iterator[Page]:
    """A browser of its own, with its files in `profile`."""
    assert PROGRAM is not None
    inner_in, asking = os.pipe()
    answers, inner_out = os.pipe()
    process = subprocess.Popen(
        # The protocol's pipes are descriptors 3 and 4.
        ["bash", "-c", f'exec "$0" "$@" 3<&{inner_in} 4>&{inner_out}', PROGRAM, "--headless=new",
         "--no-sandbox", "--disable-gpu", "--window-size=1200,1100", "--remote-debugging-pipe",
         f"--user-data-dir={profile}"],
        pass_fds=(inner_in, inner_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )
    os.close(inner_in)
    os.close(inner_out)
    try:
        yield Page(process, asking, answers)
    finally:
        process.terminate()
        process.wait(30)
        os.close(asking)
        os.close(answers)
