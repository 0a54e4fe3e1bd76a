"""What `fair` promises, over the real scheduler and the device that checks every read."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
import random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from aqua_jax.paging.pages import PagePool
from aqua_jax.paging.prefix import PrefixCache
from aqua_jax.scheduling.fair import EARLY_TURNS, Fair, FairConfig
from aqua_jax.scheduling.plan import Plan
from aqua_jax.scheduling.policies import FirstComeFirstServed, Policy
from aqua_jax.scheduling.scheduler import Scheduler, SchedulerConfig
from aqua_jax.scheduling.sequence import Sequence, Status
from aqua_jax.scheduling.slices import SliceConfig
from tests.scale import at_scale, scaled
from tests.scheduling.fake_device import FakeEngine


class House:
    """A scheduler whose device answers at once, and what everybody got from it."""

    def __init__(
        self, policy: Policy, num_pages: int = 64, max_num_seqs: int = 4,
        max_step_tokens: int = 64, prefix: bool = False, growth_tokens: int = 0, seed: int = 0,
        switch_share: float = 1.0,
    ) -> None:
        self.rng = random.Random(seed)
        pool = PagePool(num_pages, 4)
        self.scheduler = Scheduler(
            SchedulerConfig(
                max_num_seqs, max_step_tokens, 4000, growth_tokens=growth_tokens,
                switch_share=switch_share,
            ),
            policy, pool, PrefixCache(pool) if prefix else None,
        )
        self.numbers = itertools.count()
        self.steps = 0
        self.added_at: dict[Sequence, int] = {}
        self.first_token_at: dict[Sequence, int] = {}
        self.waiting_since: dict[Sequence, int] = {}
        self.longest_wait = 0
        self.served: collections.Counter[str] = collections.Counter()  # decode tokens by user
        self.tokens_of: collections.Counter[Sequence] = collections.Counter()
        self.bound = 0.0  # greatest bound seen

    def add(self, prompt: int, output: int, **fields) -> Sequence:
        """A request whose prompt is like no other's."""
        number = next(self.numbers)
        tokens = [self.rng.randrange(10**6) for _ in range(prompt)]
        fields = {"arrival": float(self.steps), **fields}
        sequence = Sequence(number, str(number), tokens, prompt + output, **fields)
        self.scheduler.add(sequence)
        self.added_at[sequence] = self.waiting_since[sequence] = self.steps
        return sequence

    def step(self) -> list[Sequence]:
        """Plans, computes, accepts; returns who ended."""
        plan = self.scheduler.plan(0.01 * self.steps)
        self.steps += 1
        assert plan is not None
        for sequence in plan.preempted:
            self.waiting_since[sequence] = self.steps
        ended = []
        for chunk in plan.chunks:
            sequence = chunk.sequence
            since = self.waiting_since.pop(sequence, None)
            if since is not None:
                self.longest_wait = max(self.longest_wait, self.steps - since)
            if not chunk.sample:
                continue
            self.scheduler.accept(sequence, self.rng.randrange(10**6))
            self.first_token_at.setdefault(sequence, self.steps)
            self.served[sequence.user] += 1
            self.tokens_of[sequence] += 1
            if sequence.complete:
                self.scheduler.finish(sequence)
                ended.append(sequence)
        return ended

    def note_bound(self) -> float:
        """The bound under the load of this moment; remembers the greatest."""
        bound = self.scheduler.waiting_bound(run_ahead=0)
        assert bound is not None
        self.bound = max(self.bound, bound.steps)
        return bound.steps


def fair(slice_steps: int | float | str = 5, **fields) -> Fair:
    slices = {k: fields.pop(k) for k in list(fields) if k in SliceConfig.__dataclass_fields__}
    return Fair(FairConfig(SliceConfig(slice_steps, **slices), **fields))  # type: ignore[arg-type]


def jain(values: list[float]) -> float:
    return sum(values) ** 2 / (len(values) * sum(value * value for value in values))


