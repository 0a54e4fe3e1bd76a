"""What the scheduler promises, one promise a test, on the device that checks every read."""

from __future__ import annotations

import random

import pytest

from aqua_jax.errors import ConfigError, RequestError, SequenceStateError
from aqua_jax.paging.pages import PagePool
from aqua_jax.paging.prefix import PrefixCache
from aqua_jax.scheduling.policies import FirstComeFirstServed
from aqua_jax.scheduling.scheduler import Scheduler, SchedulerConfig
from aqua_jax.scheduling.sequence import Sequence, Status
from tests.scheduling.fake_device import FakeEngine


def make_engine(
    num_pages=32, page_tokens=4, max_num_seqs=4, max_step_tokens=64, prefix=True, run_ahead=1,
    **config,
) -> FakeEngine:
    pool = PagePool(num_pages, page_tokens)
    limits = {"max_model_len": 1000, "growth_tokens": 0, **config}
    scheduler = Scheduler(
        SchedulerConfig(max_num_seqs, max_step_tokens, **limits), FirstComeFirstServed(), pool,
        PrefixCache(pool) if prefix else None,
    )
    return FakeEngine(scheduler, random.Random(0), run_ahead)


_IDS = iter(range(10**9))


def sequence(prompt, output, **fields) -> Sequence:
    """`prompt` is a list of tokens or a length (then its tokens are like no other's)."""
    number = next(_IDS)
    tokens = [number * 1000 + i for i in range(prompt)] if isinstance(prompt, int) else prompt
    return Sequence(number, str(number), list(tokens), len(tokens) + output, **fields)


def add(engine, *sequences, stops=False):
    for one in sequences:
        engine.add(one, stops)


def counts(plan):
    return {chunk.sequence.seq_id: chunk.count for chunk in plan.chunks}


def run(engine):
    while engine.scheduler.num_live:
        in_flight = len(engine.device)
        assert engine.step() is not None or in_flight, "livelock"
    engine.drain()
    assert engine.scheduler.pool.in_use == 0


def test_a_prompt_is_cut_into_chunks_and_sampled_at_its_end():
    engine = make_engine(max_step_tokens=8)
    one = sequence(20, 2)
    add(engine, one)
    plans = [engine.step() for _ in range(3)]
    chunks = [plan.chunks[0] for plan in plans]
    assert [(c.start, c.count, c.sample) for c in chunks] == [
        (0, 8, False), (8, 8, False), (16, 4, True)
    ]
    assert [plan.step_id for plan in plans] == [0, 1, 2]
    assert one.num_inflight == 1  # planned, not read: one step ahead
    run(engine)


def test_a_chunk_can_be_limited_below_the_step():
    engine = make_engine(max_step_tokens=16, max_chunk_tokens=5)
    first, second = sequence(12, 1), sequence(12, 1)
    add(engine, first, second)
    assert counts(engine.step()) == {first.seq_id: 5, second.seq_id: 5}
    run(engine)


@pytest.mark.parametrize("depth", [0, 1, 2, 5])
def test_decodes_run_ahead_of_their_tokens_to_any_depth(depth):
    engine = make_engine(run_ahead=depth)
    one = sequence(3, 9)
    add(engine, one)
    ahead = 0
    while engine.scheduler.num_live:
        engine.step()
        ahead = max(ahead, one.num_inflight)
    assert ahead == depth
    assert engine.ended == {one: "length"}


def test_a_known_length_stop_is_not_overrun():
    engine = make_engine(run_ahead=3)
    add(engine, sequence(3, 2))
    assert engine.step() is not None
    assert engine.step() is not None
    assert engine.scheduler.plan(0.0) is None  # both tokens in flight, no third wanted
    run(engine)


def test_prompts_leave_room_for_every_decode():
    engine = make_engine(max_num_seqs=4, max_step_tokens=6)
    long = sequence(60, 1, arrival=0.0)
    decodes = [sequence(1, 40, arrival=1.0 + i) for i in range(3)]
    add(engine, *decodes)
    engine.step()
    add(engine, long)  # first in order, and it could use every token of each step
    while long.pending > 1 and long.status is not Status.FINISHED:
        plan = counts(engine.step())
        assert all(plan[one.seq_id] == 1 for one in decodes)
        assert plan[long.seq_id] == 3
        if long.num_computed + 3 >= 60:
            break
    run(engine)


