"""Histories of a scheduler whose copies take their time, and the gaps between everybody's tokens.

The device answers `run_ahead` plans late and computes nothing; a copy ends some steps after the
plan that asked for it, `SchedulerConfig.move_steps` at most. So what is measured here is time, in
steps, as a client would count it: from a request's arrival to its first token, and from one token
to the next. (Contents are checked elsewhere: `test_paging_properties`.)
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import random

from aqua_jax.paging.moves import Move
from aqua_jax.paging.pages import FarthestNextUse, LeastRecentlyUsed, PagePool
from aqua_jax.paging.prefix import PrefixCache
from aqua_jax.paging.residency import Residency
from aqua_jax.scheduling.cost import CostConfig, Costs
from aqua_jax.scheduling.plan import Plan
from aqua_jax.scheduling.policies import Policy
from aqua_jax.scheduling.scheduler import Scheduler, SchedulerConfig
from aqua_jax.scheduling.sequence import Sequence, Status
from tests.scheduling.fake_copies import host_store

PAGE_TOKENS = 4


@dataclasses.dataclass(frozen=True)
class Machine:
    """What a history runs on."""

    num_pages: int
    max_num_seqs: int
    max_step_tokens: int
    host_slots: int = 0  # 0: no store
    run_ahead: int = 0
    slowest: bool = False  # every copy takes as long as any may
    page_price: float = 1e-3  # of moving one, in decode tokens
    write_behind: int = 64
    max_moves: int = 256
    max_switches: int = 8
    growth_tokens: int = 0
    switch_share: float = 0.1  # of all time, what changing places may take
    prefix: bool = False
    farthest: bool = True
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Gap:
    """Steps that a sequence went without a token, and the greatest bound stated meanwhile."""

    sequence: Sequence
    steps: int
    bound: float
    ended_at: int


class History:
    """A scheduler in time."""

    def __init__(self, machine: Machine, policy: Policy) -> None:
        self.machine, self.policy = machine, policy
        self.rng = random.Random(machine.seed)
        self.pool = PagePool(
            machine.num_pages, PAGE_TOKENS,
            FarthestNextUse() if machine.farthest else LeastRecentlyUsed(),
        )
        stores = [host_store(machine.host_slots, PAGE_TOKENS)] if machine.host_slots else []
        self.stores = stores
        self.residency = Residency(self.pool, stores) if stores else None
        self.scheduler = Scheduler(
            SchedulerConfig(
                machine.max_num_seqs, machine.max_step_tokens, 4000,
                growth_tokens=machine.growth_tokens, max_moves=machine.max_moves,
                write_behind_pages=machine.write_behind, max_switches=machine.max_switches,
                switch_share=machine.switch_share,
            ),
            policy, self.pool, PrefixCache(self.pool) if machine.prefix else None,
            self.residency, Costs(PAGE_TOKENS, CostConfig(moved_page=machine.page_price)),
        )
        self.now = 0
        self.state_every = 1  # steps between looks at the bound
        self._stated = 0.0
        self.live: dict[Sequence, None] = {}
        self.since: dict[Sequence, int] = {}  # the last token, or the arrival
        self.bounds: dict[Sequence, float] = {}  # the greatest stated since then
        self.gaps: list[Gap] = []
        self.tokens: collections.Counter[Sequence] = collections.Counter()
        self.in_vain = 0  # times that somebody gave way before a token of its turn
        self._turn: collections.Counter[Sequence] = collections.Counter()  # tokens of it
        self._numbers = itertools.count()
        self._steps: collections.deque[Plan] = collections.deque()
        self._copies: list[tuple[int, Move]] = []  # when each ends

    def add(
        self, prompt: int | list[int], output: int, *, samples: int = 1, **fields
    ) -> list[Sequence]:
        """A request; a prompt given by its length is like no other's."""
        if isinstance(prompt, int):
            prompt = [self.rng.randrange(10**6) for _ in range(prompt)]
        request, added = next(self._numbers), list[Sequence]()
        for index in range(samples):
            sequence = Sequence(
                next(self._numbers), str(request), list(prompt), len(prompt) + output,
                arrival=float(self.now), sample_index=index, parent=added[0] if added else None,
                **fields,
            )
            self.scheduler.add(sequence)
            self.live[sequence] = None
            self.since[sequence], self.bounds[sequence] = self.now, 0.0
            added.append(sequence)
        self.state_bound()
        return added

    def state_bound(self) -> float:
        """What the scheduler promises now."""
        found = self.scheduler.waiting_bound(self.machine.run_ahead)
        bound = self._stated = 0.0 if found is None else found.steps
        for sequence in self.live:
            self.bounds[sequence] = max(self.bounds[sequence], bound)
        return bound

    def abort(self, sequence: Sequence) -> None:
        """Ends a live sequence."""
        self.scheduler.abort(sequence)
        self._forget(sequence)

    def step(self) -> Plan | None:
        """One turn of the engine's loop."""
        for due, move in self._copies:
            if due <= self.now:
                assert self.residency is not None
                ok = not move.inward or move.store.holds(move.slot)
                self.residency.finished(move, ok, None)
        self._copies = [copy for copy in self._copies if copy[0] > self.now]
        plan = self.scheduler.plan(0.01 * self.now)
        if plan is not None:
            for sequence in plan.preempted:
                self.in_vain += self._turn.pop(sequence, 0) == 0
            for chunk in plan.chunks:
                self._turn[chunk.sequence] += chunk.sample
            slowest = self.scheduler.config.move_steps
            for move in plan.moves:
                steps = slowest if self.machine.slowest else self.rng.randint(1, slowest)
                self._copies.append((self.now + steps, move))
            self.rng.shuffle(self._copies)
            if plan.chunks:
                self._steps.append(plan)
        else:
            assert self._steps or self._copies or not self.live, "nothing runs, nothing is awaited"
        self.now += 1
        if len(self._steps) > (self.machine.run_ahead if plan is not None else 0):
            self._read(self._steps.popleft())
        if self.now % self.state_every == 0:
            self.state_bound()
        return plan

    def all_gaps(self) -> list[Gap]:
        """Those that have ended, and those that haven't."""
        return self.gaps + [
            Gap(one, self.now - since, self.bounds[one], self.now)
            for one, since in self.since.items()
        ]

    def close(self) -> None:
        """Ends everything, as a test that stops half way has to; `gaps` has all then."""
        self.gaps = self.all_gaps()
        for sequence in list(self.live):
            self.abort(sequence)
        for store in self.stores:
            store.close()

    def _read(self, plan: Plan) -> None:
        for chunk in plan.chunks:
            sequence = chunk.sequence
            if not chunk.sample or sequence.status is Status.FINISHED:
                continue
            self.scheduler.accept(sequence, self.rng.randrange(10**6))
            self.tokens[sequence] += 1
            self.gaps.append(
                Gap(sequence, self.now - self.since[sequence], self.bounds[sequence], self.now)
            )
            self.since[sequence], self.bounds[sequence] = self.now, self._stated
            if len(sequence.tokens) == sequence.max_total_tokens:
                self.scheduler.finish(sequence)
                self._forget(sequence)

    def _forget(self, sequence: Sequence) -> None:
        del self.live[sequence], self.since[sequence], self.bounds[sequence]