@dataclasses.dataclass(frozen=True)
class Work:
    """Random work for two policies that should agree."""

    num_pages: int
    max_num_seqs: int
    extra_tokens: int
    growth_tokens: int
    run_ahead: int
    prefix: bool
    seed: int


@given(st.builds(
    Work, st.integers(4, 16), st.integers(1, 6), st.integers(0, 10), st.sampled_from([0, 4]),
    st.integers(0, 2), st.booleans(), st.integers(0, 2**32),
))
@settings(max_examples=scaled(60), deadline=None)
def test_without_slices_and_with_one_user_fair_is_first_come_first_served(work: Work) -> None:
    def history(policy: Policy) -> list[tuple]:
        rng = random.Random(work.seed)
        pool = PagePool(work.num_pages, 2)
        scheduler = Scheduler(
            SchedulerConfig(
                work.max_num_seqs, work.max_num_seqs + work.extra_tokens, 1000,
                growth_tokens=work.growth_tokens,
            ),
            policy, pool, PrefixCache(pool) if work.prefix else None,
        )
        engine = FakeEngine(scheduler, random.Random(0), work.run_ahead)
        number, plans, left = 0, [], 12
        while left or scheduler.num_live:
            if left and rng.random() < 0.4:
                left -= 1
                prompt = [rng.randrange(8) for _ in range(rng.randrange(1, work.num_pages))]
                limit = len(prompt) + rng.randrange(1, 2 * work.num_pages + 2 - len(prompt))
                parent = None
                for index in range(rng.choice([1, 1, 3])):
                    sequence = Sequence(
                        number, str(left), list(prompt), limit, arrival=float(number // 4),
                        sample_index=index, parent=parent,
                    )
                    parent, number = parent or sequence, number + 1
                    engine.add(sequence, stops=rng.random() < 0.3)
            plans.append(_shape(engine.step()))
        engine.drain()
        return plans

    assert history(fair(math.inf)) == history(FirstComeFirstServed())


def _shape(plan: Plan | None) -> tuple | None:
    if plan is None:
        return None
    chunks = tuple((c.sequence.seq_id, c.start, c.count, c.sample) for c in plan.chunks)
    return chunks, plan.copies, tuple(s.seq_id for s in plan.preempted)


def test_nobody_switches_while_everything_fits() -> None:
    house = House(fair(2), max_num_seqs=8)
    for _ in range(6):
        house.add(4, 30)
    while house.scheduler.num_live:
        house.step()
    assert house.scheduler.counters.preemptions == 0


def test_slices_take_turns_in_order() -> None:
    house = House(fair(3), max_num_seqs=1)
    first, second = house.add(4, 20), house.add(4, 20)
    turns = []
    while house.scheduler.num_live:
        plan_before = house.tokens_of.copy()
        house.step()
        got = house.tokens_of - plan_before
        turns += [one for one in (first, second) if got[one]]
    lengths = [len(list(group)) for _, group in itertools.groupby(turns)]
    assert turns[0] is first
    assert lengths[:6] == [3] * 6  # the first token of each comes with its prompt
    assert house.scheduler.counters.switches == len(lengths) - 2  # one change is an end


def test_a_newcomer_is_served_before_those_who_have_had_a_slice() -> None:
    house = House(fair(4), max_num_seqs=2)
    for _ in range(2):
        house.add(4, 100)
    for _ in range(10):
        house.step()
    newcomer = house.add(4, 10)
    house.step()
    assert house.tokens_of[newcomer] == 1


def test_a_head_too_large_for_what_is_free_is_kept_room_for() -> None:
    house = House(fair(4), num_pages=24, max_num_seqs=4)
    for _ in range(3):
        house.add(8, 60)
    house.step()
    large = house.add(70, 10)  # 18 of 24 pages
    small = [house.add(4, 60) for _ in range(2)]
    while large.status is Status.WAITING:
        assert not any(one in house.first_token_at for one in small)
        house.step()
        assert house.steps <= 40


def test_a_page_shortage_hits_those_whose_slice_is_over() -> None:
    house = House(fair(12), num_pages=8, max_num_seqs=2)
    house.add(8, 22)
    house.step()
    for _ in range(11):
        house.step()
    young = house.add(4, 12)
    while house.scheduler.num_live:
        house.step()
    assert young.preemptions == 0


def test_those_inside_their_slices_come_first() -> None:
    policy = fair(4)
    house = House(policy, max_num_seqs=2)
    old = house.add(4, 100)
    for _ in range(10):
        house.step()
    young = house.add(4, 100)
    house.step()
    assert policy._accounts[young].vruntime > policy._accounts[old].vruntime
    assert policy.running_order([old, young], 0.0) == [young, old]


def test_nobody_gives_way_to_a_prompt_that_could_not_begin() -> None:
    house = House(fair(4), num_pages=200, max_num_seqs=4, max_step_tokens=8)
    for _ in range(4):
        house.add(1, 100)
    for _ in range(10):
        house.step()
    for _ in range(4):
        house.add(40, 10)
    for _ in range(20):
        before = house.scheduler.counters.switches
        house.step()
        assert house.scheduler.counters.switches <= before + 1
        assert sum(s.num_computed == 0 for s in house.scheduler._running) == 0


def test_decodes_go_on_while_others_switch_in() -> None:
    house = House(fair(4), max_num_seqs=4, max_step_tokens=8, num_pages=200)
    for _ in range(12):
        house.add(40, 40)
    while house.scheduler.num_live:
        decoding = [s for s in house.scheduler._running if s.pending == 1]
        before = house.tokens_of.copy()
        house.step()
        for one in decoding:
            assert house.tokens_of[one] > before[one] or one.status is Status.WAITING


@pytest.mark.parametrize(("counts", "prompts", "output"), [
    ((4, 2, 3), (8, 8, 24), 8), ((8, 3, 4), (8, 8, 40), 20), ((8, 3, 4), (8, 8, 8), 20),
][: at_scale(1, 3)])
def test_equally_backlogged_users_get_equal_service(counts, prompts, output: int) -> None:
    policy = fair(5, prefill_cost=0.5)
    house = House(policy, num_pages=60, max_num_seqs=3)
    live = collections.Counter()

    def refill() -> None:
        for user, count, prompt in zip("abc", counts, prompts, strict=True):
            while live[user] < count:
                house.add(prompt, output + house.rng.randrange(output), user=user)
                live[user] += 1

    refill()
    window = 20 * int(house.note_bound())
    service, original = collections.Counter(), policy.on_service

    def counting(sequence: Sequence, *, tokens: int = 0, **rest) -> None:
        prefill = min(tokens, policy._accounts[sequence].prefill_left)
        service[sequence.user] += 0.5 * prefill + tokens - prefill
        original(sequence, tokens=tokens, **rest)

    policy.on_service = counting  # type: ignore[method-assign]
    for _ in range(window):
        for sequence in house.step():
            live[sequence.user] -= 1
        refill()
    assert jain([service[user] for user in "abc"]) >= 0.99
    assert house.longest_wait <= house.note_bound()


def test_one_request_among_anothers_thousand_is_served_within_its_bound() -> None:
    house = House(fair(8), num_pages=80, max_num_seqs=4, prefix=True)
    for _ in range(1000):
        house.add(8, 40, user="crowd")
    for _ in range(100):
        house.step()
    one = house.add(8, 40, user="one")
    bound = house.note_bound()
    while one not in house.first_token_at:
        house.step()
    waited = house.first_token_at[one] - house.added_at[one]
    assert waited <= min(bound, 2 * (8 + 2))  # in fact the first place that comes free


@pytest.mark.parametrize("weights", [(1.0, 2.0), (1.0, 3.0, 0.5)])
def test_weights_are_respected(weights: tuple[float, ...]) -> None:
    shares = [weight / sum(weights) for weight in weights]
    house = House(fair(4), num_pages=1500, max_num_seqs=1)
    sequences = [house.add(4, 3900, weight=weight) for weight in weights]
    for _ in range(2000):
        house.step()
    total = sum(house.tokens_of.values())
    for sequence, share in zip(sequences, shares, strict=True):
        assert house.tokens_of[sequence] / total == pytest.approx(share, rel=0.05)
    users = {str(index): weight for index, weight in enumerate(weights)}
    house = House(fair(4, user_weights=users, prefill_cost=1e-6), num_pages=6000, max_num_seqs=3)
    for user in users:
        for _ in range(4):
            house.add(4, 3900, user=user)
    for _ in range(2000):
        house.step()
    total = sum(house.served.values())
    for user, share in zip(users, shares, strict=True):
        assert house.served[user] / total == pytest.approx(share, rel=0.05)


def test_samples_of_a_request_share_its_weight() -> None:
    house = House(fair(4), num_pages=1500, max_num_seqs=1)
    single = house.add(4, 2000)
    parent = house.add(4, 2000)
    samples = [parent]
    for index in range(3):
        fork = Sequence(
            next(house.numbers), parent.request_id, list(parent.tokens), 2004,
            sample_index=1 + index, parent=parent,
        )
        house.scheduler.add(fork)
        samples.append(fork)
    for _ in range(2000):
        house.step()
    together = sum(house.tokens_of[one] for one in samples)
    assert house.tokens_of[single] == pytest.approx(together, rel=0.1)


@pytest.mark.parametrize("users", [1, 4])
def test_the_old_are_not_starved_by_steady_arrivals(users: int) -> None:
    house = House(fair(4), num_pages=64, max_num_seqs=2)
    old = [house.add(8, 60, user="0") for _ in range(4)]
    for number in range(3000):
        if number % 2 == 0 and house.scheduler.num_live < 40:
            house.add(4, 3, user=str(number % users))
        house.step()
        if all(one.status is Status.FINISHED for one in old):
            return
    pytest.fail("starved")


def test_newcomers_go_first_for_their_share_of_turns() -> None:
    def tokens_of_the_old(credit_share: float) -> int:
        house = House(fair(8, credit_share=credit_share), num_pages=400, max_num_seqs=1)
        old = [house.add(4, 700) for _ in range(2)]
        for _ in range(4000):
            if house.scheduler.num_live < 20:
                house.add(4, 9)
            house.step()
        return sum(house.tokens_of[one] for one in old)

    without, little, much = map(tokens_of_the_old, (0.0, 0.1, 0.9))
    assert 0.8 * without <= little and 0 < much <= without


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5])
def test_early_turns_are_earned(share: float) -> None:
    policy = fair(2, credit_share=share)
    house = House(policy, num_pages=400, max_num_seqs=1)
    for newcomers, steps in ((40, 200), (80, 0)):
        for _ in range(newcomers):
            house.add(4, 900)
        for _ in range(steps):
            house.step()
    early: list[bool] = []  # of each turn
    while len(early) < 80:
        before, first = set(house.scheduler._running), policy._active[""].sequences.peek()
        assert first is not None
        house.step()
        for one in set(house.scheduler._running) - before:
            early.append(one is not first.sequence)
            assert not early[-1] or one.preemptions == 0
    saved = EARLY_TURNS if share else 0
    assert all(early[:saved])  # after them, some newcomers are first without being early
    assert share * (80 - saved) / 2 <= sum(early[saved:]) <= share * (80 - saved)


