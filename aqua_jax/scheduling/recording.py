"""What went into a scheduler and what came out, so that the same can be done again elsewhere.

A scheduler is a function of the calls made to it: requests, clock readings, tokens, ends of moves,
and what steps and copies were measured to take. `Recorder` writes the calls of a live one down,
with a digest of every plan; `simulation.replay` makes them again and compares. The tokens'
values are left out: they matter for nothing but shared prefixes, where each request's are its own
unless prompts were.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from hashlib import blake2b
from typing import Any

from aqua_jax.paging.moves import Move
from aqua_jax.scheduling.plan import Plan
from aqua_jax.scheduling.scheduler import Scheduler
from aqua_jax.scheduling.sequence import Sequence

_DIGEST_BYTES = 8
# Of a sequence; what else it is made of is in `prompt`.
_FIELDS = (
    "seq_id", "request_id", "max_total_tokens", "arrival", "sample_index", "priority", "user",
    "weight", "no_prefix_read",
)


def plan_digest(plan: Plan | None, tables: bool = True) -> str:
    """Equal for equal decisions: who runs what, who gives way, what is copied and moved where.

    Args:
      plan: just made; None: nothing to do.
      tables: the page tables of everyone who runs count as well.
    """
    if plan is None:
        return ""
    what: list[Any] = [plan.step_id, plan.num_tokens, plan.copies]
    what += [[sequence.seq_id for sequence in plan.preempted]]
    for chunk in plan.chunks:
        sequence = chunk.sequence
        what.append((sequence.seq_id, sequence.slot, chunk.start, chunk.count, chunk.sample))
        if tables:
            what.append([page.id for page in sequence.pages])
    what += [
        (move.page.id, move.store.name, move.slot.id, move.start, move.count, move.inward)
        for move in plan.moves
    ]
    return blake2b(repr(what).encode(), digest_size=_DIGEST_BYTES).hexdigest()


class Recorder:
    """Writes down the calls of one scheduler, from when it is attached on.

    Attributes:
      events: lists that JSON can hold, in order. See `replay` for their forms.
    """

    def __init__(self, scheduler: Scheduler, *, prompts: bool = False) -> None:
        """
        Args:
          scheduler: without live sequences. Its methods are wrapped on this object.
          prompts: token ids of prompts are kept; without them only their lengths.
        """
        self.events: list[list[Any]] = []
        self._prompts = prompts
        self._scheduler = scheduler
        self._costs: dict[str, float] = {}
        self._moves: dict[Move, int] = {}  # planned and not finished, by their number
        self._num_moves = 0
        self._wrap(scheduler, "add", self._added)
        self._wrap(scheduler, "accept", lambda one, token: self._note("accept", one.seq_id))
        self._wrap(scheduler, "finish", lambda one: self._note("finish", one.seq_id))
        self._wrap(scheduler, "abort", lambda one: self._note("abort", one.seq_id))
        self._wrap(scheduler, "reset", lambda: self._note("reset"))
        if scheduler.residency is not None:
            self._wrap(scheduler.residency, "finished", self._finished)
        plan = scheduler.plan
        scheduler.plan = lambda now: self._planned(plan, now)  # type: ignore[method-assign]

    def _wrap(self, owner: Any, name: str, note: Callable[..., None]) -> None:
        call = getattr(owner, name)

        def wrapped(*arguments: Any, **named: Any) -> Any:
            note(*arguments, **named)
            return call(*arguments, **named)

        setattr(owner, name, wrapped)

    def _note(self, *event: Any) -> None:
        self.events.append(list(event))

    def _added(self, sequence: Sequence) -> None:
        about = {name: getattr(sequence, name) for name in _FIELDS}
        about["prompt"] = list(sequence.tokens) if self._prompts else sequence.prompt_len
        about["salt"] = sequence.salt.hex()
        about["parent"] = None if sequence.parent is None else sequence.parent.seq_id
        self._note("add", about)

    def _planned(self, plan: Callable[[float], Plan | None], now: float) -> Plan | None:
        measured = {
            name: value for name, value in vars(self._scheduler.costs).items()
            if isinstance(value, float) and value != self._costs.get(name)
        }
        if measured:
            self._costs |= measured
            self._note("costs", measured)
        made = plan(now)
        if made is not None and made.holds:  # every step is to be planned
            made = dataclasses.replace(made, holds=0)
        self._note("plan", now, plan_digest(made))
        for move in () if made is None else made.moves:
            self._moves[move] = self._num_moves
            self._num_moves += 1
        return made

    def _finished(self, move: Move, ok: bool, checksum: int | None = None) -> None:
        self._note("moved", self._moves.pop(move), ok, checksum)


def limits_of(scheduler: Scheduler) -> dict[str, Any]:
    """What a scheduler was built from, for JSON: limits, pool, stores; its policy is the caller's
    to name."""
    stores = () if scheduler.residency is None else scheduler.residency.tiers.stores
    costs = scheduler.costs.config
    assert not any(math.isinf(value) for value in vars(costs).values())
    return {
        "config": dataclasses.asdict(scheduler.config),
        "num_pages": scheduler.pool.num_pages,
        "page_tokens": scheduler.pool.page_tokens,
        # Which cached page is lost first is the pool's own affair, but plans depend on it.
        "evicts": type(vars(scheduler.pool)["_evictable"]).__name__,
        "prefix_caching": scheduler.prefix is not None,
        "stores": [[s.name, s.capacity, s.slot_bytes] for s in stores],
        "verify": scheduler.residency is not None and scheduler.residency.verify,
        "costs": dataclasses.asdict(costs),
    }