def test_nobody_overtakes_a_head_that_does_not_fit():
    engine = make_engine(num_pages=8, prefix=False)
    holder, head, small = sequence(16, 8), sequence(20, 1), sequence(2, 1)
    add(engine, holder)
    engine.step()
    add(engine, head, small)
    while holder.status is not Status.FINISHED:
        engine.step()
        if holder.status is Status.RUNNING:
            assert head.status is small.status is Status.WAITING
    run(engine)


def test_the_latest_arrival_gives_way_and_comes_back_in_its_place():
    engine = make_engine(num_pages=6, max_num_seqs=2, run_ahead=2)
    old, young, later = sequence(8, 10), sequence(8, 6), sequence(1, 1)
    add(engine, old, young, later)
    preempted = []
    while young.preemptions == 0:
        plan = engine.step()
        preempted += plan.preempted
    assert preempted == [young]
    assert (young.status, young.pages, young.slot, young.num_computed) == (
        Status.WAITING, [], -1, 0
    )
    assert old.preemptions == 0
    assert engine.scheduler.policy.head(0.0) is young
    assert later.status is Status.WAITING
    run(engine)
    assert engine.scheduler.counters.preemptions >= 1


def test_a_preempted_sequence_waits_for_its_tokens_in_flight():
    engine = make_engine(num_pages=6, max_num_seqs=2, run_ahead=2)
    old, young = sequence(8, 10), sequence(8, 6)
    add(engine, old, young)
    while young.preemptions == 0:
        engine.step()
    assert young.num_inflight > 0
    engine.scheduler.finish(old)  # now everything fits
    engine.ended[old] = "abort"
    assert engine.scheduler.plan(0.0) is None
    engine.drain()
    assert young.num_inflight == 0
    assert engine.step().chunks[0].sequence is young
    run(engine)


def test_no_one_gives_way_for_a_page_that_is_about_to_come_back():
    engine = make_engine(num_pages=6, max_num_seqs=2, prefix=False)
    ending, growing = sequence(16, 1), sequence(8, 6)
    add(engine, ending, growing)
    engine.step()
    assert ending.complete
    assert engine.step() is None  # no page left, but `ending` only waits for its last token
    run(engine)
    assert engine.scheduler.counters.preemptions == 0


def test_nobody_is_admitted_in_a_step_that_preempts():
    engine = make_engine(num_pages=7, max_num_seqs=3, prefix=False)
    add(engine, sequence(8, 12), sequence(12, 8), sequence(1, 1))
    while engine.scheduler.counters.preemptions == 0:
        before = {s for s in engine.scheduler._live if s.status is Status.WAITING}
        plan = engine.step()
    assert not before & {chunk.sequence for chunk in plan.chunks}
    run(engine)


def test_room_to_grow_is_left_unless_it_can_never_be_used():
    engine = make_engine(num_pages=8, growth_tokens=8)
    first, second = sequence(8, 8), sequence(8, 8)
    add(engine, first, second)
    engine.step()  # 2 + 2 pages and 2 x 2 to grow: both fit exactly
    assert engine.scheduler.num_running == 2
    run(engine)
    engine = make_engine(num_pages=7, growth_tokens=8)
    add(engine, first := sequence(8, 8), sequence(8, 8))
    engine.step()
    assert engine.scheduler.num_running == 1
    assert first.status is Status.RUNNING
    run(engine)
    assert engine.scheduler.counters.preemptions == 0
    engine = make_engine(num_pages=7, growth_tokens=8)
    add(engine, sequence(8, 8), sequence(8, 1))  # the second asks for no more than it has
    engine.step()
    assert engine.scheduler.num_running == 2
    run(engine)


def test_a_prefix_is_found_again_up_to_the_last_token():
    engine = make_engine()
    prompt = list(range(100, 112))
    first, second = sequence(prompt, 1), sequence(prompt, 1)
    add(engine, first)
    run(engine)
    add(engine, second)
    plan = engine.step()
    assert counts(plan) == {second.seq_id: 4}  # 12 tokens are 3 pages; one token must be computed
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 8)
    assert engine.scheduler.prefix.counters.hit == 8
    assert engine.scheduler.prefix.counters.queried == 24
    run(engine)


def test_answers_are_found_again_too():
    engine = make_engine()
    first = sequence(list(range(6)), 6)
    add(engine, first)
    run(engine)
    second = sequence([*first.tokens, 1, 2, 3], 1)
    add(engine, second)
    engine.step()
    # 12 tokens are known, but the KV of the last one was never computed: 2 pages of 4.
    assert second.num_cached_tokens == 8
    run(engine)


