"""How soon a lender has its memory back while the borrower serves at full load.

Starts a coordinator and an engine that pages into what this process lends through it. The engine
never runs out of requests. Again and again the lender wants a random amount back; printed is how
long that took, beside what it may take: 100 ms, the engine's longest step meanwhile, and the copy.
Afterwards the engine is stopped in the middle of everything, and `--forced_reclaim=kill` has to get
the memory back within term and drain limit.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from aqua_jax.errors import CoordinatorError
from aqua_jax.memory.arena import Arena
from aqua_jax.memory.client import Client
from aqua_jax.memory.link import status
from aqua_jax.memory.loan import Lending

_MODEL = pathlib.Path(__file__).parent / "models" / "llama-110m"
_ALLOWED_S = 0.1
_TERM_S, _DRAIN_S = 2.0, 2.0
_MIB = 1 << 20


def serve(arguments: argparse.Namespace) -> None:
    """The engine: requests without end; answers each line on standard input with figures."""
    from aqua_jax.config import EngineConfig, SamplingParams
    from aqua_jax.engine.engine import Engine

    prompt, output = arguments.prompt, arguments.output
    engine = Engine(EngineConfig(
        model=str(arguments.model), load_format="dummy", peer=arguments.socket,
        kv_cache_tokens=arguments.resident * (prompt + output), max_num_seqs=arguments.resident,
        max_model_len=prompt + output, host_kv_memory=arguments.host_mib * _MIB, slice_steps=16,
    ))
    generator, sent, longest = random.Random(0), 0, 0.0
    words = engine.model_config.vocab_size
    print("ready", flush=True)
    while True:
        while engine.num_live_requests < arguments.requests:
            ids = [generator.randrange(3, words) for _ in range(prompt)]
            params = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True)
            engine.add_request(str(sent), ids, params)
            sent += 1
        started = time.perf_counter()
        outputs = engine.step()
        longest = max(longest, time.perf_counter() - started)
        assert all(one.error is None for one in outputs), outputs
        if not select.select([sys.stdin], [], [], 0)[0]:
            continue
        if not sys.stdin.readline():
            break
        stats = engine.stats()
        print(json.dumps({"longest_s": longest, **stats}), flush=True)
        longest = 0.0
    engine.close()


class _Engine:
    """The engine's process."""

    def __init__(self, command: list[str]) -> None:
        self.child = subprocess.Popen(
            command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def hear(self) -> str:
        """Its next line."""
        assert self.child.stdout is not None
        line = self.child.stdout.readline().strip()
        if not line:
            raise RuntimeError("the engine has ended")
        return line

    def figures(self) -> dict[str, Any]:
        """Its statistics, and its longest step since the last time."""
        assert self.child.stdin is not None
        self.child.stdin.write("\n")
        self.child.stdin.flush()
        return json.loads(self.hear())


def _until(condition: Callable[[], object], seconds: float, what: str) -> float:
    start = time.perf_counter()
    while not condition():
        if time.perf_counter() - start > seconds:
            raise TimeoutError(f"not within {seconds} s: {what}")
        time.sleep(0.0002)
    return time.perf_counter() - start


def _connect(path: str) -> Client:
    end = time.monotonic() + 30
    while True:
        try:
            return Client(path, name="lender", timeout_s=1.0)
        except CoordinatorError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)


def _held(path: str) -> int:
    return sum(row.held for row in status(path).arenas)


def _lend_all(lending: Lending) -> None:
    lending.reclaim(lending.arena.size)
    for start, end in lending.take_returned():
        lending.lend(start, end - start)


