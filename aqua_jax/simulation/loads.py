"""Seeded loads: how long requests are, when they come.

Lengths like ShareGPT's: prompts of 161.31 and outputs of 337.99 tokens on average, which is what
Kwon et al. report of it ("Efficient Memory Management for Large Language Model Serving with
PagedAttention", SOSP 2023, figure 11), drawn from lognormal distributions with sigma 1.0, which is
our assumption, cut at 2,048 tokens each, their longest.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence

from aqua_jax.bench.arrivals import arrival_times
from aqua_jax.bench.traces import TraceRequest

LENGTHS = ("fixed", "sharegpt")
SHAREGPT_PROMPT, SHAREGPT_OUTPUT, SHAREGPT_SIGMA, SHAREGPT_LONGEST = 161.31, 337.99, 1.0, 2048


def lognormal_lengths(
    count: int, mean: float, sigma: float, longest: int, draw: random.Random
) -> list[int]:
    """`count` lengths of at least 1 whose mean, before cutting at `longest`, is `mean`."""
    mu = math.log(mean) - sigma * sigma / 2
    return [min(longest, max(1, round(draw.lognormvariate(mu, sigma)))) for _ in range(count)]


def sharegpt_like(count: int, seed: int) -> list[tuple[int, int]]:
    """(prompt, output) lengths; see the module."""
    draw = random.Random(seed)
    prompts = lognormal_lengths(count, SHAREGPT_PROMPT, SHAREGPT_SIGMA, SHAREGPT_LONGEST, draw)
    outputs = lognormal_lengths(count, SHAREGPT_OUTPUT, SHAREGPT_SIGMA, SHAREGPT_LONGEST, draw)
    return list(zip(prompts, outputs, strict=True))


def draw_lengths(
    requests: Sequence[TraceRequest], count: int, seed: int
) -> list[tuple[int, int]]:
    """`count` of a trace's (prompt, output) lengths, drawn with replacement."""
    draw = random.Random(seed)
    chosen = (draw.choice(requests) for _ in range(count))
    return [(one.prompt, one.output) for one in chosen]


def timed(
    lengths: Sequence[tuple[int, int]], kind: str, rate: float, burstiness: float, users: int,
    seed: int,
) -> list[TraceRequest]:
    """Requests of these lengths at seeded times, dealt to `users` in turn.

    Args:
      lengths: (prompt, output) of each.
      kind: of arrivals; one of `bench.arrivals.ARRIVALS`.
      rate: requests a second, for kinds that have one.
      burstiness: of gamma.
      users: how many.
      seed: of the times.
    """
    times = arrival_times(kind, len(lengths), rate, burstiness, seed)
    return [
        TraceRequest(at, prompt, output, f"user-{index % users}")
        for index, (at, (prompt, output)) in enumerate(zip(times, lengths, strict=True))
    ]


def scaled(requests: Sequence[TraceRequest], rate: float) -> list[TraceRequest]:
    """The same requests, coming `rate` times faster."""
    return [dataclasses.replace(one, arrival_s=one.arrival_s / rate) for one in requests]
