"""How much room to grow an admission should leave: the scheduler under a virtual clock.

Runs bursts through the real scheduler with a cost model of a step (the 100M model on two cores:
8 ms for the weights, 0.5 ms a decode, 0.26 ms a prompt token) and prints, for several values of
`SchedulerConfig.growth_tokens`, throughput, p99 of the time to the first token, the longest gap,
preemptions and recomputed tokens. 0 is vLLM's rule (only the tokens at hand must fit); a value
above every output length reserves all at admission and never preempts.

    python scripts/admission.py
"""

from __future__ import annotations

import collections
import dataclasses
import random

from aqua_jax.paging.pages import PagePool
from aqua_jax.paging.prefix import PrefixCache
from aqua_jax.scheduling.plan import Plan
from aqua_jax.scheduling.policies import FirstComeFirstServed
from aqua_jax.scheduling.scheduler import Scheduler, SchedulerConfig
from aqua_jax.scheduling.sequence import Sequence, Status

STEP_S, DECODE_S, PROMPT_S = 8e-3, 0.5e-3, 0.26e-3
PAGE_TOKENS = 16


@dataclasses.dataclass(frozen=True)
class Burst:
    """Requests that all arrive at once, over a pool that holds a few of them whole."""

    name: str
    prompt: int
    output: int
    spread: float = 0.0  # lengths vary uniformly by this share
    earliest_stop: float = 1.0  # outputs end at a uniform share of their limit from here to 1
    requests: int = 64
    resident: int = 8  # whole requests that the pool holds


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a burst came to."""

    tokens_per_s: float
    ttft_p99_s: float
    longest_gap_s: float
    preemptions: int
    recomputed_tokens: int


BURSTS = (
    Burst("256 in, 256 out", 256, 256),
    Burst("64 in, 512 out", 64, 512),
    Burst("128 in, 128 out", 128, 128),
    Burst("1024 in, 256 out", 1024, 256),
    Burst("256 in, 256 out, +-50%", 256, 256, spread=0.5),
    Burst("256 in, up to 512 out", 256, 512, earliest_stop=0.1),
)


def _seconds(plan: Plan) -> float:
    decodes = sum(chunk.count == 1 for chunk in plan.chunks)
    return STEP_S + DECODE_S * decodes + PROMPT_S * (plan.num_tokens - decodes)


def simulate(burst: Burst, growth_tokens: int) -> Outcome:
    """Runs a burst to its end, one step ahead of the tokens as the engine does."""
    rng = random.Random(0)
    num_pages = burst.resident * (burst.prompt + burst.output) // PAGE_TOKENS
    pool = PagePool(num_pages, PAGE_TOKENS)
    config = SchedulerConfig(64, 1024, num_pages * PAGE_TOKENS, growth_tokens=growth_tokens)
    scheduler = Scheduler(config, FirstComeFirstServed(), pool, PrefixCache(pool))
    ends: dict[Sequence, int] = {}
    for index in range(burst.requests):
        prompt, output = (
            int(mean * rng.uniform(1 - burst.spread, 1 + burst.spread))
            for mean in (burst.prompt, burst.output)
        )
        tokens = [rng.randrange(32_000) for _ in range(prompt)]
        sequence = Sequence(index, str(index), tokens, prompt + output)
        ends[sequence] = prompt + max(1, int(output * rng.uniform(burst.earliest_stop, 1)))
        scheduler.add(sequence)
    clock, output_tokens, longest = 0.0, 0, 0.0
    first: list[float] = []
    latest: dict[Sequence, float] = {}
    pending: collections.deque[Plan] = collections.deque()
    while scheduler.num_live:
        plan = scheduler.plan(clock)
        if plan is not None:
            pending.append(plan)
            if len(pending) == 1:
                continue
        done = pending.popleft()
        clock += _seconds(done)
        for chunk in done.chunks:
            sequence = chunk.sequence
            if not chunk.sample or sequence.status is Status.FINISHED:
                continue
            scheduler.accept(sequence, rng.randrange(32_000))
            output_tokens += 1
            if sequence in latest:
                longest = max(longest, clock - latest[sequence])
            else:
                first.append(clock)
            latest[sequence] = clock
            if len(sequence.tokens) >= ends[sequence]:
                scheduler.finish(sequence)
    counters = scheduler.counters
    return Outcome(
        output_tokens / clock, sorted(first)[int(0.99 * len(first))], longest,
        counters.preemptions, counters.recomputed_tokens,
    )


def main() -> None:
    """Prints the table."""
    for burst in BURSTS:
        print(f"\n{burst.name}\n{'growth':>8}{'tok/s':>8}{'ttft p99 s':>12}{'gap s':>8}"
              f"{'preempted':>11}{'recomputed':>12}")
        for growth in (0, 16, 32, 48, 64, 96, 128, 256, 1024):
            result = simulate(burst, growth)
            print(f"{growth:8}{result.tokens_per_s:8.0f}{result.ttft_p99_s:12.1f}"
                  f"{result.longest_gap_s:8.1f}{result.preemptions:11}"
                  f"{result.recomputed_tokens:12}")


if __name__ == "__main__":
    main()
