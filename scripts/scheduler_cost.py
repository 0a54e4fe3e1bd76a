"""What a decision costs: microseconds per `Scheduler.plan` with many live requests.

    python scripts/scheduler_cost.py [--live=2000] [--running=64] [--steps=2000]

A steady state under pressure: a pool that holds the running sequences only just and admissions
that leave no room to grow (so that pages run out all the time), prompts with shared prefixes, and
a new request for each that ends. `plan` is timed, and `accept` + `finish` + `add` beside it, which
the engine pays as well; in CPU time of the thread, so that a busy machine doesn't count.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import time

from aqua_jax.paging.pages import PagePool
from aqua_jax.paging.prefix import PrefixCache
from aqua_jax.scheduling.fair import Fair, FairConfig
from aqua_jax.scheduling.policies import FirstComeFirstServed, Policy, StrictPriority
from aqua_jax.scheduling.scheduler import Scheduler, SchedulerConfig
from aqua_jax.scheduling.sequence import Sequence, Status
from aqua_jax.scheduling.slices import SliceConfig


def policies() -> dict[str, Policy]:
    """What is measured: `fair` with one user and with a user per request, and the others."""
    slices = SliceConfig(slice_steps=20)
    return {
        "fcfs": FirstComeFirstServed(), "priority": StrictPriority(),
        "fair, slices of 20": Fair(FairConfig(slices)), "fair, auto": Fair(),
        "fair, slices of 20, a user each": Fair(FairConfig(slices)),
    }


def measure(name: str, live: int, running: int, steps: int) -> dict[str, float | str]:
    """Medians and p99 in microseconds over `steps` plans."""
    rng = random.Random(0)
    pool = PagePool(running * 7, 16)
    scheduler = Scheduler(
        SchedulerConfig(running, 1024 + running, 4096, growth_tokens=0), policies()[name], pool,
        PrefixCache(pool),
    )
    prefixes = [[rng.randrange(32_000) for _ in range(128)] for _ in range(8)]
    numbers = itertools.count()

    def add() -> None:
        number = next(numbers)
        prompt = rng.choice(prefixes) + [rng.randrange(32_000) for _ in range(rng.randrange(1, 64))]
        limit = len(prompt) + rng.randrange(1, 160)
        scheduler.add(Sequence(
            number, str(number), prompt, limit, arrival=float(number), priority=number % 3,
            user=str(number) if "user each" in name else "",
        ))

    for _ in range(live):
        add()
    plans, rest, resident = [], [], []
    for _ in range(steps):
        started = time.thread_time()
        plan = scheduler.plan(started)
        planned = time.thread_time()
        assert plan is not None
        for chunk in plan.chunks:
            if not chunk.sample or chunk.sequence.status is Status.FINISHED:
                continue
            scheduler.accept(chunk.sequence, rng.randrange(32_000))
            if chunk.sequence.complete:
                scheduler.finish(chunk.sequence)
                add()
        rest.append(time.thread_time() - planned)
        plans.append(planned - started)
        resident.append(scheduler.num_running)
    counters = scheduler.counters
    return {
        "policy": name, "live": live, "running_mean": round(statistics.fmean(resident), 1),
        "plan_us_median": round(statistics.median(plans) * 1e6, 1),
        "plan_us_p99": round(statistics.quantiles(plans, n=100)[98] * 1e6, 1),
        "rest_us_median": round(statistics.median(rest) * 1e6, 1),
        "preemptions": counters.preemptions, "switches": counters.switches,
        "finished": counters.finished,
    }


def main() -> None:
    """Prints one JSON line per policy."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--live", type=int, default=2000)
    parser.add_argument("--running", type=int, default=64)
    parser.add_argument("--steps", type=int, default=2000)
    args = parser.parse_args()
    for name in policies():
        print(json.dumps(measure(name, args.live, args.running, args.steps)), flush=True)


if __name__ == "__main__":
    main()
