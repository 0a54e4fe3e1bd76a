"""Two engines that share memory: one lends what it doesn't need, and takes it back under load.

  .venv/bin/python scripts/demo_lend.py [--model=demo] [--output=build/demo_lend] [--plain]

Four processes, as they would be started from four shells: a coordinator; a *producer*, an engine
with `--lend=auto`; a *consumer*, an engine with KV memory for a tenth of its burst and `--peer` at
the coordinator; and this one, their user. First the producer is idle and lends. Then the consumer
gets its burst, and pages of whoever waits go to the producer's memory. In the middle of that the
producer gets requests of its own and takes back what it needs; when they are answered it lends
again. The exit status says whether every request was answered.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import http.client
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any

from demo import Burst, Display, memory, read_burst
from demo_board import RunView
from rich.console import Console

from aqua_jax import AquaError
from aqua_jax.cli.top import Watcher

_SHARE = 10  # the consumer's pool holds one part in so many of what its answers need
_START_S, _END_S = 120.0, 15.0  # for a process, to be ready, to end
_PHASE_S = 90.0  # longest that anything may take to happen
_LOOK_S = 0.1
_HOLD_S = 2.0  # the producer believes less need after so long


class Service:
    """A command of ours as a process, with what it says in a file."""

    def __init__(self, folder: pathlib.Path, name: str, *arguments: str) -> None:
        """Starts `aqua-jax` with `arguments`."""
        self.name, self.log = name, folder / f"{name}.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "aqua_jax.cli.main", *arguments],
                stdout=log, stderr=subprocess.STDOUT,
            )

    def said(self, words: str) -> str:
        """The first line with these words, once it is there.

        Raises:
          RuntimeError: it ended, or didn't say so in time.
        """
        end = time.monotonic() + _START_S
        while time.monotonic() < end:
            with self.log.open(errors="replace") as log:
                for line in log:
                    if words in line and line.endswith("\n"):
                        return line
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        last = self.log.read_text(errors="replace").strip().splitlines()[-3:]
        raise RuntimeError(f"the {self.name} did not start: {' / '.join(last)}")

    def stop(self) -> None:
        """Ends it, whatever it does."""
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(_END_S)
        self.process.kill()
        self.process.wait()


class EngineService:
    """`aqua-jax serve`, asked over HTTP."""

    def __init__(self, service: Service, title: str, requests: int) -> None:
        """
        Args:
          service: the process.
          title: for the board.
          requests: how many it will get.
        """
        self.service = service
        address = service.said(" at http://").rpartition(" ")[2].strip()
        self._address = urllib.parse.urlsplit(address)
        self._watcher = Watcher(address, None)
        self.view = RunView(title, ["waiting"] * requests)
        self.answered: list[str] = []  # of each request that has ended, what was wrong; "": nothing
        self._lock = threading.Lock()
        self._asked: float | None = None
        self._first: dict[tuple[str, int], float] = {}  # seconds to the first token, by request
        self.stats: dict[str, Any] = {}

    def ask(self, ids: list[int], max_tokens: int) -> None:
        """One request, to its end."""
        if self._asked is None:
            self._asked = time.monotonic()
        body = json.dumps({
            "prompt": ids, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True,
        })
        problem = ""
        try:
            connection = http.client.HTTPConnection(
                self._address.hostname or "", self._address.port, timeout=_PHASE_S
            )
            with contextlib.closing(connection):
                connection.request(
                    "POST", "/v1/completions", body, {"Content-Type": "application/json"}
                )
                response = connection.getresponse()
                found = json.loads(response.read())
            if response.status != 200 or found["usage"]["completion_tokens"] != max_tokens:
                problem = f"{response.status}: {str(found)[:200]}"
        except (OSError, ValueError, http.client.HTTPException, KeyError) as error:
            problem = f"{type(error).__name__}: {error}"
        with self._lock:
            self.answered.append(problem)

    def look(self) -> dict[str, Any]:
        """Brings the view up to date; the engine's `stats`."""
        with contextlib.suppress(OSError):
            state = self._watcher.look()
            self.stats = stats = state["stats"]
            view, columns = self.view, state["columns"]
            rows = [dict(zip(columns, row, strict=True)) for row in state["rows"]]
            total = len(view.states)
            if self._asked is not None and len(self.answered) < total:
                view.started, view.elapsed_s = True, time.monotonic() - self._asked
            ended = ["failed" if problem else "done" for problem in list(self.answered)]
            view.states = (ended + [_state(row) for row in rows])[:total]
            view.states += ["waiting"] * (total - len(view.states))
            view.memory, view.tokens = memory(stats), stats["output_tokens"]
            lending = stats.get("lending")
            if lending:
                view.memory.append(("lent", lending["lent"], lending["lendable"]))
            self._first |= {
                (row["request"], row["sample"]): row["ttft_s"] for row in rows
                if row["ttft_s"] is not None
            }
            view.ttft_s = list(self._first.values())
        return self.stats


