"""The loop under a virtual clock: what takes how long, what is deterministic, what is refused."""

from __future__ import annotations

import dataclasses

import pytest

from aqua_jax.bench.service import gaps
from aqua_jax.bench.traces import TraceRequest
from aqua_jax.errors import RequestError, SimulationError
from aqua_jax.paging.moves import Move
from aqua_jax.paging.pages import PageHandle, PagePool
from aqua_jax.paging.prefix import PrefixCache
from aqua_jax.scheduling.plan import Chunk, Plan
from aqua_jax.scheduling.policies import FirstComeFirstServed
from aqua_jax.scheduling.scheduler import Scheduler, SchedulerConfig
from aqua_jax.scheduling.sequence import Sequence
from aqua_jax.simulation.cost import Line
from aqua_jax.simulation.links import CopyQueue, Link
from aqua_jax.simulation.loads import draw_lengths, sharegpt_like, timed
from aqua_jax.simulation.simulator import Outcome, Simulator, prompt_of
from aqua_jax.simulation.stores import SlotStore
from aqua_jax.simulation.work import Work, work_of

STEP = Line(1.0)  # every step takes a second


def scheduler(pages: int = 100, seqs: int = 8, budget: int = 64, prefix: bool = False) -> Scheduler:
    pool = PagePool(pages, 4)
    config = SchedulerConfig(seqs, budget, pages * 4)
    return Scheduler(config, FirstComeFirstServed(), pool, PrefixCache(pool) if prefix else None)


def simulate(requests: list[TraceRequest], cost: Line = STEP, host_s: float = 0.0) -> Outcome:
    return Simulator(scheduler(), cost, requests, host_s=host_s).run()


def test_a_request_alone() -> None:
    outcome = simulate([TraceRequest(0.0, 10, 4)])
    assert outcome.run.served[0].tokens == [1.0, 2.0, 3.0, 4.0]
    assert outcome.steps == 4 and outcome.device_s == outcome.end_s == 4.0
    assert outcome.counters.tokens == 10 + 3


def test_an_end_that_nobody_foresaw_is_found_a_step_late() -> None:
    requests = [TraceRequest(0.0, 10, 3)]
    outcome = Simulator(scheduler(), STEP, requests, max_tokens=[9]).run()
    assert outcome.run.served[0].tokens == [1.0, 2.0, 3.0]
    assert outcome.steps == 4, "the step after the last token was dispatched before it came"


def test_long_prompts_take_several_steps() -> None:
    outcome = simulate([TraceRequest(0.0, 130, 2)])  # 64 + 64 + 2
    assert outcome.run.served[0].tokens == [3.0, 4.0]


def test_an_idle_machine_waits_for_arrivals() -> None:
    outcome = simulate([TraceRequest(0.0, 5, 1), TraceRequest(10.5, 5, 2)])
    assert [one.tokens for one in outcome.run.served] == [[1.0], [11.5, 12.5]]
    assert outcome.device_s == 3.0


def test_who_comes_during_a_step_waits_for_the_one_that_is_dispatched() -> None:
    # At 0.5 the steps to 1.0 and to 2.0 are dispatched: the newcomer is in the third.
    outcome = simulate([TraceRequest(0.0, 5, 8), TraceRequest(0.5, 5, 2)])
    assert outcome.run.served[1].tokens == [3.0, 4.0]


def test_the_host_hides_behind_the_step_unless_it_takes_longer() -> None:
    hidden = simulate([TraceRequest(0.0, 5, 6)], host_s=0.25)
    assert hidden.run.served[0].tokens == [1.25, 2.25, 3.25, 4.25, 5.25, 6.25]
    slow = simulate([TraceRequest(0.0, 5, 6)], host_s=3.0)
    assert gaps(slow.run.served[0])[-1] == 3.0


def test_costs_by_work() -> None:
    line = Line(1.0, prefill_token_s=0.1, decode_s=0.01, decode_context_s=0.001)
    outcome = simulate([TraceRequest(0.0, 10, 3)], line)
    # The prompt's 10 tokens, then decodes that see 11 and 12 keys.
    assert gaps(outcome.run.served[0]) == pytest.approx([1.021, 1.022])
    assert outcome.run.served[0].tokens[0] == pytest.approx(2.0)


def test_work_of_a_plan() -> None:
    sequence = Sequence(0, "0", [1] * 20, 30)
    move = Move(PageHandle(0, 1), SlotStore("host", 1, 800), None, 2, 3, True)  # type: ignore[arg-type]
    plan = Plan(
        0, (Chunk(sequence, 8, 3, False), Chunk(sequence, 19, 1, True)), (), (), 4, (move,)
    )
    assert work_of(plan, page_tokens=4) == Work(
        prefill_tokens=3, decodes=1, decode_context=20, prefill_context=9 + 10 + 11,
        prefill_reads=11, sampled=1, moved_bytes=600,
    )


