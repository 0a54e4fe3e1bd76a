"""What a decision costs: microseconds per `Scheduler.plan` with many live requests.

    python scripts/scheduler_cost.py [--live=2000] [--running=64] [--steps=2000] [--only=NAME]

A steady state under pressure: a pool that holds the running sequences only just and admissions
that leave no room to grow (so that pages run out all the time), prompts with shared prefixes, and
a new request for each that ends. With `swapping` there is a store below the pool that holds
everything, and copies end two plans after the one that asked for them. `plan` is timed, and
`accept` + `finish` + `add` and the ends of moves beside it, which the engine pays as well; in CPU
time of the thread, so that a busy machine doesn't count.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import random
import statistics
import time

from aqua_jax.memory.stores import HostStore
from aqua_jax.paging.moves import Move
from aqua_jax.paging.pages import FarthestNextUse, PagePool
from aqua_jax.paging.prefix import PrefixCache
from aqua_jax.paging.residency import Residency
from aqua_jax.scheduling.cost import CostConfig, Costs
from aqua_jax.scheduling.fair import Fair, FairConfig
from aqua_jax.scheduling.policies import FirstComeFirstServed, Policy, StrictPriority
from aqua_jax.scheduling.scheduler import Scheduler, SchedulerConfig
from aqua_jax.scheduling.sequence import Sequence, Status
from aqua_jax.scheduling.slices import SliceConfig

SLOT_BYTES = 4096  # of a page: nobody looks at its bytes here


def policies() -> dict[str, Policy]:
    """What is measured: `fair` with one user and with a user per request, and the others."""
    slices = SliceConfig(slice_steps=20)
    return {
        "fcfs": FirstComeFirstServed(), "priority": StrictPriority(),
        "fair, slices of 20": Fair(FairConfig(slices)), "fair, auto": Fair(),
        "fair, slices of 20, a user each": Fair(FairConfig(slices)),
        "fcfs, swapping": FirstComeFirstServed(),
        "fair, slices of 20, swapping": Fair(FairConfig(slices)),
        "fair, auto, swapping": Fair(),
        "fair, slices of 20, a user each, swapping": Fair(FairConfig(slices)),
    }


def measure(name: str, live: int, running: int, steps: int) -> dict[str, float | str]:
    """Medians and p99 in microseconds over `steps` plans."""
    rng = random.Random(0)
    swapping = "swapping" in name
    pool = PagePool(running * 7, 16, FarthestNextUse() if swapping else None)
    stores = [HostStore(live * 24 * SLOT_BYTES, SLOT_BYTES, 16)] if swapping else []
    residency = Residency(pool, stores) if stores else None
    scheduler = Scheduler(
        SchedulerConfig(running, 1024 + running, 4096, growth_tokens=0), policies()[name], pool,
        PrefixCache(pool), residency, Costs(16, CostConfig(moved_page=0.01)),
    )
    under_way: collections.deque[tuple[Move, ...]] = collections.deque([(), ()])
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
        plans.append(planned - started)
        under_way.append(() if plan is None else plan.moves)
        for move in under_way.popleft():
            assert residency is not None
            residency.finished(move, True)
        assert plan is not None or residency is not None
        for chunk in () if plan is None else plan.chunks:
            if not chunk.sample or chunk.sequence.status is Status.FINISHED:
                continue
            scheduler.accept(chunk.sequence, rng.randrange(32_000))
            if chunk.sequence.complete:
                scheduler.finish(chunk.sequence)
                add()
        rest.append(time.thread_time() - planned)
        resident.append(scheduler.num_running)
    counters = scheduler.counters
    for store in stores:
        store.close()
    return {
        "policy": name, "live": live, "running_mean": round(statistics.fmean(resident), 1),
        "plan_us_median": round(statistics.median(plans) * 1e6, 1),
        "plan_us_p99": round(statistics.quantiles(plans, n=100)[98] * 1e6, 1),
        "rest_us_median": round(statistics.median(rest) * 1e6, 1),
        "preemptions": counters.preemptions, "switches": counters.switches, "swaps": counters.swaps,
        "finished": counters.finished,
    }


def main() -> None:
    """Prints one JSON line per policy."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--live", type=int, default=2000)
    parser.add_argument("--running", type=int, default=64)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--only", default="", help="those with this in their name")
    args = parser.parse_args()
    for name in (name for name in policies() if args.only in name):
        print(json.dumps(measure(name, args.live, args.running, args.steps)), flush=True)


if __name__ == "__main__":
    main()