def _state(row: dict[str, Any]) -> str:
    if row["state"] == "running":
        return "running"
    for tier in ("peer", "host"):
        if row.get(f"{tier}_pages"):
            return tier
    return "away" if row["output_tokens"] else "waiting"


@dataclasses.dataclass
class Seen:
    """What happened, in pages and seconds."""

    lent_idle: int = 0  # before anybody had asked for anything
    borrowed: int = 0  # most that the consumer had in the producer's memory
    taken_back: int = 0  # from when the producer got requests on
    taking_s: float = 0.0  # the longest that an extent was wanted back until all of it was
    least_lent: int = 0  # after that
    lent_again: int = 0
    problems: list[str] = dataclasses.field(default_factory=list)


class Demo:
    """The engines, and what is done to them."""

    def __init__(
        self, consumer: EngineService, producer: EngineService, display: Display
    ) -> None:
        self.consumer, self.producer, self.display = consumer, producer, display
        self.seen = Seen()
        self._over: set[EngineService] = set()  # shown for the last time

    def until(self, what: str, condition: Callable[[], bool]) -> bool:
        """Looks until it holds; false, and a problem more, when it takes too long."""
        end = time.monotonic() + _PHASE_S
        while time.monotonic() < end:
            for engine in (self.consumer, self.producer):
                engine.look()
                peer = next((used for name, used, _ in engine.view.memory if name == "lender"), 0)
                self.seen.borrowed = max(self.seen.borrowed, peer)
                dead = engine.service.process.poll()
                if dead is not None:
                    self.seen.problems.append(f"the {engine.service.name} ended with {dead}")
                    return False
                if engine.view.started and engine not in self._over:
                    self.display.show(engine.view)
                    if len(engine.answered) == len(engine.view.states):
                        self._over.add(engine)
            if self.consumer.stats and self.producer.stats:  # else they haven't answered yet
                self.seen.least_lent = min(self.seen.least_lent, self.lending["lent"])
                if condition():
                    return True
            time.sleep(_LOOK_S)
        self.seen.problems.append(f"not within {_PHASE_S:.0f} s: {what}")
        return False

    @property
    def lending(self) -> dict[str, Any]:
        """What the producer lends."""
        found: dict[str, Any] = self.producer.stats["lending"]
        return found

    def run(self, burst: Burst, own: Burst) -> Seen:
        """The whole story.

        Args:
          burst: of the consumer.
          own: the producer's own requests.
        """
        seen = self.seen
        with concurrent.futures.ThreadPoolExecutor(len(burst.prompts) + len(own.prompts)) as pool:
            try:
                self._story(pool, burst, own)
            finally:
                # Nobody waits for answers of a process that is gone.
                pool.shutdown(wait=not seen.problems, cancel_futures=True)
        for engine in (self.consumer, self.producer):
            engine.look()
            seen.problems += [
                f"a request of the {engine.service.name}: {one}" for one in engine.answered if one
            ]
        return seen

    def _story(
        self, pool: concurrent.futures.Executor, burst: Burst, own: Burst
    ) -> None:
        seen, consumer, producer = self.seen, self.consumer, self.producer
        if not self.until(
            "the idle producer lends", lambda: self.lending["lent"] == self.lending["lendable"]
        ):
            return
        seen.lent_idle = seen.least_lent = self.lending["lent"]
        producer.view.note = f"lends {seen.lent_idle} pages"
        self.display.say(f"The producer is idle and lends {seen.lent_idle} pages.")
        for ids in burst.prompts:
            pool.submit(consumer.ask, ids, burst.max_tokens)
        if not self.until(
            "the consumer uses the producer's memory",
            lambda: seen.borrowed > 0 and "peer" in consumer.view.states,
        ):
            return
        time.sleep(0.5)
        before = self.lending["pages_back"]
        producer.view.note = "requests of its own"
        self.display.say(f"The producer gets {len(own.prompts)} requests of its own.")
        for ids in own.prompts:
            pool.submit(producer.ask, ids, own.max_tokens)
        if not self.until(
            "the producer takes back what it needs",
            lambda: self.lending["pages_back"] > before and not self.lending["wanted_back"],
        ):
            return
        producer.view.note = f"took back {self.lending['pages_back'] - before} pages"
        if not self.until(
            "every request is answered",
            lambda: all(len(e.answered) == len(e.view.states) for e in (consumer, producer)),
        ):
            return
        seen.taken_back = self.lending["pages_back"] - before
        seen.taking_s = self.lending["longest_take_back_s"]
        producer.view.note = "idle again"
        self.until(
            "the producer lends again", lambda: self.lending["lent"] == self.lending["lendable"]
        )
        seen.lent_again = self.lending["lent"]
        producer.view.note = f"lends {seen.lent_again} pages again"


