"""A crowd that gives way all the time, under slow copies, with one of `ops.moves`' rules removed.

    AQUA_COPY_THREADS=4 python -m tests.faults.ordering_rules FOLDER RULE=SEEDS...

prints a JSON line per rule: how many of SEEDS schedules were run until one went wrong, or
0 if none did. Several copy threads, for with one copies end in the order they were asked for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from aqua_jax.config import SamplingParams
from aqua_jax.engine.engine import Engine
from aqua_jax.engine.pager import Pager
from aqua_jax.errors import AquaError
from aqua_jax.memory.stores import HostStore
from aqua_jax.ops import moves as copy_queue
from aqua_jax.ops.moves import MovePool, Segment
from aqua_jax.paging.moves import Move
from aqua_jax.paging.residency import Residency
from aqua_jax.paging.stored import Stored
from aqua_jax.scheduling.plan import Plan
from aqua_jax.scheduling.scheduler import Scheduler
from aqua_jax.scheduling.sequence import Status
from tests.engine.driving import run_all, tiny_engine
from tests.engine.paged import PAGE_BYTES
from tests.engine.test_engine import greedy, prompt

SLOW_US = 4000  # longest pause before a copy and in its middle; a step takes about 500
PASSERS = 24


def work() -> list[tuple[list[int], SamplingParams]]:
    """Requests whose answers are compared."""
    return [(prompt(18 + 5 * i, 50 + i), greedy(60)) for i in range(10)]


def expected(folder: pathlib.Path) -> list[list[int]]:
    """Their answers where nobody gives way."""
    with tiny_engine(folder, deterministic=True, kv_cache_tokens=4096) as engine:
        return [output.outputs[0].token_ids for output in run_all(engine, work())]


def exact(folder: pathlib.Path, wanted: list[list[int]], seed: int) -> bool:
    """Whether all answers are right, and all bookkeeping consistent."""
    rng = random.Random(seed)
    with tiny_engine(
        folder, deterministic=True, kv_cache_tokens=16 * rng.randrange(12, 20), policy="fair",
        slice_steps=4, host_kv_memory=rng.choice([16, 40, 200]) * PAGE_BYTES, switch_share=1.0,
        prefix_caching=rng.random() < 0.5,
    ) as engine:
        # Recomputing would be found cheaper than copies that take so long, and show nothing.
        engine._scheduler.costs.swap = lambda tokens, unsaved: 0.0
        for index, (ids, params) in enumerate(work()):
            engine.add_request(f"r{index}", ids, params)
        # Others come, and are aborted while their pages are on the way.
        passers, last = 0, {}
        while engine.has_unfinished():
            if passers < PASSERS and rng.random() < 0.15:
                ids = prompt(rng.randrange(20, 90), rng.randrange(99))
                engine.add_request(f"p{passers}", ids, greedy(60))
                passers += 1
            for name in under_way(engine):
                if rng.random() < 0.2:
                    engine.abort(name)
            last |= {output.request_id: output for output in engine.step()}
        stats = engine.stats()
    answers = [list(last[f"r{index}"].outputs[0].token_ids) for index in range(len(wanted))]
    return answers == wanted and stats["pages"]["in_use"] == 0 and stats["paging"]["bytes_in"] > 0


def under_way(engine: Engine) -> list[str]:
    """Passers with pages that are being copied."""
    residency = engine._scheduler.residency
    moving = {
        owner.request_id
        for move in engine._pager._under_way for owner in residency._moves[move].owners
    }
    return sorted(name for name in moving if name.startswith("p"))


Patch = Callable[[Any, str, Any], None]


def report_early(patch: Patch, inward: bool) -> None:
    """Moves count as done once they are handed over."""
    batch = Pager.batch

    def early(self: Pager, planned):
        words = batch(self, planned)
        early = [move.inward is inward for move in self._under_way]
        done = [move for move, is_early in zip(self._under_way, early, strict=True) if is_early]
        self._tickets.keep([index for index, is_early in enumerate(early) if not is_early])
        self._under_way = [move for move in self._under_way if move.inward is not inward]
        for move in done:
            self._planner.finished(move, True, None)
        return words

    patch(Pager, "batch", early)


class Unpinned:
    """A page pool on which references of moves don't count."""

    def __init__(self, pool) -> None:
        self._pool = pool

    def __getattr__(self, name: str):
        return getattr(self._pool, name)

    def retain(self, page) -> None:
        """Nothing."""

    def release(self, page) -> None:
        """Nothing."""

    pin, unpin = retain, release


