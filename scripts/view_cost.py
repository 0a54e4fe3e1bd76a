"""What it costs to watch: `aqua-jax top` and the page at / over a server with many requests.

    python scripts/view_cost.py --requests=2000 --seconds=20

A tiny model answers --requests requests at a snail's pace (one step every --step_ms), so that they
all stay alive while somebody looks. Printed is processor time as a share of one core: of the
watching processes, and of the server on their behalf (its HTTP thread, less what that takes when
nobody watches, and the looks that the engine's thread takes). The verdict is about the sum: at two
redraws a second it is at most --bar. What the browser takes for a blank page is printed and
subtracted. The page paints its picture at every redraw and its text at every fourth one. Status 1
if a verdict is bad, or if there are fewer than --least redraws a second.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import pathlib
import pty
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def tree_seconds(root: int) -> float:
    """Processor time of a process and all below it."""
    from aqua_jax.bench.memory import process_tree

    ticks = 0
    for pid in process_tree(root):
        with contextlib.suppress(OSError):  # it has ended
            fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def terminal_program(arguments: list[str]):
    """Runs a program in a terminal of 160 x 50 whose output is read and dropped."""
    terminal, inner = pty.openpty()
    process = subprocess.Popen(
        arguments, stdin=inner, stdout=inner, stderr=inner,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "160", "LINES": "50"},
    )
    os.close(inner)
    drawn = [0, 0]  # bytes, redraws

    def drain() -> None:
        with contextlib.suppress(OSError):
            while data := os.read(terminal, 1 << 16):
                drawn[0] += len(data)
                drawn[1] += data.count(b"\x1b[H")  # each begins at the top left corner

    thread = threading.Thread(target=drain)
    thread.start()
    try:
        yield process.pid, drawn
    finally:
        process.terminate()
        process.wait(20)
        thread.join()
        os.close(terminal)


class Meter:
    """Processor time of the functions it has been put around."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, holder: object, name: str) -> None:
        """Counts what `holder.name` takes from now on."""
        function = getattr(holder, name)

        def timed(*args):
            started = time.thread_time()
            try:
                return function(*args)
            finally:
                self.seconds += time.thread_time() - started

        setattr(holder, name, timed)


def verdict(name: str, own: float, server: float, redraws: float, bar: float, least: float) -> bool:
    """Prints whether a watcher is cheap enough at the rate it should redraw; whether it is."""
    share = own + server
    good = share <= bar and redraws >= least
    word = "ok" if good else "OVER" if share > bar else f"TOO FEW, at least {least:g}/s"
    each = f"{own / redraws * 1e3:.1f} + {server / redraws * 1e3:.1f} ms" if redraws else "none"
    print(f"{name}: {own:.2%} and in the server {server:.2%}, {share:.2%} of a core "
          f"at {redraws:.2f} redraws/s ({each} each), bar {bar:.0%}: {word}")
    return good


def main() -> int:
    """Runs and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--step_ms", type=float, default=50.0)
    parser.add_argument("--policy", default="fair")
    parser.add_argument("--bar", type=float, default=0.02)
    parser.add_argument("--least", type=float, default=1.9)
    args = parser.parse_args()

    from aqua_jax.config import SamplingParams
    from aqua_jax.engine.engine import Engine
    from aqua_jax.server.metrics import thread_seconds
    from tests.server.browser import PROGRAM, browser
    from tests.server.serving import AsyncEngine, serving, text_engine_config

    class Slow(Engine):
        """Sleeps before each step."""

        def step(self):
            time.sleep(args.step_ms / 1000)
            return super().step()

    with tempfile.TemporaryDirectory() as folder:
        config = text_engine_config(
            pathlib.Path(folder), policy=args.policy, kv_cache_tokens=65536, max_num_seqs=64,
            max_step_tokens=1024,
        )
        engine = AsyncEngine(config, make_engine=Slow)
        with serving(config, engine=engine, max_live_requests=10**6) as served:
            loop = asyncio.new_event_loop()
            params = SamplingParams(max_tokens=1500, ignore_eos=True)

            async def submit() -> list:
                return [
                    await engine.submit([5 + number % 100] * 100, params,
                                        user=f"user{number % 50}", final_only=True)
                    for number in range(args.requests)
                ]

            streams = loop.run_until_complete(submit())
            looks = Meter()
            looks.around(served.server._feed._snapshot, "_function")
            time.sleep(3)

            def measure(
                name: str, pid: int | None, drawn: Callable[[], int] = lambda: 0
            ) -> tuple[float, float, float]:
                """Shares of a core that watching takes, there and in the server, and redraws a
                second."""
                time.sleep(4)  # it starts
                before, began, frames = thread_seconds(), time.monotonic(), drawn()
                own, looked = tree_seconds(pid) if pid else 0.0, looks.seconds
                time.sleep(args.seconds)
                span = time.monotonic() - began
                redraws = (drawn() - frames) / span
                after = thread_seconds()
                watching = (tree_seconds(pid) - own) / span if pid else 0.0
                engine, http = (
                    (after[thread] - before.get(thread, 0.0)) / span
                    for thread in ("aqua-engine", "aqua-http")
                )
                looking = (looks.seconds - looked) / span
                print(f"{name:10} watching {watching:.2%} of a core; server: HTTP {http:.2%}, "
                      f"engine {engine:.2%}, of which looks {looking:.2%}", flush=True)
                return watching, http + looking, redraws

            found: dict[str, tuple[float, float, float]] = {}
            print(f"{engine.stats()['live_requests']} requests")
            _, idle, _ = measure("nobody", None)
            top = [sys.executable, "-m", "aqua_jax.cli.main", "top", f"--url={served.url}"]
            with terminal_program(top) as (pid, drawn):
                share, server, redraws = measure("top", pid, lambda: drawn[1])
                found["top"] = share, max(0.0, server - idle), redraws
                assert drawn[0] > 1000 * args.seconds, "nothing was drawn"
            if PROGRAM is None:
                print("no Chromium here, so the page isn't looked at")
            else:
                with (
                    tempfile.TemporaryDirectory() as profile,
                    browser(pathlib.Path(profile)) as page,
                ):
                    page.open("about:blank#", "Page")
                    blank, _, _ = measure("blank page", page.process.pid)
                    page.command("Page.navigate", url=served.url + "/")
                    page.wait("typeof drawn !== 'undefined' && drawn > 2")
                    share, server, redraws = measure(
                        "page", page.process.pid, lambda: page.evaluate("drawn")
                    )
                    name = f"page, less a blank one's {blank:.2%}"
                    found[name] = max(0.0, share - blank), max(0.0, server - idle), redraws
                    print(f"{'':10} {page.evaluate('alive.size')} requests shown")
            measure("nobody", None)
            for stream in streams:
                stream.close()
        engine.shutdown()
    good = [verdict(name, *figures, args.bar, args.least) for name, figures in found.items()]
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
