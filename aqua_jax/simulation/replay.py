"""Makes the calls of a recorded run again, on a scheduler of the same size, and compares plans.

    with RecordedEngine(config) as engine:
        ...
    scheduler = build_scheduler(engine.limits, policy)
    Replay(scheduler).run(engine.recorder.events)

Events, in order (`scheduling.recording`):

  ["add", {sequence}]            a request came
  ["costs", {name: seconds}]     running means of what was measured, as of the next plan
  ["plan", now, digest]          a plan was asked for; "" is None
  ["accept", seq_id]             a token had come
  ["finish" or "abort", seq_id]  a sequence ended
  ["moved", number, ok, sum]     a move had ended; numbered in the order of plans
  ["reset"]                      a step had failed
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from aqua_jax.errors import SimulationError
from aqua_jax.paging.moves import Move, Store
from aqua_jax.paging.pages import FarthestNextUse, LeastRecentlyUsed, PagePool
from aqua_jax.paging.prefix import PrefixCache
from aqua_jax.paging.residency import Residency
from aqua_jax.scheduling.cost import CostConfig, Costs
from aqua_jax.scheduling.limits import SchedulerConfig
from aqua_jax.scheduling.plan import Plan
from aqua_jax.scheduling.policies import Policy
from aqua_jax.scheduling.recording import plan_digest
from aqua_jax.scheduling.scheduler import Scheduler
from aqua_jax.scheduling.sequence import Sequence as Request
from aqua_jax.simulation.stores import SlotStore

_EVICTABLE = (FarthestNextUse, LeastRecentlyUsed)
_OWN = 1 << 40  # token ids of a request's own from here on


@dataclasses.dataclass(frozen=True)
class Replayed:
    """What a replay came to.

    Attributes:
      plans: compared, all of them equal.
      chunks: sequences' parts in them.
      moves: in them.
    """

    plans: int
    chunks: int
    moves: int


def build_scheduler(limits: dict[str, Any], policy: Policy) -> Scheduler:
    """A scheduler of the sizes that `scheduling.recording.limits_of` wrote down."""
    evictable = next(e for e in _EVICTABLE if e.__name__ == limits["evicts"])()
    pool = PagePool(limits["num_pages"], limits["page_tokens"], evictable)
    stores: list[Store] = [SlotStore(*store) for store in limits["stores"]]
    return Scheduler(
        SchedulerConfig(**limits["config"]), policy, pool,
        PrefixCache(pool) if limits["prefix_caching"] else None,
        Residency(pool, stores, verify=limits["verify"]) if stores else None,
        Costs(limits["page_tokens"], CostConfig(**limits["costs"])),
    )


class Replay:
    """One run of recorded events over a fresh scheduler."""

    def __init__(
        self, scheduler: Scheduler, observe: Callable[[Plan], None] = lambda plan: None
    ) -> None:
        """`observe` is told every plan."""
        self._scheduler = scheduler
        self._observe = observe
        self._sequences: dict[int, Request] = {}
        self._moves: list[Move] = []
        self._plans = self._chunks = 0

    def run(self, events: Sequence[Sequence[Any]]) -> Replayed:
        """Makes all calls.

        Raises:
          SimulationError: a plan differs from the recorded one; says which.
        """
        for kind, *arguments in events:
            getattr(self, f"_{kind}")(*arguments)
        return Replayed(self._plans, self._chunks, len(self._moves))

    def _add(self, about: dict[str, Any]) -> None:
        about = dict(about)
        prompt, parent = about.pop("prompt"), about.pop("parent")
        salt = bytes.fromhex(about.pop("salt"))
        number = about["seq_id"] if parent is None else parent
        if isinstance(prompt, int):
            first = _OWN + (number << 24)
            prompt = list(range(first, first + prompt))
        sequence = Request(
            tokens=list(prompt), salt=salt,
            parent=None if parent is None else self._sequences[parent], **about,
        )
        self._sequences[sequence.seq_id] = sequence
        self._scheduler.add(sequence)

    def _costs(self, measured: dict[str, float]) -> None:
        vars(self._scheduler.costs).update(measured)

    def _plan(self, now: float, digest: str) -> None:
        plan = self._scheduler.plan(now)
        found = plan_digest(plan)
        if found != digest:
            raise SimulationError(
                f"plan {self._plans} at {now} differs from the recorded one: {plan}"
            )
        self._plans += 1
        if plan is not None:
            self._chunks += len(plan.chunks)
            self._moves += plan.moves
            self._observe(plan)

    def _accept(self, seq_id: int) -> None:
        sequence = self._sequences[seq_id]
        # A token that no other sequence has at that place.
        own = _OWN + (seq_id << 24) + (1 << 23) + len(sequence.tokens)
        self._scheduler.accept(sequence, own)

    def _finish(self, seq_id: int) -> None:
        self._scheduler.finish(self._sequences.pop(seq_id))

    def _abort(self, seq_id: int) -> None:
        self._scheduler.abort(self._sequences.pop(seq_id))

    def _moved(self, number: int, ok: bool, checksum: int | None) -> None:
        residency = self._scheduler.residency
        assert residency is not None
        residency.finished(self._moves[number], ok, checksum)

    def _reset(self) -> None:
        self._scheduler.reset()
