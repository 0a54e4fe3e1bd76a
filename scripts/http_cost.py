"""What HTTP costs: the same work through the library and through the server, in turns.

    python scripts/http_cost.py --pairs=10

One engine answers --requests requests at once, of --prompt tokens in and --tokens out: handed over
directly (`AsyncEngine.generate`), and streamed over HTTP to a client process that only takes times.
Printed are medians over pairs of the ratios of throughput and of TTFT, and what the threads of both
spent: processor seconds don't depend on what else the machine does. The client shares the machine,
so wall-clock ratios on few cores include its work. Then the verdicts: tokens/s over HTTP are at
least 0.97 of the library's by the clock (median of pairs) or by processor seconds, and the TTFT's
99th percentile is at most 1.05 of its. Status 1 if one is bad.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import pathlib
import statistics
import subprocess
import sys
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

CLIENT = r"""
import json, selectors, socket, sys, time
for line in sys.stdin:
    work = json.loads(line)
    selector, started, first, ended = selectors.DefaultSelector(), {}, [], []
    sockets = [socket.create_connection(("127.0.0.1", work["port"])) for _ in work["bodies"]]
    for number, (one, body) in enumerate(zip(sockets, work["bodies"])):
        data = body.encode()
        one.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json"
                    b"\r\nContent-Length: %d\r\n\r\n" % len(data) + data)
        started[one] = time.monotonic()
        selector.register(one, selectors.EVENT_READ)
    seen = set()
    while selector.get_map():
        for key, _ in selector.select():
            data = key.fileobj.recv(65536)
            if key.fileobj not in seen and b"data:" in data:
                seen.add(key.fileobj)
                first.append(time.monotonic() - started[key.fileobj])
            if not data or data.endswith(b"0\r\n\r\n"):
                ended.append(time.monotonic())
                selector.unregister(key.fileobj)
                key.fileobj.close()
    print(json.dumps({"ttft": first, "wall": max(ended) - min(started.values()),
                      "cpu": time.process_time()}), flush=True)