def test_a_page_is_not_read_by_the_step_that_writes_it():
    engine = make_engine()
    prompt = list(range(100, 112))
    first, second, third = (sequence(prompt, 1) for _ in range(3))
    add(engine, first, second)
    assert counts(engine.step()) == {first.seq_id: 12, second.seq_id: 12}
    add(engine, third)
    assert counts(engine.step()) == {third.seq_id: 4}  # dispatched earlier: fine
    run(engine)


def test_prefix_reads_can_be_declined_and_salts_keep_apart():
    engine = make_engine()
    prompt = list(range(100, 112))
    add(engine, sequence(prompt, 1))
    run(engine)
    whole = sequence(prompt, 1, no_prefix_read=True)
    other = sequence(prompt, 1, salt=b"adapter")
    add(engine, whole, other)
    assert counts(engine.step()) == {whole.seq_id: 12, other.seq_id: 12}
    run(engine)


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize(
    "prompt_len, shared, copied", [(1, 0, 0), (4, 0, 1), (5, 1, 0), (6, 1, 1), (9, 2, 0)]
)
def test_forks_share_whole_pages_and_copy_the_partial_one(prefix, prompt_len, shared, copied):
    engine = make_engine(prefix=prefix, max_num_seqs=3)
    parent = sequence(prompt_len, 3)
    forks = [
        sequence(parent.tokens, 3, parent=parent, sample_index=1 + i) for i in range(2)
    ]
    add(engine, parent, *forks)
    first = engine.step()
    if prompt_len > 1:
        assert counts(first) == {parent.seq_id: prompt_len}
        plan = engine.step()
        assert counts(plan) == {parent.seq_id: 1, forks[0].seq_id: 1, forks[1].seq_id: 1}
        assert len(plan.copies) == 2 * copied
        assert len({target for _, target in plan.copies}) == len(plan.copies)
    for fork in forks:
        assert fork.pages[:shared] == parent.pages[:shared]
        assert fork.pages[shared] != parent.pages[shared]
        assert fork.num_cached_tokens == 0
    run(engine)
    assert len({tuple(one.tokens) for one in [parent, *forks]}) > 1


def test_a_fork_that_awaits_its_parent_blocks_nobody():
    engine = make_engine(max_step_tokens=4, page_tokens=4)
    parent = sequence(30, 1, arrival=0.0)
    fork = sequence(parent.tokens, 1, parent=parent, arrival=0.0, sample_index=1)
    add(engine, parent)
    engine.step()
    other = sequence(1, 1, arrival=1.0)
    add(engine, fork, other)
    assert engine.scheduler.policy.head(0.0) is other
    assert engine.scheduler.num_waiting == 2
    run(engine)
    assert engine.scheduler.counters.tokens == 30 + 1 + 1


def test_a_fork_outlives_its_parent():
    for end in ("before", "during"):
        engine = make_engine(max_step_tokens=4)
        parent = sequence(10, 4)
        fork = sequence(parent.tokens, 4, parent=parent, sample_index=1)
        add(engine, parent, fork)
        if end == "during":
            engine.step()
        engine.abort(parent)
        run(engine)
        assert engine.ended == {parent: "abort", fork: "length"}


def test_a_fork_waits_for_a_preempted_parent_rather_than_computing_the_prompt():
    engine = make_engine(num_pages=6, max_num_seqs=2, prefix=False)
    old, parent = sequence(8, 10), sequence(8, 6)
    fork = sequence(parent.tokens, 1, parent=parent, sample_index=1)
    add(engine, old, parent, fork)
    while parent.preemptions == 0:
        engine.step()
    run(engine)
    assert fork.preemptions == 0
    counters = engine.scheduler.counters
    assert counters.tokens == 8 + 9 + 8 + 5 + 1 + counters.recomputed_tokens


def test_a_fork_that_ran_before_neither_waits_nor_shares_what_is_half_computed():
    engine = make_engine(max_step_tokens=8, prefix=False)
    parent = sequence(10, 3)
    fork = sequence(parent.tokens, 1, parent=parent, sample_index=1)
    fork.preemptions = 1
    add(engine, parent, fork)
    engine.step()
    assert parent.num_computed == 8  # one short of what a fork shares
    plan = engine.step()
    assert [(c.sequence, c.start, c.count) for c in plan.chunks] == [(parent, 8, 2), (fork, 0, 6)]
    assert not plan.copies
    run(engine)