def test_everything_ends_and_everything_comes_back() -> None:
    requests = timed(sharegpt_like(60, 3), "gamma", 4.0, 0.5, 3, 3)
    own = [dataclasses.replace(one, prompt=min(one.prompt, 100), output=min(one.output, 100))
           for one in requests]
    one = scheduler(pages=80)
    outcome = Simulator(one, Line(0.01, 1e-4, 1e-4), own).run()
    assert [len(served.tokens) for served in outcome.run.served] == [r.output for r in own]
    assert outcome.counters.preemptions > 0, "the pool was to be too small"
    assert one.pool.in_use == 0 and one.num_live == 0
    for served in outcome.run.served:
        assert served.tokens == sorted(served.tokens) and served.tokens[0] > served.due
    assert outcome.run.samples[-1].live == 0


def test_equal_seeds_give_equal_runs() -> None:
    def tokens(seed: int) -> list[list[float]]:
        requests = timed(sharegpt_like(30, seed), "poisson", 5.0, 1.0, 1, seed)
        short = [dataclasses.replace(r, prompt=r.prompt % 90 + 1, output=r.output % 60 + 1)
                 for r in requests]
        run = Simulator(scheduler(pages=60), Line(0.01, 1e-4, 1e-4), short).run().run
        return [one.tokens for one in run.served]

    assert tokens(1) == tokens(1)
    assert tokens(1) != tokens(2)


def test_prompts_share_what_their_blocks_share() -> None:
    a = prompt_of(TraceRequest(0.0, 1100, 1, blocks=(7, 8)), 0)
    b = prompt_of(TraceRequest(0.0, 1500, 1, blocks=(7, 9)), 1)
    assert len(a) == 1100 and len(b) == 1500
    assert a[:512] == b[:512] and not set(a[512:]) & set(b[512:])
    assert len(set(a)) == len(a)


def test_shared_blocks_are_computed_once_with_a_prefix_cache() -> None:
    requests = [TraceRequest(0.0, 600, 2, blocks=(1,)), TraceRequest(50.0, 600, 2, blocks=(1,))]
    outcome = Simulator(scheduler(pages=400, prefix=True), STEP, requests).run()
    assert outcome.counters.tokens == 2 * (600 + 1) - 512


def test_what_can_never_be_served_is_refused() -> None:
    with pytest.raises(RequestError, match="max_tokens"):
        simulate([TraceRequest(0.0, 300, 200)])


class Stuck:
    """A scheduler that never plans anything."""

    def __init__(self) -> None:
        self.pool, self.counters, self.num_live = PagePool(1, 1), scheduler().counters, 0
        self.num_running = 0

    def add(self, sequence: Sequence) -> None:
        self.num_live += 1

    def plan(self, now: float) -> None:
        return None

    def accept(self, sequence: Sequence, token: int) -> None:
        raise AssertionError

    finish = plan  # type: ignore[assignment]


def test_a_dead_end_is_an_error() -> None:
    with pytest.raises(SimulationError, match="1 sequences are live at 2 s"):
        Simulator(Stuck(), STEP, [TraceRequest(2.0, 1, 1)]).run()  # type: ignore[arg-type]


def moves(count: int, inward: bool, store: SlotStore) -> list[Move]:
    slots = store.allocate(count)
    assert slots is not None
    return [Move(PageHandle(i, 1), store, slot, 0, 4, inward) for i, slot in enumerate(slots)]


@pytest.mark.parametrize("duplex", [True, False])
def test_moves_of_a_link_go_one_after_another(duplex: bool) -> None:
    store = SlotStore("host", 10, 1000)
    queue = CopyQueue([Link("host", 10_000, 1000.0, 0.5, duplex)], page_tokens=4)
    out, back = moves(2, False, store), moves(1, True, store)
    queue.hand_over([*out, *back], 10.0)
    ends = [11.5, 13.0, 11.5] if duplex else [11.5, 13.0, 14.5]
    assert queue.next_end() == 11.5 and queue.last_end() == max(ends) and len(queue) == 3
    assert queue.ended(11.4) == []
    assert set(queue.ended(11.5)) == ({out[0], back[0]} if duplex else {out[0]})
    later = moves(1, False, store)
    queue.hand_over(later, 12.0)  # behind those under way
    assert queue.last_end() == (14.5 if duplex else 16.0)
    assert queue.ended(99.0)[-1] is later[0] and len(queue) == 0
    assert (queue.bytes_out, queue.bytes_in, queue.busy_s) == (3000, 1000, 6.0)


def test_lengths_are_drawn_as_said() -> None:
    lengths = sharegpt_like(20_000, 0)
    prompts, outputs = ([one[index] for one in lengths] for index in (0, 1))
    assert min(prompts + outputs) >= 1 and max(prompts + outputs) == 2048
    # Cutting at 2,048 tokens takes a little off the means.
    assert 161.31 * 0.93 < sum(prompts) / len(prompts) < 161.31 * 1.03
    assert 337.99 * 0.88 < sum(outputs) / len(outputs) < 337.99 * 1.03
    assert sharegpt_like(50, 4) == sharegpt_like(50, 4) != sharegpt_like(50, 5)
    known = [TraceRequest(0.0, 3, 4), TraceRequest(1.0, 5, 6)]
    assert set(draw_lengths(known, 40, 0)) == {(3, 4), (5, 6)}