"""


TOKENS_BAR, TTFT_BAR = 0.97, 1.05


def p99(values: list[float]) -> float:
    """99th percentile."""
    return sorted(values)[min(len(values) - 1, int(0.99 * len(values)))]


def verdict(what: str, value: float, good: bool, bar: str) -> bool:
    """Prints and returns `good`."""
    print(f"{what}: {value:.3f}, bar {bar}: {'ok' if good else 'MISSED'}")
    return good


def main() -> int:
    """Runs and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(ROOT / "scripts/models/llama-110m"))
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--switch_interval", type=float, default=None)
    args = parser.parse_args()

    from aqua_jax.cli.serve import SWITCH_INTERVAL_S
    from aqua_jax.config import EngineConfig, SamplingParams
    from aqua_jax.engine.async_engine import AsyncEngine
    from aqua_jax.server import http
    from aqua_jax.server.app import Server
    from aqua_jax.server.config import ServerConfig
    from aqua_jax.server.keys import Keys
    from aqua_jax.server.metrics import thread_seconds

    sys.setswitchinterval(args.switch_interval or SWITCH_INTERVAL_S)
    engine = AsyncEngine(EngineConfig(
        model=args.model, load_format="dummy", dtype=args.dtype, max_num_seqs=args.requests,
        prefix_caching=False, warmup="full",
        kv_cache_tokens=args.requests * (args.prompt + args.tokens + 32),
    ))
    bound = http.bind("127.0.0.1", 0)
    server = Server(engine, ServerConfig(), model="m", max_model_len=engine.max_model_len,
                    keys=Keys([]))
    serving = http.HttpServer(server, bound)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(
        target=lambda: loop.run_until_complete(serving.run_until_stopped()), name="aqua-http"
    )
    thread.start()
    client = subprocess.Popen(
        [sys.executable, "-c", CLIENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    params = SamplingParams(temperature=0.0, max_tokens=args.tokens, ignore_eos=True)

    def prompt(run: int, index: int) -> list[int]:
        return [(7 * run + 13 * index + 3 * place) % 30000 + 5 for place in range(args.prompt)]

    async def library(run: int) -> dict:
        ttft, start = [], time.monotonic()

        async def one(index: int) -> None:
            began, first = time.monotonic(), None
            async for _ in engine.generate(prompt(run, index), params):
                first = first or time.monotonic()
            assert first is not None
            ttft.append(first - began)

        await asyncio.gather(*(one(index) for index in range(args.requests)))
        return {"ttft": ttft, "wall": time.monotonic() - start}

    def over_http(run: int) -> dict:
        bodies = [
            json.dumps({"prompt": prompt(run, index), "max_tokens": args.tokens,
                        "temperature": 0, "ignore_eos": True, "stream": True})
            for index in range(args.requests)
        ]
        assert client.stdin is not None and client.stdout is not None
        client.stdin.write(json.dumps({"port": bound.getsockname()[1], "bodies": bodies}) + "\n")
        client.stdin.flush()
        return json.loads(client.stdout.readline())

    def spent() -> dict[str, float]:
        found = dict(thread_seconds())
        stats = engine.stats()
        return {
            **found, "host_s": stats["host_s"], "steps": stats["steps"],
            "whole process": time.process_time(),
        }

    ratios: dict[str, list[float]] = {"tokens/s": [], "TTFT p50": [], "TTFT p99": []}
    costs: dict[str, list[dict[str, float]]] = {"library": [], "http": []}
    client_cpu = 0.0
    for run in range(-1, args.pairs):
        order = ("library", "http") if run % 2 else ("http", "library")
        results = {}
        for kind in order:
            before = spent()
            results[kind] = asyncio.run(library(run)) if kind == "library" else over_http(run)
            after = spent()
            if run >= 0:
                costs[kind].append({key: after[key] - before.get(key, 0.0) for key in after})
        if run < 0:
            client_cpu = results["http"]["cpu"]
            continue
        ratios["tokens/s"].append(results["library"]["wall"] / results["http"]["wall"])
        for name, pick in (("TTFT p50", statistics.median), ("TTFT p99", p99)):
            ratios[name].append(pick(results["http"]["ttft"]) / pick(results["library"]["ttft"]))
        print(f"pair {run}: " + ", ".join(
            f"{kind} {results[kind]['wall']:.2f} s TTFT p99 {p99(results[kind]['ttft']):.3f} s"
            for kind in ("library", "http")
        ), flush=True)
    print("medians of http / library (quartiles):")
    medians = {}
    for name, values in ratios.items():
        low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
        print(f"  {name:9} {middle:.3f} ({low:.3f} to {high:.3f})")
        medians[name] = middle
    print("processor seconds a run, median, and a step's:")
    for kind, runs in costs.items():
        middle = {key: statistics.median(one.get(key, 0.0) for one in runs) for key in runs[-1]}
        steps = middle.pop("steps")
        shown = {key: value for key, value in middle.items() if value >= 0.005}
        print(f"  {kind}: {steps:.0f} steps; " + ", ".join(
            f"{key} {value:.3f} ({value / steps * 1e3:.2f} ms)"
            for key, value in sorted(shown.items())
        ))
    client_cpu = (results["http"]["cpu"] - client_cpu) / args.pairs
    print(f"  client process: {client_cpu:.3f} a run")
    client.stdin.close()  # type: ignore[union-attr]
    client.wait()
    loop.call_soon_threadsafe(serving.stop)
    thread.join()
    engine.shutdown()
    pairs = zip(costs["library"], costs["http"], strict=True)
    seconds = statistics.median(
        one["whole process"] / other["whole process"] for one, other in pairs
    )
    enough = f"at least {TOKENS_BAR}"
    by_clock = verdict("tokens/s by the clock", medians["tokens/s"],
                       medians["tokens/s"] >= TOKENS_BAR, enough)
    by_work = verdict("tokens per processor second of the server", seconds,
                      seconds >= TOKENS_BAR, enough)
    prompt_first = verdict("TTFT p99", medians["TTFT p99"], medians["TTFT p99"] <= TTFT_BAR,
                           f"at most {TTFT_BAR}")
    return 0 if (by_clock or by_work) and prompt_first else 1


if __name__ == "__main__":
    sys.exit(main())
