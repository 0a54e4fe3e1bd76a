"""What --trace_events costs the engine's thread: microseconds a step.

    python scripts/trace_cost.py [--sequences=64] [--steps=2000] [--moves=16] [--output=FILE]

A steady state: every sequence decodes, one gives way to another in each step, whose prompt chunk
and `moves` page moves ride along; one request ends and one comes every eighth step. What is timed
is what the engine calls, writing to the file included.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
import types

from aqua_jax.engine.trace_events import TraceEvents
from aqua_jax.paging.moves import Move
from aqua_jax.paging.pages import PageHandle
from aqua_jax.scheduling.plan import Chunk, Plan
from aqua_jax.scheduling.sequence import Sequence


def measure(sequences: int, steps: int, moves: int, path: str) -> dict[str, float]:
    """Median, mean and p99 in microseconds, and bytes a step."""
    store = types.SimpleNamespace(name="peer", capacity=100, free_slots=50, lost=False)
    pool = types.SimpleNamespace(in_use=0)
    trace = TraceEvents(path, pool, [store])
    live = [Sequence(number, f"request-{number}", [1] * 64, 1000) for number in range(sequences)]
    for one in live:
        trace.added(one)
    spent = []
    for step in range(steps):
        away = live[step % sequences]
        chunks = [Chunk(one, 64 + step, 1, True) for one in live if one is not away]
        chunks.append(Chunk(live[(step - 1) % sequences], 0, 64, True))
        page_moves = [
            Move(PageHandle(index, 1), store, (index, 1), 0, 16, index % 2 == 0)
            for index in range(moves)
        ]
        pool.in_use = step % 100
        plan = Plan(step, tuple(chunks), (), (away,), sequences + 63, tuple(page_moves))
        record = types.SimpleNamespace(step_id=step, rows=tuple(one.sequence for one in chunks))
        began = time.perf_counter()
        if step % 8 == 0:
            trace.ended(live[step % sequences], "length")
            live[step % sequences] = Sequence(sequences + step, f"request-{step}", [1] * 64, 1000)
            trace.added(live[step % sequences])
        trace.dispatched(plan, began)
        trace.taken_in(record, began)
        for move in page_moves:
            trace.move_finished(move, True)
        spent.append((time.perf_counter() - began) * 1e6)
    trace.close()
    spent.sort()
    return {
        "median_us": round(statistics.median(spent), 1), "mean_us": round(sum(spent) / steps, 1),
        "p99_us": round(spent[int(0.99 * steps)], 1),
        "bytes_per_step": round(os.path.getsize(path) / steps),
    }


def main() -> None:
    """Prints one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--moves", type=int, default=16)
    parser.add_argument("--output", help="keep the file here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = arguments.output or os.path.join(folder, "trace.json")
        print(json.dumps(measure(arguments.sequences, arguments.steps, arguments.moves, path)))


if __name__ == "__main__":
    main()