def test_aborts_in_every_state_give_everything_back():
    engine = make_engine(num_pages=8, max_num_seqs=1, max_step_tokens=8)
    parent = sequence(12, 4)
    fork = sequence(parent.tokens, 4, parent=parent, sample_index=1)
    waiting = sequence(4, 4)
    add(engine, parent, fork, waiting)
    engine.step()
    for one in (fork, parent, waiting):  # aside, half-way through its prompt, in the queue
        engine.abort(one)
        with pytest.raises(SequenceStateError, match="not live"):
            engine.scheduler.abort(one)
    scheduler = engine.scheduler
    assert (scheduler.num_live, scheduler.pool.in_use, scheduler.slots.available) == (0, 0, 1)
    assert scheduler.counters.aborted == 3
    engine.drain()


def test_a_lost_pool_is_recomputed_from_tokens():
    engine = make_engine(num_pages=16, max_num_seqs=2)
    sequences = [sequence(6, 8), sequence(7, 8), sequence(5, 8)]
    add(engine, *sequences)
    for _ in range(4):
        engine.step()
    engine.device.lose_everything()
    engine.scheduler.reset()
    assert engine.scheduler.pool.free == 16
    run(engine)
    assert set(engine.ended) == set(sequences)


@pytest.mark.parametrize(
    "prompt, output, field, allowed",
    [
        (0, 1, "prompt", "1 token or more"),
        (50, 1, "prompt", "max_model_len"),
        (40, 11, "max_tokens", "max_model_len"),
        (4, 0, "max_tokens", "1 or more"),
    ],
)
def test_what_could_never_end_is_refused(prompt, output, field, allowed):
    engine = make_engine(num_pages=32, max_model_len=50)
    with pytest.raises(RequestError, match=allowed) as caught:
        engine.scheduler.add(sequence(prompt, output))
    assert caught.value.field == field
    assert engine.scheduler.num_live == 0


@pytest.mark.parametrize("weight", [0.0, -1.0, float("inf"), float("nan")])
def test_weights_are_numbers_above_zero(weight):
    with pytest.raises(RequestError) as caught:
        make_engine().scheduler.add(sequence(4, 4, weight=weight))
    assert caught.value.field == "weight"


def test_what_the_pool_cannot_hold_alone_is_refused_and_the_rest_is_not():
    engine = make_engine(num_pages=4, growth_tokens=100)
    with pytest.raises(RequestError, match="KV pool of 4 pages"):
        engine.scheduler.add(sequence(8, 10))
    with pytest.raises(RequestError, match="KV pool of 4 pages"):
        engine.scheduler.add(sequence(17, 1))
    exact = [sequence(8, 9), sequence(16, 1)]  # the last token's KV is never needed
    add(engine, *exact)
    run(engine)
    assert set(engine.ended.values()) == {"length"}


def test_misuse_raises():
    engine = make_engine()
    one = sequence(4, 4)
    scheduler = engine.scheduler
    with pytest.raises(SequenceStateError, match="not live"):
        scheduler.finish(one)
    add(engine, one)
    with pytest.raises(SequenceStateError, match="added before"):
        scheduler.add(one)
    with pytest.raises(SequenceStateError, match="awaits no token"):
        scheduler.accept(one, 1)
    with pytest.raises(SequenceStateError, match="not a fork"):
        scheduler.add(sequence([1, 2], 1, parent=one))
    fork = sequence(one.tokens, 4, parent=one)
    with pytest.raises(SequenceStateError, match="not a fork"):
        scheduler.add(sequence(one.tokens, 4, parent=fork))
    with pytest.raises(SequenceStateError, match="not a fork"):
        scheduler.add(sequence(one.tokens, 4, parent=one, salt=b"x"))
    run(engine)
    with pytest.raises(SequenceStateError, match="awaits no token"):
        scheduler.accept(one, 1)
    assert "FINISHED" in repr(one)


@pytest.mark.parametrize(
    "fields",
    [
        {"max_num_seqs": 0}, {"max_step_tokens": 3}, {"max_model_len": 0}, {"growth_tokens": -1},
        {"max_chunk_tokens": 0},
    ],
)
def test_configurations_are_checked(fields):
    good = {"max_num_seqs": 4, "max_step_tokens": 4, "max_model_len": 8}
    SchedulerConfig(**good)
    with pytest.raises(ConfigError) as caught:
        SchedulerConfig(**{**good, **fields})
    assert caught.value.field == next(iter(fields))
