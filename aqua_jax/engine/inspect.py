"""A look at everything alive inside an engine, for people. Runs on the engine's thread.

One pass over the live samples and their pages, between two steps. What isn't there (a policy
without vruntime, no tier below the pool) is null.
"""

from __future__ import annotations

import time
from typing import Any

from aqua_jax.engine.engine import Engine
from aqua_jax.scheduling.sequence import Status

COLUMNS = (
    "request", "sample", "user", "state", "prompt_tokens", "output_tokens", "computed_tokens",
    "arrived", "ttft_s", "vruntime", "slice_left", "pool_pages", "peer_pages", "host_pages",
    "preemptions",
)


def inspect(engine: Engine) -> dict[str, Any]:
    """What `/debug/state` shows.

    Returns:
      "columns": names; "rows": a list a live sample, in order of arrival, states "running",
      "waiting" or "swapped", pages in a store counted whether or not the pool has them as well,
      "arrived" and "time" in seconds of `time.monotonic()`, a "slice_left" without end infinite;
      "users": vruntime by name; "stats": `Engine.stats()` without bounds.
    """
    policy, residency = engine.scheduler.policy, engine.scheduler.residency
    none: int | None = None if residency is None else 0
    users: dict[str, float] = {}
    running, finished = Status.RUNNING, Status.FINISHED
    rows = []
    for request in engine.requests:
        metrics = request.output.metrics
        arrived, first = metrics.arrival_time, metrics.first_token_time
        ttft = None if first is None else first - arrived
        for sample in request.samples:
            sequence = sample.sequence
            if sequence.status is running:
                state = "running"
            elif sequence.status is finished:
                continue
            else:
                state = "swapped" if sequence.swapped else "waiting"
            vruntime = slice_left = None
            standing = policy.standing(sequence)
            if standing is not None:
                vruntime, slice_left, users[sequence.user] = standing
            peer, host = none, none
            if residency is not None:
                names = [copy.store.name for copy in residency.copies(sequence) if copy.tokens]
                peer = names.count("peer")
                host = len(names) - peer
            prompt = sequence.prompt_len
            rows.append((
                sequence.request_id, sequence.sample_index, sequence.user, state, prompt,
                len(sequence.tokens) - prompt, sequence.num_computed, arrived, ttft, vruntime,
                slice_left, len(sequence.pages), peer, host,
                sequence.preemptions,
            ))
    return {
        "columns": COLUMNS, "rows": rows, "users": users, "stats": engine.stats(bounds=False),
        "time": time.monotonic(),
    }