def no_pins(patch: Patch, inward: bool) -> None:
    """Moves hold no reference to their page in the pool."""

    def unpinned(method):
        def call(self: Residency, move, *rest):
            if move.inward is not inward:
                return method(self, move, *rest)
            pool, self._pool = self._pool, Unpinned(self._pool)
            try:
                return method(self, move, *rest)
            finally:
                self._pool = pool

        return call

    patch(Residency, "_ask", unpinned(Residency._ask))
    patch(Residency, "_finish", unpinned(Residency._finish))
    if not inward:
        patch(Residency, "leaving", property(lambda self: 0))


def sources_of_this_step(patch: Patch) -> None:
    """What a step writes is copied out at its head."""
    copy_queue.set_delay(0, 0)  # a copy that comes late would find it written
    plan = Scheduler.plan

    def eager(self: Scheduler, now: float):
        made = plan(self, now)
        if made is None or self.residency is None:
            return made
        for chunk in made.chunks:
            one = chunk.sequence
            if one.status is Status.RUNNING:
                self.residency.back(one, one.pages, one.num_computed)
        more = self.residency.take_moves(self.config.max_moves - len(made.moves))
        return dataclasses.replace(made, moves=made.moves + more)

    patch(Scheduler, "plan", eager)


RULES: dict[str, Callable[[Patch], None]] = {
    "none": lambda patch: None,
    "sources are written by earlier steps": sources_of_this_step,
    "sources are pinned": lambda patch: no_pins(patch, inward=False),
    "what leaves is there when its ticket ends": lambda patch: report_early(patch, inward=False),
    "what arrives is there when its ticket ends": lambda patch: report_early(patch, inward=True),
    "targets are pinned": lambda patch: no_pins(patch, inward=True),
    "slots are free when their moves have ended":
        lambda patch: patch(Stored, "busy", property(lambda self: False)),
}


# Where a schedule that shows it was found; else they are tried from 0 on.
FIRST = {"targets are pinned": 4}


@contextlib.contextmanager
def without(rule: str) -> Iterator[None]:
    """Takes a rule away for the length of a block."""
    kept: list[tuple[Any, str, Any]] = []

    def patch(owner: Any, name: str, value: Any) -> None:
        kept.append((owner, name, owner.__dict__[name]))
        setattr(owner, name, value)

    RULES[rule](patch)
    try:
        yield
    finally:
        for owner, name, value in reversed(kept):
            setattr(owner, name, value)


def attempts(folder: pathlib.Path, wanted: list[list[int]], rule: str, seeds: int) -> int:
    """Schedules run until one went wrong without the rule; 0: none did."""
    for index in range(seeds):
        seed = (FIRST.get(rule, 0) + index) % seeds
        copy_queue.set_delay(seed, SLOW_US)
        with without(rule):
            try:
                right = exact(folder, wanted, seed)
            except (AquaError, AssertionError, LookupError):
                right = False  # the bookkeeping noticed
        if not right:
            return index + 1
    return 0


def end_under_copies(folder: pathlib.Path, rule: str) -> None:
    """Ends an engine while copies are held up. Without the rule they find no memory."""
    # Large enough for the system to take the pool's memory back when it is freed.
    engine = tiny_engine(
        folder, kv_cache_memory=64 << 20, policy="fcfs_swap", host_kv_memory=64 << 20
    )
    (store,), pool = engine._scheduler.residency.tiers.stores, engine._pool
    # Neighbours in the pool are none in the store, or all would be one copy.
    pages, slots = pool.allocate(16), store.allocate(16)[::-1]
    copy_queue.set_delay(1, 200_000)
    moves = [
        Move(page, store, slot, 0, 16, inward=False)
        for page, slot in zip(pages, slots, strict=True)
    ]
    engine._runner.dispatch(Plan(0, (), (), (), 0, tuple(moves)))
    engine._runner.fence()
    if rule == "segments are retired before their memory goes":
        Segment.retire = lambda self, **_: None
        MovePool.close = lambda self: None
    elif rule == "the pool is closed before its memory goes":
        MovePool.close = lambda self: None
        Segment.retire = lambda self, **_: None
        HostStore.close = lambda self: None
    engine.close()
    copy_queue.set_delay(0, 0)
    copy_queue.drain(30)


def main(arguments: list[str]) -> None:
    """See the module; `end=RULE` ends an engine without a rule about ends."""
    folder, wanted = pathlib.Path(arguments[0]), None
    for argument in arguments[1:]:
        rule, value = argument.rsplit("=", 1)
        if rule == "end":
            end_under_copies(folder, value)
            continue
        wanted = wanted or expected(folder)
        found = attempts(folder, wanted, rule, int(value))
        print(json.dumps({"rule": rule, "attempts": found}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
