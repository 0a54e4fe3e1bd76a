"""The rules of `ops.moves` as the engine keeps them, and what becomes of answers without each.

Copies are real, and held up so that they end long after the steps they ride on. With all rules
kept every answer is exact. With one of them taken away some answer must be wrong, or the process
die: else nothing would notice if the engine forgot it. Rules 1 to 4 are taken away one by one in
`tests.faults.ordering_rules`; rule 5 below it, where memory goes too early; and the check behind
it, of generations, where heads run too late. That an engine's extent is lent only when no
dispatched step names it (rule 3) is `tests/engine/test_lending.py`'s.

The rules were also taken away by hand, in the sources, and this noticed:

- pins of outward moves (`Residency._ask`, `_finish`): "none" here, in the first schedule
- references of inward moves (the same two): "none", in the first
- `Residency.arriving` is always false: "none", in the first
- slots are freed while moves name them (`_finish`, `_disown`): "none", in the first
- what this step computes is written behind (`Holdings.write_behind`): "none", in the second
- `HandleTable.close` doesn't wait: `tests/ops/test_moves.py`, retiring with copies in flight
- `HandleTable.acquire` takes any generation: the tests of late heads
- `EngineLender` waits for no step: `tests/engine/test_lending.py`, an extent is handed over when...
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aqua_jax.memory.stores import HostStore
from aqua_jax.ops import moves as copy_queue
from aqua_jax.ops.moves import MovePool, Segment
from aqua_jax.paging.moves import Move
from aqua_jax.scheduling.plan import Plan
from tests.engine.paged import PAGE_BYTES, PAGE_TOKENS, Paged, paged_engine
from tests.faults.ordering_rules import RULES
from tests.faults.processes import ROOT
from tests.scale import at_scale

ATTEMPTS = 24  # schedules in which a missing rule has to show; most do in the first
REMOVED = [rule for rule in RULES if rule != "none"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.faults.ordering_rules", *arguments], cwd=ROOT, text=True,
        capture_output=True, env={**os.environ, "AQUA_COPY_THREADS": "4"},
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def attempts(folder) -> dict[str, int]:
    """By rule, schedules run until one went wrong without it. All in one process, which ends an
    engine under copies as well, with all rules kept."""
    done = run(
        folder, f"none={at_scale(3, 40)}", *(f"{rule}={ATTEMPTS}" for rule in REMOVED), "end=none"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {line["rule"]: line["attempts"] for line in lines}


def test_with_all_rules_every_answer_is_exact(attempts):
    assert attempts["none"] == 0


@pytest.mark.parametrize("rule", REMOVED)
def test_without_it_something_goes_wrong(attempts, rule):
    assert 1 <= attempts[rule] <= ATTEMPTS


@pytest.mark.parametrize(
    "rule",
    [
        "segments are retired before their memory goes",
        "the pool is closed before its memory goes",
    ],
)
def test_memory_goes_after_the_copies_that_use_it(folder, rule):
    done = run(folder, f"end={rule}")
    assert done.returncode == -signal.SIGSEGV, done.stderr[-3000:]


# Heads that run when their pool or segment is gone.


@contextlib.contextmanager
def ids_only(*named: MovePool | Segment) -> Iterator[None]:
    """As if there were no generations: what is packed meanwhile names who has these ids next."""
    for one in named:
        one.generation += 1
    yield
    for one in named:
        one.generation -= 1


def hold_up(kv: jax.Array, weight: jax.Array) -> jax.Array:
    """The pool as it is, after 50 ms of work and more."""
    value = jax.lax.fori_loop(0, 60, lambda _, one: one @ weight, weight)
    return kv + 0 * value[0, 0]


@contextlib.contextmanager
def late_head(paged: Paged, move: Move, *named: MovePool | Segment) -> Iterator[None]:
    """A step with a move is dispatched, and its head runs after the block. Nobody waits for it; of
    `named` the ids count alone."""
    runner, weight = paged.engine._runner, jnp.eye(768)
    busy = jax.jit(hold_up, donate_argnums=0).lower(runner._kv, weight).compile()
    runner._kv = busy(runner._kv, weight)
    with ids_only(*named):
        runner.dispatch(Plan(0, (), (), (), 0, (move,)))
    late, fence = runner._kv, runner.fence
    runner.fence = lambda: None
    yield
    assert not late.is_ready()
    runner.fence = fence
    jax.block_until_ready(late)
    assert copy_queue.drain(30)


@pytest.mark.parametrize("generations", [True, False], ids=["checked", "ids only"])
def test_a_head_late_for_its_pool_writes_nothing_for_the_next_one(tmp_path, generations):
    """A failed step brings a new pool, and slots new owners; then the head of a step that nobody
    has waited for runs. Its pool's generation keeps it off: by ids alone it copies a page of the
    old pool to where one of the new pool is, which would be read as such."""
    store = HostStore(2 * PAGE_BYTES, PAGE_BYTES, PAGE_TOKENS)
    with paged_engine(tmp_path, [store]) as paged:
        old = paged.content[paged.pages[0].id].tobytes()
        pool, (slot,) = paged.pager._copies._pools[0], store.allocate(1)
        with late_head(paged, paged.out(0, store, slot), *([] if generations else [pool])):
            paged.engine._recover(jax.errors.JaxRuntimeError("device lost"))
            assert paged.pager._copies._pools[0].id == pool.id
        held = ctypes.string_at(store.base + store.offset(slot), PAGE_BYTES)
        assert held == (bytes(PAGE_BYTES) if generations else old)
        # And the next one's moves are refused, for this pool is at the address by then.
        paged.ask(paged.out(0, store, slot))
        paged.run()
        assert list(paged.planner.ends().values()) == [generations]


@pytest.mark.parametrize("generations", [True, False], ids=["checked", "ids only"])
def test_a_head_late_for_its_segment_writes_nothing_into_the_next_one(tmp_path, generations):
    """An engine ends, others have the ids of its pool and its segment, and then a head of it runs.
    By ids alone it copies a page into their memory."""
    store = HostStore(2 * PAGE_BYTES, PAGE_BYTES, PAGE_TOKENS)
    theirs = np.zeros(2 * PAGE_BYTES, np.uint8)
    with paged_engine(tmp_path, [store]) as paged, contextlib.ExitStack() as heirs:
        old, kv = paged.content[paged.pages[0].id].tobytes(), paged.engine._runner.kv
        ours = paged.pager._copies._pools[0], paged.pager._tiers[0].segment._segments[0]
        (slot,) = store.allocate(1)
        shape = jax.ShapeDtypeStruct(kv.shape, kv.dtype)
        with late_head(paged, paged.out(0, store, slot), *(() if generations else ours)):
            paged.engine.close()
            next_ones = [heirs.enter_context(MovePool.of(shape)),
                         heirs.enter_context(Segment(theirs))]
            assert [one.id for one in next_ones] == [one.id for one in ours]
        assert theirs[:PAGE_BYTES].tobytes() == (bytes(PAGE_BYTES) if generations else old)