def measure(arguments: argparse.Namespace, lending: Lending, engine: _Engine) -> None:
    """Reclaims random amounts; prints how long each took and, at the end, all of them."""
    path, whole, generator = arguments.socket, lending.arena.size, random.Random(arguments.seed)
    rows: list[tuple[float, float, int, int]] = []  # seconds, allowed, pages asked, beyond
    peer = engine.figures()["paging"]["stores"][0]
    page = peer["slot_bytes"]
    print(f"pages of {page >> 10} KiB, {whole // page} lent; {'asked':>6} {'in use':>7} "
          f"{'took':>9} {'longest step':>13} {'copy':>9} {'beyond':>7}")
    for number in range(arguments.reclaims):
        _all_borrowed(path, lending)
        time.sleep(arguments.pause)
        engine.figures()  # the longest step starts anew
        before, held = engine.figures()["paging"], _held(path)
        limit = generator.randrange(whole // page) * page
        asked_at = time.perf_counter()
        lending.reclaim(limit, _DRAIN_S)
        _until(lambda: lending.lent <= limit, 60, "it is back")  # noqa: B023
        took = time.perf_counter() - asked_at
        left = _held(path)
        figures = engine.figures()
        after = figures["paging"]
        copy = after["shift_s"] - before["shift_s"]
        if held <= limit:
            continue  # nobody was asked
        asked, beyond = (held - limit) / page, (limit - left) / page
        in_use = before["stores"][0]["in_use"]
        rows.append((took, _ALLOWED_S + figures["longest_s"] + copy, int(asked), int(beyond)))
        if arguments.verbose:
            print(f"{number:>28} {asked:6.0f} {in_use:7d} {took * 1e3:6.1f} ms "
                  f"{figures['longest_s'] * 1e3:10.1f} ms {copy * 1e3:6.1f} ms {beyond:7.2f}")
    took_s, allowed = sorted(row[0] for row in rows), sorted(row[1] for row in rows)
    last = min(len(rows) - 1, int(0.99 * len(rows)))
    late = sum(row[0] > row[1] for row in rows)
    print(
        f"{len(rows)} reclaims: p50 {took_s[len(rows) // 2] * 1e3:.1f} ms, p99 "
        f"{took_s[last] * 1e3:.1f} ms (allowed: p50 {allowed[len(rows) // 2] * 1e3:.1f} ms, p99 "
        f"{allowed[last] * 1e3:.1f} ms); {late} took longer than allowed; pages given beyond what "
        f"was asked: at most {max(row[3] for row in rows)}"
    )
    paging = engine.figures()
    print(
        f"meanwhile {paging['output_tokens']} tokens, {paging['paging']['relocated']} pages "
        f"moved down, {paging['paging']['climbed']} up, {paging['paging']['dropped']} dropped, "
        f"{paging['recomputed_tokens']} tokens computed again, moves failed: "
        f"{paging['paging']['moves_failed']}"
    )


def _all_borrowed(path: str, lending: Lending) -> None:
    _lend_all(lending)
    # Less than a mebibyte isn't borrowed for its own sake.
    _until(lambda: _held(path) > lending.arena.size - 2 * _MIB, 30, "everything is borrowed")


def force(arguments: argparse.Namespace, lending: Lending, engine: _Engine) -> None:
    """Stops the engine's process and wants everything back."""
    _all_borrowed(arguments.socket, lending)
    engine.child.send_signal(signal.SIGSTOP)
    held = _held(arguments.socket)
    lending.reclaim(0, _DRAIN_S)
    took = _until(lambda: lending.lent == 0, 60, f"{held} bytes are back")
    print(f"forced reclaim of a stopped engine: {took:.2f} s (allowed: term {_TERM_S:.0f} s + "
          f"drain limit {_DRAIN_S:.0f} s); exit status {engine.child.wait(10)}")


def main() -> None:
    """Reads the flags; one process of several."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=pathlib.Path, default=_MODEL)
    parser.add_argument("--reclaims", type=int, default=40)
    parser.add_argument("--requests", type=int, default=64, help="alive at any time")
    parser.add_argument("--resident", type=int, default=8, help="that the pool holds")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--output", type=int, default=192)
    parser.add_argument("--lend_mib", type=int, default=96)
    parser.add_argument("--host_mib", type=int, default=512)
    parser.add_argument("--pause", type=float, default=0.5, help="seconds between reclaims")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbose", action="store_true", help="a line for each reclaim")
    parser.add_argument("--socket", default=f"@aqua-reclaim-{os.getpid()}")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments)
        return
    coordinator = subprocess.Popen([
        sys.executable, "-m", "aqua_jax.cli.main", "coordinator", f"--socket={arguments.socket}",
        f"--term_s={_TERM_S}", f"--drain_s={_DRAIN_S}", "--forced_reclaim=kill",
        "--metrics_port=0",
    ], stderr=subprocess.DEVNULL)
    engine = None
    try:
        with (
            Arena.create(arguments.lend_mib * _MIB) as arena, _connect(arguments.socket) as client,
        ):
            lending = client.lend(arena, name="lender")
            engine = _Engine([
                sys.executable, *sys.argv, f"--socket={arguments.socket}", "--serve"
            ])
            engine.hear()
            time.sleep(4 * arguments.pause)
            measure(arguments, lending, engine)
            force(arguments, lending, engine)
    finally:
        if engine is not None:
            engine.child.kill()
            engine.child.wait()
        coordinator.terminate()
        coordinator.wait()


if __name__ == "__main__":
    main()
