"""What is asked for when somebody has to go, and who goes."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aqua_jax.paging.pages import PageHandle, PagePool
from aqua_jax.scheduling.fair import Fair, FairConfig
from aqua_jax.scheduling.policies import FirstComeFirstServed
from aqua_jax.scheduling.scheduler import Scheduler, SchedulerConfig
from aqua_jax.scheduling.sequence import Sequence
from aqua_jax.scheduling.slices import SliceConfig
from tests.scheduling.histories import PAGE_TOKENS, History, Machine


def test_other_newcomers_need_nothing_where_no_prompt_fits_a_step():
    history = History(
        Machine(num_pages=40, max_num_seqs=4, max_step_tokens=16, host_slots=8), Fair()
    )
    room = history.scheduler.room
    wanted = [
        room.newcomers(Sequence(0, "0", [1] * prompt, 200), -(-prompt // PAGE_TOKENS), 3)
        for prompt in (4, 8, 60)
    ]
    assert wanted == [2 * 1, 1 * 2, 0]  # others times pages
    history.close()


@given(st.lists(
    st.tuples(st.integers(1, 90), st.integers(0, 2), st.integers(1, 60), st.integers(0, 24)),
    max_size=6,
), st.sampled_from([0, 30]), st.sampled_from([1, 7, math.inf]), st.sampled_from([0, 3, 48]))
def test_growth_and_needs_are_the_pages_of_the_next_tokens(
    shapes: list[tuple[int, int, int, int]], host_slots: int, slice_steps: float, growth: int
) -> None:
    history = History(
        Machine(num_pages=99, max_num_seqs=8, max_step_tokens=16, host_slots=host_slots,
                growth_tokens=growth),
        Fair(FairConfig(SliceConfig(slice_steps))),
    )
    room, sequences, asked, soon = history.scheduler.room, [], 0, 0
    for number, (known, inflight, left, pages) in enumerate(shapes):
        one = Sequence(number, str(number), [1] * known, known + inflight + left)
        one.num_inflight, one.pages = inflight, [PageHandle(page, 1) for page in range(pages)]
        sequences.append(one)

        def pages_in(tokens: int, one: Sequence = one) -> int:
            return math.ceil(min(tokens, one.max_total_tokens - 1) / PAGE_TOKENS)

        soon += max(0, pages_in(one.total_len + 3) - pages)
        sliced = slice_steps != math.inf
        horizon = 4 if host_slots else max(growth, slice_steps if sliced else 0)
        before = pages if sliced and pages else math.ceil(one.total_len / PAGE_TOKENS)
        asked += max(0, pages_in(one.total_len + int(horizon)) - before)
    assert room.growth(sequences) == asked == sum(room.growth((one,)) for one in sequences)
    assert room.needs(sequences) == soon
    history.close()


def test_what_a_switch_costs_at_most_depends_on_whether_stores_hold_everyone():
    history = History(
        Machine(num_pages=40, max_num_seqs=4, max_step_tokens=16, host_slots=8), Fair()
    )
    room = history.scheduler.room
    copied = history.scheduler.costs.swap(100, 100)
    assert copied < 100
    assert (room.dearest(100, 8), room.dearest(100, 9)) == (copied, 25)
    history.close()


def test_no_more_go_than_must_for_the_one_who_comes_and_the_growth_of_those_who_stay():
    pool = PagePool(7, PAGE_TOKENS)
    scheduler = Scheduler(
        SchedulerConfig(4, 64, 100, growth_tokens=PAGE_TOKENS), FirstComeFirstServed(), pool
    )
    room, running = scheduler.room, []
    for number in range(2):
        one = Sequence(number, str(number), [1] * (2 * PAGE_TOKENS), 90)
        one.pages = pool.allocate(2)
        running.append(one)
    head = Sequence(2, "2", [1] * (3 * PAGE_TOKENS), 90)
    found = scheduler.holdings.find(head)
    demand, growth = scheduler.holdings.demand(head, found), room.growth([*running, head])
    assert (demand, growth, pool.available) == (3, 3, 3)
    # All there is and a page each: who goes leaves two, and needs none to grow.
    for wish, going in ((growth, 1), (growth + 1, 2), (growth + 4, 0)):
        assert room.victims(head, found, demand, running, (wish,)) == running[:going]


@pytest.mark.parametrize("slice_steps, most", [(16, 8), (2, 16)])
def test_those_who_come_back_change_places_a_few_at_a_time(slice_steps: int, most: int) -> None:
    history = History(
        Machine(num_pages=32 * 12, max_num_seqs=32, max_step_tokens=400, host_slots=2000),
        Fair(FairConfig(SliceConfig(slice_steps))),
    )
    for _ in range(64):
        history.add(8, 60)
    counters, switches = history.scheduler.counters, []
    while history.live:
        before, new = counters.switches, len(history.scheduler._new)
        history.step()
        if not new:
            switches.append(counters.switches - before)
    assert max(switches) == most
    history.close()
