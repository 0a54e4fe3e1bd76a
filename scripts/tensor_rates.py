"""AquaTensor beside memcpy of as many bytes: `python scripts/tensor_rates.py [--bytes=256MiB]`.

Every size is taken out and brought back, in turns with plain copies of the same bytes, and the
median of their ratios is printed. Two kinds of memcpy: into memory that is there already (what an
offload does), and into memory fresh from the system (what a fetch does, for jax arrays are new
memory: faulting it in is most of the time).
"""

from __future__ import annotations

import ctypes
import statistics
import threading
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from aqua_jax.cli.parsers import parse_size
from aqua_jax.memory import Aqua, Lender, Static

FLAGS = flags.FLAGS
flags.DEFINE_string("bytes", "256MiB", "Largest array.")
flags.DEFINE_integer("rounds", 9, "Measurements of each, in turns.", lower_bound=1)
MIB = 1 << 20


def seconds(action: Callable[[], object]) -> float:
    """How long it takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def measure(aqua: Aqua, tree: object, size: int, rounds: int) -> dict[str, float]:
    """Median ratios and rates for one tree of `size` bytes; GB/s count every byte once."""
    source = np.full(size, 1, np.uint8)
    there = np.full(size, 2, np.uint8)

    def memcpy() -> None:
        ctypes.memmove(there.ctypes.data, source.ctypes.data, size)

    def memcpy_fresh() -> None:
        fresh = np.empty(size, np.uint8)
        ctypes.memmove(fresh.ctypes.data, source.ctypes.data, size)

    aqua.offload(tree).free()
    times: dict[str, list[float]] = {name: [] for name in ("out", "in", "copy", "fresh")}
    for _ in range(rounds):
        times["copy"].append(seconds(memcpy))
        start = time.perf_counter()
        handle = aqua.offload(tree)
        times["out"].append(time.perf_counter() - start)
        times["fresh"].append(seconds(memcpy_fresh))
        times["in"].append(seconds(lambda: jax.block_until_ready(handle.fetch())))  # noqa: B023
        handle.free()

    def ratio(a: str, b: str) -> float:
        return statistics.median(y / x for x, y in zip(times[a], times[b], strict=True))

    rates = {f"{n} GB/s": size / statistics.median(t) / 1e9 for n, t in times.items()}
    return rates | {"out/copy": ratio("out", "copy"), "in/fresh": ratio("in", "fresh")}


def main(argv: list[str]) -> None:
    """Prints a table."""
    del argv
    most = parse_size(FLAGS.bytes)
    lender = Lender(most + 64 * MIB, "@aqua-tensor-rates")
    thread = threading.Thread(target=lender.serve)
    thread.start()
    print("ratios: 1 is the speed of memcpy; out: to memory that is there, in: to fresh memory")
    try:
        for tier in ("host", "peer"):
            with Aqua("@aqua-tensor-rates", policy=Static(tier)) as aqua:
                size = MIB
                while size <= most:
                    report(tier, "one array", size, measure(
                        aqua, jnp.ones(size, jnp.uint8), size, FLAGS.rounds
                    ))
                    size *= 16
                small = [jnp.ones((64, 64)) for _ in range(1000)]
                report(tier, "1,000 of 16 KiB", 1000 << 14, measure(
                    aqua, small, 1000 << 14, FLAGS.rounds
                ))
    finally:
        lender.stop()
        thread.join()
        lender.close()


def report(tier: str, what: str, size: int, found: dict[str, float]) -> None:
    """Prints a line."""
    shown = "  ".join(f"{name} {value:6.2f}" for name, value in found.items())
    print(f"{tier:5} {what:16} {size / MIB:7.1f} MiB  {shown}", flush=True)


if __name__ == "__main__":
    app.run(main)
