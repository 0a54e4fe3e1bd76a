"""What lending costs the lender: a producer's own tokens/s while another engine pages.

    python scripts/lending_cost.py --pairs=10

A producer engine answers requests of its own while a consumer engine, with memory for a tenth of
its load, is busy without end. In turns the consumer pages to its own host memory, and to what the
producer lends (through a coordinator, with the default bandwidth cap). Printed is the ratio of the
producer's tokens/s, as the median over pairs with its range; on few cores the consumer's work is in
both. Both consumers are there all the time; only one has work.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import pathlib
import random
import statistics
import sys
import tempfile
import threading
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from demo_lend import EngineService, Service  # noqa: E402

_KINDS = ("host", "peer")
_WAIT_S = 120.0


class Busy:
    """Keeps a consumer busy with `requests` requests at a time."""

    def __init__(self, engine: EngineService, requests: int, prompt: int, tokens: int) -> None:
        self._engine, self._prompt, self._tokens = engine, prompt, tokens
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._work, args=(number,)) for number in range(requests)
        ]

    def _work(self, number: int) -> None:
        rng = random.Random(number)
        while not self._stop.is_set():
            ids = [rng.randrange(5, 120) for _ in range(self._prompt)]
            self._engine.ask(ids, self._tokens)

    def __enter__(self) -> Busy:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def in_use(engine: EngineService, tier: str) -> int:
    """Pages that an engine has in a store."""
    stores = (engine.look().get("paging") or {}).get("stores", ())
    return sum(store["in_use"] for store in stores if store["name"] == tier)


def own_rate(producer: EngineService, requests: int, prompt: int, tokens: int, run: int) -> float:
    """Tokens/s of the producer's own requests, all at once."""
    rng = random.Random(run)
    threads = [
        threading.Thread(
            target=producer.ask, args=([rng.randrange(5, 120) for _ in range(prompt)], tokens)
        )
        for _ in range(requests)
    ]
    started = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return requests * tokens / (time.monotonic() - started)


def until(condition: Any, what: str) -> None:
    """Waits.

    Raises:
      SystemExit: for too long.
    """
    end = time.monotonic() + _WAIT_S
    while not condition():
        if time.monotonic() > end:
            raise SystemExit(f"not within {_WAIT_S:.0f} s: {what}")
        time.sleep(0.05)


def moved(engine: EngineService) -> int:
    """Bytes that an engine has paged."""
    paging = engine.look()["paging"]
    return int(paging["bytes_out"] + paging["bytes_in"])


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--load_format", default="auto")
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--requests", type=int, default=8, help="the producer's own, at once")
    parser.add_argument("--tokens", type=int, default=96, help="of each of their answers")
    parser.add_argument("--busy", type=int, default=32, help="the consumer's requests at a time")
    parser.add_argument("--lend_bandwidth", default=None, help="the cap; default: the engine's")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    prompt, consumed, page = 64, 128, 16
    burst = args.busy * (prompt + consumed)
    pool = -(-burst // 10 // page) * page
    own = args.requests * (prompt + args.tokens)
    socket = f"@aqua-lending-cost-{random.randrange(1 << 32)}"
    serve = [
        "serve", "--port=0", "--warmup=full", f"--model={args.model}", "--dtype=bfloat16",
        f"--load_format={args.load_format}",
    ]
    cap = [] if args.lend_bandwidth is None else [f"--lend_bandwidth={args.lend_bandwidth}"]
    with contextlib.ExitStack() as stack:
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))

        def start(name: str, *arguments: str) -> Service:
            service = Service(folder, name, *arguments)
            stack.callback(service.stop)
            return service

        start("coordinator", "coordinator", f"--socket={socket}").said(socket)
        # All that the consumer could page is lent, and the producer's own requests fit beside it:
        # it is the cost of lending that is measured, not that of taking back.
        kept = max(2 * burst, 16 * own)
        producer = EngineService(start(
            "producer", *serve, f"--kv_cache_tokens={kept}", "--lend=auto", *cap,
            f"--coordinator={socket}", "--lend_hold_s=1", "--lend_reserve=0.05",
        ), "producer", 1)
        consumers = {
            "host": EngineService(
                start("host", *serve, f"--kv_cache_tokens={pool}"), "host", 1
            ),
            "peer": EngineService(start(
                "peer", *serve, f"--kv_cache_tokens={pool}", f"--peer={socket}",
                "--host_kv_memory=0",
            ), "peer", 1),
        }
        until(lambda: producer.look()["lending"]["lent"] > 0, "the producer lends")
        rates: dict[str, list[float]] = {kind: [] for kind in _KINDS}
        paged: dict[str, list[float]] = {kind: [] for kind in _KINDS}
        for run in range(-1, args.pairs):
            for kind in _KINDS if run % 2 else _KINDS[::-1]:
                consumer = consumers[kind]
                with Busy(consumer, args.busy, prompt, consumed):
                    until(lambda: in_use(consumer, kind) > 0, f"pages in the tier {kind}")  # noqa: B023
                    before, began = moved(consumer), time.monotonic()
                    rate = own_rate(producer, args.requests, prompt, args.tokens, run)
                    bandwidth = (moved(consumer) - before) / (time.monotonic() - began)
                if run >= 0:  # the first pair warms up
                    print(f"pair {run + 1}, {kind}: {rate:.1f} tokens/s", file=sys.stderr)
                    rates[kind].append(rate)
                    paged[kind].append(bandwidth)
        problems = [one for e in (producer, *consumers.values()) for one in e.answered if one]
        lending = producer.look()["lending"]
    ratios = [peer / host for host, peer in zip(rates["host"], rates["peer"], strict=True)]
    if args.json:
        print(json.dumps({
            "rates": rates, "paged_bytes_s": paged, "ratios": ratios, "lending": lending,
            "problems": problems,
        }))
    else:
        for kind in _KINDS:
            print(
                f"{kind}: {statistics.median(rates[kind]):.1f} tokens/s of the producer's own, "
                f"the consumer paged {statistics.median(paged[kind]) / 2**20:.1f} MiB/s"
            )
        print(
            f"producer's tokens/s, lending to not lending: median {statistics.median(ratios):.3f} "
            f"({min(ratios):.3f} to {max(ratios):.3f}) over {len(ratios)} pairs; "
            f"{lending['pages_back']} pages came back meanwhile"
        )
        for problem in problems:
            print(f"a request failed: {problem}")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