@contextlib.contextmanager
def engines(
    folder: pathlib.Path, common: list[str], burst: Burst, own: Burst, page_tokens: int
) -> Iterator[tuple[EngineService, EngineService]]:
    """Coordinator, consumer and producer as processes, for the length of a block.

    Raises:
      RuntimeError: one of them doesn't start.
    """
    socket = f"@aqua-demo-lend-{os.getpid()}"
    serve = ["serve", "--port=0", "--warmup=full", *common]
    started: list[Service] = []

    def start(name: str, *arguments: str) -> Service:
        started.append(Service(folder, name, *arguments))
        return started[-1]

    try:
        start("coordinator", "coordinator", f"--socket={socket}").said(socket)
        pool = -(-burst.pages // _SHARE) * page_tokens
        # As many pages as the burst needs may be lent, and one part in four beside them.
        kept = (burst.pages + burst.pages // 3) * page_tokens
        producer = start(
            "producer", *serve, f"--kv_cache_tokens={kept}", "--lend=auto",
            f"--coordinator={socket}", f"--lend_hold_s={_HOLD_S}",
        )
        producer.said(" at http://")
        # After the producer: what it lends is there from the start.
        consumer = start(
            "consumer", *serve, f"--kv_cache_tokens={pool}", f"--peer={socket}",
        )
        yield (
            EngineService(consumer, "consumer", len(burst.prompts)),
            EngineService(producer, "producer", len(own.prompts)),
        )
    finally:
        for service in reversed(started):
            service.stop()


def summary(seen: Seen, consumer: RunView, producer: RunView, display: Display) -> None:
    """What was seen, in words."""
    for view in (consumer, producer):
        display.say(
            f"{view.title}: {view.count('done')} of {len(view.states)} requests answered, "
            f"{view.tokens} tokens."
        )
    display.say(
        f"The producer lent {seen.lent_idle} pages; the consumer had up to {seen.borrowed} pages "
        "there. Under its own requests the producer took "
        f"{seen.taken_back} pages back, each extent within {seen.taking_s:.2f} s of its wish, and "
        f"lent {seen.least_lent}. Afterwards it lent {seen.lent_again} again."
    )
    for problem in seen.problems:
        display.say(f"[red]{problem}[/]")


def main() -> int:
    """Runs it and says what was seen; returns the exit status."""
    parser = argparse.ArgumentParser(description="An engine that lends memory to another one.")
    parser.add_argument("--model", default="demo", help="'demo', a directory or a .gguf file")
    parser.add_argument("--max_tokens", type=int, default=64, help="of the consumer's answers")
    parser.add_argument("--output", default="build/demo_lend", help="folder for logs")
    parser.add_argument("--plain", action="store_true", help="no live display")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    console = Console()
    if not console.is_terminal:
        console = Console(width=100)
    folder = pathlib.Path(arguments.output)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        burst = read_burst(arguments.model, arguments.max_tokens, 16)
        own = dataclasses.replace(
            burst, prompts=burst.prompts[::2], max_tokens=2 * arguments.max_tokens
        )
        console.print(
            f"[bold]Three processes start[/]: a coordinator, a producer and a consumer. The "
            f"consumer's burst of {len(burst.prompts)} needs up to {burst.pages} pages; it has "
            f"{-(-burst.pages // _SHARE)}.", highlight=False,
        )
        common = [f"--model={arguments.model}", "--dtype=bfloat16"]
        with engines(folder, common, burst, own, 16) as (consumer, producer):
            views = [consumer.view, producer.view]
            display = Display(console, views, arguments.plain or not console.is_terminal)
            with display.live():
                seen = Demo(consumer, producer, display).run(burst, own)
    except (AquaError, RuntimeError) as error:
        console.print(f"[red]{type(error).__name__}[/]: {error}")
        return 1
    summary(seen, consumer.view, producer.view, display)
    display.say(f"What the processes said is in {folder}/*.log")
    return 1 if seen.problems else 0


if __name__ == "__main__":
    sys.exit(main())
