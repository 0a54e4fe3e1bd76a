"""The thrash guard: its budget, and that under every policy changing places takes no more time than
it may."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest

from aqua_jax.errors import ConfigError
from aqua_jax.scheduling.cost import CostConfig, Costs
from aqua_jax.scheduling.fair import Fair, FairConfig
from aqua_jax.scheduling.guard import Budget, Guard
from aqua_jax.scheduling.limits import SchedulerConfig
from aqua_jax.scheduling.policies import FirstComeFirstServed, Policy, StrictPriority
from aqua_jax.scheduling.sequence import Sequence
from aqua_jax.scheduling.slices import SliceConfig
from tests.scheduling.histories import PAGE_TOKENS, History, Machine

PREFILL = 0.25  # price of a prompt token
START = 1_000.0  # decodes that the first budget is worth
SLACK = 10_000.0  # and what it may be overdrawn by


def test_changes_of_places_are_paid_by_other_tokens():
    one = Budget(0.25)
    start = START / 4
    assert one.affords(start) and not one.affords(start + 1)
    one.spend(start)
    assert not one.affords(1)
    one.earn(40)
    assert one.affords(10) and not one.affords(10.1)
    one.spend(-5)
    assert one.affords(15)


def test_savings_have_an_end_and_buy_whatever_there_is():
    one = Budget(1.0)
    one.earn(10**9)
    assert one.left == 100_000
    assert one.affords(10**6)  # the context is as long as it is: somebody else's turn has to come
    one.spend(1)
    assert not one.affords(100_000)


def test_without_an_end_nothing_is_bounded():
    one = Budget(math.inf)
    one.spend(1e12)
    assert one.affords(1e12) and not one.bounds and not one.alarming and one.overdrawn == 0.0


def test_the_alarm_has_some_slack():
    one = Budget(0.5)
    one.spend((START + SLACK) / 2)
    assert (one.overdrawn, one.alarming) == (SLACK / 2, False)
    one.spend(1)
    assert one.alarming
    one.earn(2)
    assert not one.alarming


def guard(share: float) -> Guard:
    return Guard(share, Costs(PAGE_TOKENS, CostConfig(prefill_tokens=PREFILL)))


def test_turns_and_shortages_share_what_there_is():
    one = guard(0.2)
    turns, shortages = one.turns.left, one.shortages.left
    one.earn(160, 40)  # prompt tokens cost a quarter of the time
    assert one.turns.left + one.shortages.left == pytest.approx(turns + shortages + 20)
    assert (one.turns.rate, one.shortages.rate) == pytest.approx((0.25 / 3, 0.5 / 3))
    assert not guard(1.0).turns.bounds and not guard(1.0).shortages.bounds


def left(computed: int, price: float, swapped: bool) -> Sequence:
    """One that has given way."""
    one = Sequence(0, "0", [1] * computed, 10**6)
    one.num_computed, one.switch_price, one.swapped = computed, price, swapped
    return one


@pytest.mark.parametrize("turn", [False, True])
def test_what_is_found_in_the_prefix_cache_was_paid_for_too_much(turn: bool) -> None:
    one = guard(0.5)
    budget, other = (one.turns, one.shortages) if turn else (one.shortages, one.turns)
    sequence, before, others = left(100, 25.0, swapped=False), budget.left, other.left
    one.gave_way(sequence, turn)
    assert budget.left == before - 25
    sequence.num_computed = 60
    assert one.came_back(sequence) == 40
    assert budget.left == pytest.approx(before - 10)
    assert other.left == others
    assert (sequence.num_lost, sequence.num_dropped, sequence.num_reached) == (40, 0, 100)


def test_what_a_store_lost_is_to_be_paid() -> None:
    one = guard(0.5)
    sequence, before = left(100, 2.0, swapped=True), one.turns.left
    one.gave_way(sequence, True)
    sequence.num_computed = 60
    assert one.came_back(sequence) == 40
    assert one.turns.left == before - 2 - 40 * PREFILL


def test_newcomers_cost_nothing():
    one = guard(0.5)
    before = one.turns.left, one.shortages.left
    assert one.came_back(Sequence(0, "0", [1, 2, 3], 10)) == 0
    assert (one.turns.left, one.shortages.left) == before


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1])
def test_shares_are_checked(share):
    with pytest.raises(ConfigError) as caught:
        SchedulerConfig(1, 1, 1, switch_share=share)
    assert caught.value.field == "switch_share"


# Under a scheduler.


@dataclasses.dataclass
class Time:
    """Of a history, in decode tokens."""

    useful: float  # tokens computed for the first time
    lost: float  # the rest, and copies
    decoded: int

    @property
    def share(self) -> float:
        """Of all time, what was lost."""
        return self.lost / (self.useful + self.lost)

    def allowed(self, share: float, guard: Guard) -> float:
        """What may be lost, as the guard's text has it."""
        overdrawn = guard.turns.overdrawn + guard.shortages.overdrawn
        return share / (1 - share) * (self.useful + START) + overdrawn + 1e-6


