"""What a change of turns costs where there is a store: plans that carry its copies, and bytes."""

from __future__ import annotations

import collections
from collections.abc import Hashable, Sequence
from typing import Any

import pytest

from aqua_jax.paging.moves import Move
from aqua_jax.paging.residency import Residency
from aqua_jax.scheduling.fair import Fair, FairConfig
from aqua_jax.scheduling.slices import SliceConfig
from tests.scheduling.histories import PAGE_TOKENS, History, Machine


class Watched:
    """A history whose departures and returns are matched with the plans that carry their moves."""

    def __init__(self, *, write_behind: int, slice_steps: int = 6, pages: int = 40) -> None:
        self.history = History(
            Machine(num_pages=pages, max_num_seqs=4, max_step_tokens=64, host_slots=2000,
                    write_behind=write_behind, run_ahead=1),
            Fair(FairConfig(SliceConfig(slice_steps))),
        )
        assert self.history.residency is not None
        self.residency: Residency = self.history.residency
        self.events: list[tuple[str, set[Move]]] = []  # a departure or a return, its moves
        self.plan_of: dict[Move, int] = {}
        for name in ("leave", "come_back"):
            self._watch(name)

    def _watch(self, name: str) -> None:
        original = getattr(self.residency, name)

        def call(owner: Hashable, *rest: Any) -> None:
            before = set(self.residency._moves)
            original(owner, *rest)
            self.events.append((name, set(self.residency._moves) - before))

        setattr(self.residency, name, call)

    def run(self, steps: int, sequences: int = 12) -> None:
        """So many steps, with as many sequences alive all the time."""
        for step in range(steps):
            while len(self.history.live) < sequences:
                self.history.add(10, 40)
            plan = self.history.step()
            for move in () if plan is None else plan.moves:
                self.plan_of[move] = step

    def plans(self, name: str) -> collections.Counter[int]:
        """By number of plans that its moves were handed over with, how many events there were."""
        return collections.Counter(
            len({self.plan_of[move] for move in moves if move in self.plan_of})
            for event, moves in self.events if event == name
        )

    def close(self) -> None:
        self.history.close()


@pytest.mark.parametrize("write_behind", [0, 64])
def test_a_switch_takes_two_dispatches_at_most(write_behind: int) -> None:
    """One for what leaves, one for what comes; and both ride on steps that run anyway."""
    watched = Watched(write_behind=write_behind)
    watched.run(400)
    for event in ("leave", "come_back"):
        counts = watched.plans(event)
        assert max(counts) == 1 and counts[1] > 25, counts
    watched.close()


def alone(plans: Sequence[Any]) -> int:
    """Plans of nothing but moves."""
    return sum(plan is not None and not plan.chunks for plan in plans)


def test_moves_ride_on_steps() -> None:
    watched = Watched(write_behind=64)
    plans = []
    for _ in range(12):
        watched.history.add(10, 60)
    for _ in range(300):
        plans.append(watched.history.step())
    carrying = sum(bool(plan is not None and plan.moves) for plan in plans)
    assert carrying > 50 and alone(plans) <= carrying / 20
    watched.close()


@pytest.mark.parametrize("write_behind", [0, 64])
def test_no_more_leaves_than_was_computed_and_a_page_a_switch(write_behind: int) -> None:
    watched = Watched(write_behind=write_behind)
    watched.run(400)
    computed = watched.history.scheduler.counters.tokens
    moved = watched.residency.counters
    assert moved.departures > 50 and watched.history.scheduler.counters.recomputed_tokens == 0
    assert moved.tokens_out <= computed + PAGE_TOKENS * moved.departures
    assert moved.tokens_out + moved.tokens_in <= 0.6 * moved.tokens_held
    watched.close()


def test_what_comes_next_is_fetched_ahead() -> None:
    """While the head of the queue waits for a slot and pages are to spare, its pages come."""
    watched = Watched(write_behind=64, slice_steps=12, pages=120)
    watched.run(400)
    assert watched.residency.counters.prefetched > 0
    watched.close()


def test_who_goes_next_is_copied_ahead() -> None:
    """So that places come free at once: little is left to copy when somebody gives way."""
    left = []
    for write_behind in (0, 64):
        watched = Watched(write_behind=write_behind, slice_steps=12)
        watched.run(400)
        left.append(sum(
            move.count for event, moves in watched.events if event == "leave" for move in moves
        ))
        watched.close()
    assert left[1] < left[0] / 2, left


@pytest.mark.parametrize("write_behind", [0, 64])
def test_who_causes_a_copy_pays_for_it_whenever_it_is_made(write_behind: int) -> None:
    watched = Watched(write_behind=write_behind, slice_steps=12, pages=120)
    scheduler = watched.history.scheduler
    charged, serve = 0.0, scheduler.policy.on_service

    def on_service(sequence: Any, *, tokens: int = 0, price: float = 0.0) -> None:
        nonlocal charged
        charged += price / scheduler.costs.swap(0, 1)  # of a token, one way
        serve(sequence, tokens=tokens, price=price)

    scheduler.policy.on_service = on_service  # type: ignore[method-assign]
    watched.run(400)
    moved = watched.residency.counters
    assert moved.prefetched > 0
    assert charged == pytest.approx(moved.tokens_out + moved.tokens_in, rel=0.05)
    watched.close()
