"""Seeded synthetic arrivals: all at once, Poisson, or gamma-distributed gaps. No jax."""

from __future__ import annotations

import itertools
import random

from aqua_jax.bench.traces import TraceRequest
from aqua_jax.bench.workloads import Sizes

ARRIVALS = ("burst", "poisson", "gamma")


def arrival_times(
    kind: str, count: int, rate: float, burstiness: float, seed: int
) -> list[float]:
    """When requests come, seconds, ascending; the first at 0.

    Gaps have mean 1/rate. Poisson's are exponential; gamma's have shape `burstiness`, vLLM's word:
    1 is Poisson, below 1 more bursty (variation 1/sqrt(burstiness)), above 1 more even.

    Args:
      kind: one of `ARRIVALS`.
      count: of requests.
      rate: requests a second, above 0; not used by burst.
      burstiness: above 0; used by gamma.
      seed: of the draw.
    """
    if kind == "burst":
        return [0.0] * count
    draw = random.Random(seed)
    shape = 1.0 if kind == "poisson" else burstiness
    gaps = [draw.gammavariate(shape, 1 / (rate * shape)) for _ in range(count - 1)]
    return list(itertools.accumulate(gaps, initial=0.0))


def synthetic(sizes: Sizes, times: list[float], users: int) -> list[TraceRequest]:
    """Equal requests at `times`, dealt to `users` in turn."""
    return [
        TraceRequest(at, sizes.prompt, sizes.output, f"user-{index % users}")
        for index, at in enumerate(times)
    ]