def spend_time(history: History, steps: int, refill: Callable[[], None]) -> Time:
    """Runs so many steps; counts what they computed and copied, by looking at plans alone."""
    time, reached = Time(0.0, 0.0, 0), dict[Sequence, int]()
    page = history.scheduler.costs.page
    for _ in range(steps):
        refill()
        plan = history.step()
        if plan is None:
            continue
        time.lost += page * sum(move.count for move in plan.moves) / PAGE_TOKENS
        for chunk in plan.chunks:
            after = chunk.start + chunk.count
            new = max(0, min(chunk.count, after - reached.get(chunk.sequence, 0)))
            reached[chunk.sequence] = max(after, reached.get(chunk.sequence, 0))
            price = PREFILL if chunk.count > 1 else 1.0
            time.useful += price * new
            time.lost += PREFILL * (chunk.count - new)
            time.decoded += chunk.count == 1
    return time


def crowd(history: History, live: int, prompt: int, output: int) -> Callable[[], None]:
    """As many requests alive all the time."""
    def refill() -> None:
        while len(history.live) < live:
            history.add(prompt, output)
    return refill


SLICES: dict[str, Callable[[], Policy]] = {
    f"{steps}": lambda steps=steps: Fair(FairConfig(SliceConfig(steps)))  # type: ignore[misc]
    for steps in (1, 5, "auto")
}


@pytest.mark.parametrize("host_slots, page_price", [(0, 1.0), (4000, 2.0)])
@pytest.mark.parametrize("slices", SLICES)
def test_turns_take_no_more_than_their_share(
    slices: str, host_slots: int, page_price: float
) -> None:
    def run(share: float) -> Time:
        history = History(Machine(
            num_pages=400, max_num_seqs=8, max_step_tokens=256, growth_tokens=48,
            host_slots=host_slots, page_price=page_price, write_behind=0, switch_share=share,
        ), SLICES[slices]())
        history.state_every = 10**9
        time = spend_time(history, 2000, crowd(history, 24, 100, 200))
        guard = history.scheduler.guard
        assert history.scheduler.counters.switches > 5
        assert guard.turns.overdrawn == 0.0 and not guard.shortages.alarming
        if share < 1:
            assert time.lost <= time.allowed(share, guard)
        history.close()
        return time

    bounded, free = run(0.15), run(1.0)
    # The load is one that thrashes: with nobody to stop them, turns are most of the work.
    assert free.share > 0.5 and free.lost > 3 * bounded.lost
    assert bounded.useful > 0.95 * free.useful


def stream(history: History) -> Callable[[], None]:
    """Background work all the time, and urgent requests in waves."""
    def refill() -> None:
        for _ in range(8 - sum(1 for one in history.live if one.priority)):
            history.add(100, 250, priority=1000)  # levels that age doesn't make up for
        if history.now % 20 == 0:
            for _ in range(6 - sum(1 for one in history.live if not one.priority)):
                history.add(10, 10)
    return refill


@pytest.mark.parametrize("growth_tokens", [0, 48])
@pytest.mark.parametrize("host_slots", [0, 4000])
@pytest.mark.parametrize("policy", [FirstComeFirstServed, StrictPriority])
def test_neither_shortages_nor_urgent_requests_take_more_than_their_share(
    policy: Callable[[], Policy], host_slots: int, growth_tokens: int
) -> None:
    def run(share: float) -> Time:
        history = History(Machine(
            num_pages=400, max_num_seqs=8, max_step_tokens=256, growth_tokens=growth_tokens,
            host_slots=host_slots, page_price=0.5, write_behind=0, switch_share=share,
        ), policy())
        urgent = policy is StrictPriority
        refill = stream(history) if urgent else crowd(history, 24, 100, 700)
        time, guard = spend_time(history, 4000, refill), history.scheduler.guard
        if share < 1:
            assert time.lost <= time.allowed(share, guard)
            # One round of the pool beyond the slack, when everybody has to go at once.
            most = SLACK * guard.shortages.rate + 400 * PAGE_TOKENS * PREFILL
            assert guard.shortages.overdrawn <= most
            assert guard.turns.overdrawn <= SLACK * guard.turns.rate
        history.close()
        return time

    bounded, free = run(0.03), run(1.0)
    assert free.lost > 1.8 * bounded.lost
    assert bounded.useful > 0.5 * free.useful


def test_recomputing_after_a_failed_step_is_nobodys_change_of_places() -> None:
    history = History(Machine(num_pages=40, max_num_seqs=4, max_step_tokens=64), Fair())
    for _ in range(4):
        history.add(20, 20)
    for _ in range(5):
        history.step()
    guard = history.scheduler.guard
    before = guard.turns.left, guard.shortages.left
    history.scheduler.reset()
    assert history.scheduler.num_running == 0
    assert (guard.turns.left, guard.shortages.left) == before
    history.close()