def test_slices_follow_the_objective_for_gaps() -> None:
    def steps(slo: float) -> float:
        policy = fair("auto", tbt_slo_s=slo)
        house = House(policy, max_num_seqs=4)
        for _ in range(12):
            house.add(4, 200)
        for _ in range(40):
            house.step()  # 10 ms each
        return policy.slices.steps

    assert steps(0.0) == 16
    assert steps(0.1) == 16  # not even two of these fit
    assert steps(1.0) == pytest.approx(50, abs=1)  # 2 slices of the others, 10 ms a step
    assert steps(60.0) == 256


def test_what_a_slice_did_not_use_is_given_back() -> None:
    policy = fair(50, prefill_cost=0.25)
    house = House(policy, max_num_seqs=1)
    for user in ("brief", "brief", "other"):
        house.add(8, 1, user=user)
    house.step()
    assert policy._active["brief"].vruntime == pytest.approx(2.0)  # 8 prompt tokens


def test_service_that_nobody_waited_for_is_free() -> None:
    policy = fair(4, prefill_cost=0.25)
    house = House(policy, num_pages=400, max_num_seqs=4)
    for user in "abbb":
        house.add(4, 200, user=user)
    for _ in range(150):
        house.step()
    one, other = (policy._active[user].vruntime for user in "ab")
    assert abs(one - other) <= 2 * (4 + 0.25 * 4)  # no more than the slices first granted


