"""Admission and policies: the scheduler under a virtual clock.

Runs bursts through the real scheduler with a cost model of a step (the 100M model on two cores:
8 ms for the weights, 0.5 ms a decode, 0.26 ms a prompt token) and prints, for several values of
`SchedulerConfig.growth_tokens`, throughput, p99 of the time to the first token, the longest gap,
preemptions and recomputed tokens. 0 is vLLM's rule (only the tokens at hand must fit); a value
above every output length reserves all at admission and never preempts.

With `--policies` it compares policies instead, with giving way by recomputation, each under several
bounds on what that may cost (`SchedulerConfig.switch_share`; 1: none).

    python scripts/admission.py [--policies]
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import random
from collections.abc import Callable
from typing import Literal

from aqua_jax.bench.traces import TraceRequest
from aqua_jax.paging.pages import PagePool
from aqua_jax.paging.prefix import PrefixCache
from aqua_jax.scheduling.fair import Fair, FairConfig
from aqua_jax.scheduling.policies import FirstComeFirstServed, Policy
from aqua_jax.scheduling.scheduler import Scheduler, SchedulerConfig
from aqua_jax.scheduling.slices import SliceConfig
from aqua_jax.simulation.cost import Line
from aqua_jax.simulation.report import figures
from aqua_jax.simulation.simulator import Simulator

COST = Line(step_s=8e-3, prefill_token_s=0.26e-3, decode_s=0.5e-3)
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
    computed_tokens: int


BURSTS = (
    Burst("256 in, 256 out", 256, 256),
    Burst("64 in, 512 out", 64, 512),
    Burst("128 in, 128 out", 128, 128),
    Burst("1024 in, 256 out", 1024, 256),
    Burst("256 in, 256 out, +-50%", 256, 256, spread=0.5),
    Burst("256 in, up to 512 out", 256, 512, earliest_stop=0.1),
)


def fair(slice_steps: int | Literal["auto"]) -> Fair:
    """The policy with slices of so many steps."""
    return Fair(FairConfig(SliceConfig(slice_steps)))


POLICIES: dict[str, Callable[[], Policy]] = {
    "fcfs": FirstComeFirstServed,
    **{f"fair, {n}": functools.partial(fair, n) for n in (5, 10, 20, 40, 80, "auto")},
}
SHARES = (0.1, 0.15, 0.2, 0.3, 1.0)  # of all time, what changing places may take


def simulate(
    burst: Burst, growth_tokens: int, policy: Callable[[], Policy] = FirstComeFirstServed,
    switch_share: float = 1.0,
) -> Outcome:
    """Runs a burst to its end."""
    rng = random.Random(0)
    num_pages = burst.resident * (burst.prompt + burst.output) // PAGE_TOKENS
    pool = PagePool(num_pages, PAGE_TOKENS)
    config = SchedulerConfig(
        64, 1024, num_pages * PAGE_TOKENS, growth_tokens=growth_tokens, switch_share=switch_share
    )
    scheduler = Scheduler(config, policy(), pool, PrefixCache(pool))
    requests, limits = [], []
    for _ in range(burst.requests):
        prompt, output = (
            int(mean * rng.uniform(1 - burst.spread, 1 + burst.spread))
            for mean in (burst.prompt, burst.output)
        )
        ends = max(1, int(output * rng.uniform(burst.earliest_stop, 1)))
        requests.append(TraceRequest(0.0, prompt, ends))
        limits.append(output)
    shown = figures(Simulator(scheduler, COST, requests, max_tokens=limits).run())
    return Outcome(
        shown["output_tok_s"], shown["ttft_p99_s"], shown["worst_gap_s"],
        int(shown["preemptions"]), int(shown["recomputed_tokens"]), int(shown["computed_tokens"]),
    )


HEADER = "   tok/s  ttft p99 s   gap s  preempted  recomputed  share"


def show(name: str, result: Outcome) -> None:
    """One line of a table."""
    share = result.recomputed_tokens / result.computed_tokens
    print(f"{name:>16}{result.tokens_per_s:8.0f}{result.ttft_p99_s:12.1f}"
          f"{result.longest_gap_s:8.1f}{result.preemptions:11}{result.recomputed_tokens:12}"
          f"{share:7.2f}", flush=True)


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policies", action="store_true", help="compare policies")
    compare = parser.parse_args().policies
    for burst in BURSTS:
        print(f"\n{burst.name}\n{'policy' if compare else 'growth':>16}{HEADER}")
        if compare:
            for name, share in itertools.product(POLICIES, SHARES):
                show(f"{name}, {share}", simulate(burst, 48, POLICIES[name], share))
        else:
            for growth in (0, 16, 32, 48, 64, 96, 128, 256, 1024):
                show(str(growth), simulate(burst, growth))


if __name__ == "__main__":
    main()
