"""How fast pages move between the pool and shared memory, beside memcpy of as many bytes.

    python scripts/move_rates.py [--page_kib=64,384,3072] [--dispatch_mib=1,8,32] [--repeat=15]

Scattered pages of a pool, through `enqueue_moves` in a compiled donating program, to and from a
memfd; plainly and with checksums. Each dispatch is followed by one memcpy of the same number of
bytes, in one piece, between other parts of the same memory; both see memory that is in no cache of
theirs (as far as --memory_mib exceeds it). Printed is one JSON line per case: medians of GB/s
(10^9 bytes, counted once), and of the ratio within a pair. `rate` is from the call of the program
until the last ticket is seen to be done; `worker_rate` only while the worker copies.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from aqua_jax.ops import moves

MODES = ("out", "in", "out+checksum", "in+checksum")


def shared_memory(nbytes: int) -> mmap.mmap:
    """A memfd of `nbytes`, mapped and populated."""
    descriptor = os.memfd_create("move_rates")
    os.ftruncate(descriptor, nbytes)
    memory = mmap.mmap(descriptor, nbytes)
    os.close(descriptor)
    np.frombuffer(memory, np.uint8)[:] = 1
    return memory


def wait_for(tickets: np.ndarray) -> None:
    """Polls until every ticket has ended; all must have succeeded."""
    while (last := moves.poll(tickets[-1:])[0][0]) == moves.Status.PENDING:
        time.sleep(20e-6)
    statuses = moves.poll(tickets)[0]
    if last != moves.Status.DONE or (statuses != moves.Status.DONE).any():
        raise RuntimeError(f"moves failed: {statuses}")


def measure(page: int, dispatch: int, nbytes: int, repeat: int) -> list[dict]:
    """Rates of all modes for one page size and one size of dispatch, in bytes."""
    pages, count = nbytes // page, max(1, dispatch // page)
    kv = jnp.ones((pages, page // 4), jnp.float32)
    memory = shared_memory(pages * page)
    view = np.frombuffer(memory, np.uint8)
    program = jax.jit(moves.enqueue_moves, donate_argnums=0)
    rng = np.random.default_rng(0)
    results = []
    with moves.Segment(memory) as segment, moves.MovePool.of(kv) as pool:
        for mode in MODES:
            rates, worker_rates, memcpy_rates = [], [], []
            for turn in range(repeat + 1):  # the first compiles and touches
                chosen = rng.permutation(pages)[:count]
                offsets = rng.permutation(pages)[:count] * page
                sums = None
                if mode == "in+checksum":
                    before = moves.MoveBatch(count, pool)
                    tickets = before.copy_out(chosen, segment, offsets, checksum=True)
                    kv = program(kv, before.moves(), before.head())
                    wait_for(tickets)
                    sums = moves.poll(tickets)[1]
                batch = moves.MoveBatch(count, pool)
                if mode.startswith("out"):
                    tickets = batch.copy_out(
                        chosen, segment, offsets, checksum=mode.endswith("checksum")
                    )
                else:
                    tickets = batch.copy_in(chosen, segment, offsets, checksums=sums)
                words, head = batch.moves(), batch.head()
                busy = moves.counters().busy_ns
                start = time.perf_counter()
                kv = program(kv, words, head)
                wait_for(tickets)
                elapsed = time.perf_counter() - start
                busy = moves.counters().busy_ns - busy
                # The same bytes once more by memcpy, in the same direction.
                at, other = (int(rng.integers(0, pages - count + 1)) * page for _ in range(2))
                in_pool = kv.unsafe_buffer_pointer() + at
                in_memory = view.ctypes.data + other
                pair = (in_memory, in_pool) if mode.startswith("out") else (in_pool, in_memory)
                start = time.perf_counter()
                ctypes.memmove(*pair, count * page)
                memcpy_time = time.perf_counter() - start
                if turn > 0:
                    rates.append(count * page / elapsed / 1e9)
                    worker_rates.append(count * page / busy)
                    memcpy_rates.append(count * page / memcpy_time / 1e9)
            ratios = [a / b for a, b in zip(rates, memcpy_rates, strict=True)]
            results.append({
                "mode": mode, "page_kib": page >> 10, "dispatch_mib": count * page / 2**20,
                "rate": round(statistics.median(rates), 2),
                "worker_rate": round(statistics.median(worker_rates), 2),
                "memcpy": round(statistics.median(memcpy_rates), 2),
                "ratio": round(statistics.median(ratios), 2),
            })
    return results


def main() -> None:
    """Reads the flags, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--page_kib", default="64,384,3072")
    parser.add_argument("--dispatch_mib", default="1,8,32")
    parser.add_argument("--memory_mib", type=int, default=1024, help="of pool and of shared memory")
    parser.add_argument("--repeat", type=int, default=15)
    flags = parser.parse_args()
    for page in flags.page_kib.split(","):
        for dispatch in flags.dispatch_mib.split(","):
            for result in measure(
                int(page) << 10, int(dispatch) << 20, flags.memory_mib << 20, flags.repeat
            ):
                print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