def test_copies_are_service() -> None:
    house = House(fair(4), max_num_seqs=1)
    paying, other = (house.add(4, 200, user=user) for user in "ab")
    for _ in range(20):
        house.step()
    running = next(iter(house.scheduler._running))
    house.scheduler.policy.on_service(running, price=40.0)  # decode tokens
    before = house.tokens_of.copy()
    for _ in range(40):
        house.step()
    got = house.tokens_of - before
    waiting = other if running is paying else paying
    assert got[waiting] - got[running] >= 25


@dataclasses.dataclass(frozen=True)
class Crowd:
    """A random crowd for the bound."""

    max_num_seqs: int
    num_pages: int
    slice_steps: int | str
    users: int
    weights: bool
    extra_tokens: int
    max_live: int
    output: int
    seed: int
    switch_share: float


@given(st.builds(
    Crowd, st.integers(1, 5), st.integers(12, 40), st.sampled_from([1, 3, 8, "auto"]),
    st.integers(1, 4), st.booleans(), st.integers(1, 40), st.integers(2, 24),
    st.sampled_from([2, 10, 40]), st.integers(0, 2**32), st.sampled_from([1.0, 0.1, 1e-6]),
))
@example(Crowd(2, 29, 8, 2, True, 33, 18, 40, 711, 1.0))  # needs room counted from the pages held
@settings(max_examples=scaled(60), deadline=None)
def test_no_runnable_sequence_waits_longer_than_the_bound(crowd: Crowd) -> None:
    policy = fair(crowd.slice_steps, min_slice_steps=4)
    house = House(
        policy, crowd.num_pages, crowd.max_num_seqs, crowd.max_num_seqs + crowd.extra_tokens,
        prefix=crowd.seed % 2 == 0, seed=crowd.seed, switch_share=crowd.switch_share,
    )
    rng, capacity = house.rng, 4 * crowd.num_pages
    for _ in range(600):
        if house.scheduler.num_live < crowd.max_live and rng.random() < 0.5:
            prompt = rng.randrange(1, capacity // 2)
            house.add(
                prompt, rng.randrange(1, min(crowd.output, capacity - prompt)),
                user=str(rng.randrange(crowd.users)),
                weight=rng.choice([0.5, 1.0, 2.0]) if crowd.weights else 1.0,
            )
            house.note_bound()
        if house.scheduler.num_live:
            inside = [s for s in house.scheduler._running if policy._accounts[s].slice_left > 0]
            house.step()
            assert not any(s.status is Status.WAITING for s in inside), "a slice was cut short"
            waited = max((house.steps - s for s in house.waiting_since.values()), default=0)
            assert max(waited, house.longest_wait) <= house.bound
