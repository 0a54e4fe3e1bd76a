"""A real engine whose steps carry moves that a test wrote, and a planner that notes their ends."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from aqua_jax.config import SamplingParams
from aqua_jax.engine.engine import Engine
from aqua_jax.engine.pager import Copy, OwnedStore, Pager
from aqua_jax.engine.programs import Programs
from aqua_jax.engine.runner import Runner
from aqua_jax.ops import moves as copy_queue
from aqua_jax.paging.moves import Move, Store
from aqua_jax.paging.pages import PageHandle
from aqua_jax.scheduling.plan import Plan
from tests.engine.driving import tiny_engine

PAGE_TOKENS = 16
PAGE_BYTES = 2 * 2 * PAGE_TOKENS * 2 * 16 * 4  # tests/tiny.py's model in float32
MAX_MOVES = 24


class Planner:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.outstanding = 0
        self.shifting = 0
        self.ended: list[tuple[Move, bool, int | None]] = []
        self.responses: collections.deque[Callable[[Copy], None]] = collections.deque()

    def finished(self, move: Move, ok: bool, checksum: int | None) -> None:
        self.ended.append((move, ok, checksum))
        self.outstanding -= 1

    def respond(self, copy: Copy, climb: int = 0) -> None:
        if self.responses:
            self.responses.popleft()(copy)

    def abandon(self) -> None:
        self.outstanding = 0

    def ends(self) -> dict[Move, bool]:
        """Each ended move, and whether it arrived; a move ends once."""
        result = {move: ok for move, ok, _ in self.ended}
        assert len(result) == len(self.ended)
        return result


@dataclasses.dataclass
class Paged:
    """The engine, and pages of its pool that no sequence uses, full of random numbers."""

    engine: Engine
    pager: Pager
    planner: Planner
    pages: list[PageHandle]
    queue: collections.deque[tuple[Move, ...]]  # of the plans to come

    @property
    def content(self) -> np.ndarray:
        """The pool as it is now: [P, L, 2, page_tokens, K, D]."""
        self.engine._runner.fence()
        return np.array(self.engine._runner.kv)

    def ask(self, *moves: Move) -> None:
        """Lets the next plan carry these."""
        self.queue.append(moves)
        self.planner.outstanding += len(moves)

    def run(self) -> None:
        """Steps until nothing is left to do."""
        while self.queue or self.engine.has_unfinished():
            self.engine.step()

    def out(self, page: int, store: Store, slot, start: int = 0, count: int = PAGE_TOKENS) -> Move:
        return Move(self.pages[page], store, slot, start, count, inward=False)

    def back(
        self, page: int, store: Store, slot, start: int = 0, count: int = PAGE_TOKENS,
        checksum: int | None = None,
    ) -> Move:
        return Move(self.pages[page], store, slot, start, count, inward=True, checksum=checksum)

    def add(self, name: str, tokens: int = 12, length: int = 9) -> None:
        """A request to have steps for moves to ride on."""
        params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        self.engine.add_request(name, list(range(3, 3 + length)), params)


@contextlib.contextmanager
def paged_engine(
    folder: pathlib.Path, stores: list[OwnedStore], *, verify: bool = False, spare: int = 20,
    warm_up: str = "minimal", **settings: object,
) -> Iterator[Paged]:
    """An engine with a pager over `stores`; `spare` pages of its pool are the test's own."""
    with tiny_engine(folder, **settings) as engine:
        runner = engine._runner
        spec = dataclasses.replace(runner._spec, max_moves=MAX_MOVES)
        params = dict(zip(runner.programs.names, runner._params, strict=True))
        shards, sharding = runner.programs.shards, runner.kv.sharding
        random = np.random.default_rng(1).standard_normal(runner.kv.shape, np.float32)
        programs = Programs(runner.programs._graphdef, params, runner.kv, spec, shards=shards)
        programs.warm_up(warm_up)
        planner = Planner()
        devices = 1 if shards is None else shards.size
        pager = Pager(planner, stores, runner.kv, verify=verify, devices=devices)
        engine._runner = Runner(
            programs, params, runner._make_kv,
            jnp.array(random, runner.kv.dtype, device=sharding), spec, engine._live.lookup, pager,
        )
        engine._pager = pager
        pages = engine._pool.allocate(spare)
        assert pages is not None
        queue: collections.deque[tuple[Move, ...]] = collections.deque()
        plan = engine._scheduler.plan

        def with_moves(now: float) -> Plan | None:
            planned = plan(now)
            if not queue:
                return planned
            moves = queue.popleft()
            if planned is None:
                return Plan(0, (), (), (), 0, moves)
            return dataclasses.replace(planned, moves=moves)

        engine._scheduler.plan = with_moves
        try:
            yield Paged(engine, pager, planner, pages, queue)
        finally:
            copy_queue.set_delay(0, 0)
            jax.block_until_ready(runner.kv)
