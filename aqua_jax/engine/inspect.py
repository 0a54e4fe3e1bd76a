"""A look at everything alive inside an engine, for people. Runs on the engine's thread.

One pass over the live samples between two steps; what isn't there (a policy without vruntime, no
tier below the pool) is null.
"""

from __future__ import annotations

import collections
import time
from typing import Any

from aqua_jax.engine.engine import Engine
from aqua_jax.scheduling.sequence import Status

COLUMNS = (
    "request", "sample", "user", "state", "prompt_tokens", "output_tokens", "computed_tokens",
    "age_s", "ttft_s", "vruntime", "slice_left", "pool_pages", "peer_pages", "host_pages",
    "preemptions",
)


def inspect(engine: Engine) -> dict[str, Any]:
    """What `/debug/state` shows.

    Returns:
      "columns": names; "rows": a list a live sample, in order of arrival, states "running",
      "waiting" or "swapped"; "stats": `Engine.stats()`; "time": `time.monotonic()`, seconds.
    """
    now = time.monotonic()
    residency = engine._scheduler.residency
    rows = []
    for request in engine._requests.values():
        metrics = request.output.metrics
        age = round(now - metrics.arrival_time, 3)
        ttft = metrics.ttft_s
        ttft = None if ttft is None else round(ttft, 4)
        for sample in request.samples:
            sequence = sample.sequence
            if sequence.status is Status.FINISHED:
                continue
            pool = len(sequence.pages)
            peer = host = None
            if residency is not None:
                # Copies that could be read now, whether or not the pool has the page as well.
                names = collections.Counter(
                    stored.store.name for _, stored, _ in residency.find(sequence) if stored.tokens
                )
                peer, host = names["peer"], names["host"]
            state = "running" if sequence.status is Status.RUNNING else "waiting"
            if state == "waiting" and sequence.swapped:
                state = "swapped"
            rows.append((
                sequence.request_id, sequence.sample_index, sequence.user, state,
                sequence.prompt_len, len(sequence.tokens) - sequence.prompt_len,
                sequence.num_computed, age, ttft, None, None, pool, peer, host,
                sequence.preemptions,
            ))
    return {"columns": COLUMNS, "rows": rows, "stats": engine.stats(), "time": now}
