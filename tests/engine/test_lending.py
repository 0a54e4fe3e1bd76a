"""What an engine lends, when, and that nobody's answer changes.

The decisions against a producer that does nothing by itself; the whole against a coordinator and
borrowers that are processes of their own and write nonsense over what they borrow until they give
it back.
"""

from __future__ import annotations

import random
import time
from types import SimpleNamespace

import pytest

from aqua_jax.config import EngineConfig, SamplingParams
from aqua_jax.engine.lendable_pool import split
from aqua_jax.engine.lending import EngineLender
from aqua_jax.errors import ConfigError
from aqua_jax.paging.withdrawal import WithdrawablePool
from aqua_jax.scheduling.sequence import Sequence
from tests.coordinator.running import coordinator
from tests.engine.driving import run_all, tiny_engine
from tests.faults.garbage import garbage_borrower
from tests.memory.leftovers import leftovers
from tests.memory.lending import new_name, wait_for
from tests.scale import scaled


class Hand:
    """A producer that notes what it is told."""

    def __init__(self) -> None:
        self.news, self.lost, self.connected, self.longest_s = False, 0, True, 0.0
        self.lent: list[int] = []
        self.parts: list[tuple[int, int, int]] = []
        self.kept: int | None = None
        self._back: list[tuple[int, int, int]] = []

    def lend(self, extent: int, first: int = 0, last: int | None = None) -> None:
        if (first, last) == (0, 4):
            self.lent.append(extent)
        else:
            assert last is not None
            self.parts.append((extent, first, last))

    def keep(self, count: int) -> None:
        self.kept = count

    def give_back(self, extent: int, first: int, last: int) -> None:
        self._back.append((extent, first, last))
        self.news = True

    def take_returned(self) -> list[tuple[int, int, int]]:
        self.news = False
        back, self._back = self._back, []
        return back


class Case:
    """8 pages in the reserve, 4 extents of 4; a step boundary when told."""

    def __init__(self, **settings: float) -> None:
        self.pool = WithdrawablePool(8, 4, 4, 16)
        self.hand = Hand()
        self.now = 0.0
        self.samples: list[tuple[None, SimpleNamespace]] = []
        self.steps, self.ended, self.arrived = 0, 0, 0
        self.lender = EngineLender(
            self.pool, self.hand, lambda: self.samples,  # type: ignore[arg-type,return-value]
            clock=lambda: self.now, horizon_s=0.0, **{"reserve": 2, "hold_s": 5.0, **settings},
        )

    def add(self, tokens: int) -> None:
        """A live request that may come to need so many tokens."""
        number = len(self.samples)
        self.samples.append((None, SimpleNamespace(
            sequence=Sequence(number, f"r{number}", [1], tokens, arrival=0.0)
        )))
        self.arrived += 1

    def tend(self, passed: float = 1.0) -> dict:
        """A boundary so much later."""
        self.now += passed
        self.lender.tend(self.steps, self.steps - self.ended, self.arrived)
        stats = self.lender.stats()
        assert stats["lent"] + stats["emptying"] <= stats["lendable"]
        return stats


def test_an_idle_engine_lends_what_it_may_after_watching_itself() -> None:
    case = Case()
    for _ in range(5):
        assert case.tend()["lent"] == 0
    assert case.hand.lent == []
    assert [case.tend()["lent"] for _ in range(2)] == [16, 16]
    assert case.hand.lent == [0, 1, 2, 3] and case.hand.kept == 4
    assert (case.pool.away, case.pool.available) == (16, 8)


def test_what_live_requests_may_need_is_not_lent() -> None:
    case = Case()
    case.add(16 * 9)
    for _ in range(7):
        case.tend()
    # Of 24: 9 needed, 2 kept; 13 are three extents and a page.
    assert case.hand.lent == [1, 2, 3]


def test_growing_need_takes_back_at_once_and_only_as_much() -> None:
    case = Case()
    for _ in range(7):
        case.tend()
    case.add(16 * 9)
    assert case.tend(0.05)["wanted_back"] == 4 and case.hand.kept == 3
    case.hand.give_back(0, 2, 4)
    assert case.tend(0.0)["lent"] == 14
    case.hand.give_back(0, 1, 2)
    case.hand.give_back(0, 0, 1)
    assert case.tend(0.0)["lent"] == 12
    assert (case.pool.away, case.pool.available) == (12, 12)
    assert case.lender.counters.extents_back == 1
    case.samples.clear()
    for _ in range(4):
        assert case.tend()["lent"] == 12  # less need isn't believed at once
    case.tend()
    case.tend()
    assert case.hand.lent == [0, 1, 2, 3, 0]


def test_an_extent_is_handed_over_when_steps_that_may_write_there_have_ended() -> None:
    case = Case(hold_s=0.0)
    pages = case.pool.allocate(10)
    assert pages is not None and {page.id for page in pages[8:]} == {8, 9}
    case.steps, case.ended = 7, 6
    assert case.tend()["emptying"] == 2
    assert case.hand.lent == []  # all of them waits for the step that is under way
    case.steps, case.ended = 8, 7
    case.tend(0.01)
    assert case.hand.lent == [1, 2, 3]
    for page in pages:
        case.pool.release(page)
    case.steps, case.ended = 9, 8
    case.tend(0.01)
    assert case.lender.busy and case.hand.lent == [1, 2, 3]
    case.steps, case.ended = 10, 9
    case.tend(0.01)
    assert not case.lender.busy and case.hand.lent == [1, 2, 3, 0]


def test_an_extent_that_is_not_left_in_time_stays() -> None:
    case = Case(hold_s=0.0)
    pages = case.pool.allocate(9)
    assert pages is not None
    case.tend()
    assert case.pool.draining == 1
    for _ in range(6):
        case.tend()
    assert case.pool.draining == 0 and case.lender.counters.kept == 1
    case.tend()
    assert case.pool.draining == 0  # not at once again
    for page in pages:
        case.pool.release(page)
    for _ in range(6):
        case.tend()
    assert sorted(case.hand.lent) == [0, 1, 2, 3]


def test_need_that_grows_while_extents_are_emptied_keeps_them() -> None:
    case = Case(hold_s=0.0)
    case.steps, case.ended = 1, 0
    case.tend()
    assert case.lender.busy and case.pool.away == 16
    case.add(16 * 24)
    case.tend(0.3)
    assert (case.pool.away, case.hand.lent, case.lender.counters.kept) == (0, [], 4)


def test_what_is_back_of_an_extent_is_lent_again_when_the_rest_may_stay_away() -> None:
    case = Case(hold_s=0.0)
    case.tend()
    assert case.hand.lent == [0, 1, 2, 3]
    case.add(16 * 9)
    assert case.tend(0.3)["wanted_back"] == 4
    case.hand.give_back(0, 1, 3)
    stats = case.tend(0.3)
    assert (stats["lent"], stats["wanted_back"], case.hand.parts) == (14, 2, [])
    page, = case.pool.allocate(9)[8:]
    assert page.id == 9 or page.id == 10  # used meanwhile: of what came back
    case.samples.clear()
    case.steps, case.ended = 5, 4
    stats = case.tend(0.3)
    assert case.hand.kept == 4 and stats["wanted_back"] == 0
    assert (stats["lent"], stats["emptying"]) == (14, 1) and case.lender.busy
    case.pool.release(page)
    case.tend(0.01)
    assert case.hand.parts == []  # the step that was dispatched before may write there
    case.hand.give_back(0, 0, 1)  # on its way when the wish was taken back
    case.steps, case.ended = 6, 5
    stats = case.tend(0.01)
    assert case.hand.parts == [(0, 1, 3)] and not case.lender.busy
    assert (stats["lent"], case.lender.counters.parts_lent) == (15, 1)
    case.ended = 6
    # Then it is as it was: the rest goes too, after a while, and all of it comes back.
    for _ in range(12):
        stats = case.tend(0.5)
    assert case.hand.parts == [(0, 1, 3), (0, 0, 1)] and stats["lent"] == 16
    case.add(16 * 24)
    assert case.tend(0.3)["wanted_back"] == 16
    for extent in range(4):
        case.hand.give_back(extent, 0, 4)
    case.tend(0.3)
    assert (case.pool.away, case.lender.counters.extents_back) == (0, 4)


def test_a_part_that_was_to_be_lent_again_stays_when_need_grows() -> None:
    case = Case(hold_s=0.0)
    case.tend()
    case.add(16 * 9)
    case.tend(0.3)
    case.hand.give_back(0, 0, 2)
    case.tend(0.3)
    used = case.pool.allocate(10)
    assert used is not None
    case.samples.clear()
    assert case.tend(0.3)["emptying"] == 2
    case.add(16 * 9)
    stats = case.tend(0.3)
    assert (stats["emptying"], stats["lent"], stats["wanted_back"]) == (0, 14, 2)
    case.hand.give_back(0, 2, 4)
    stats = case.tend(0.3)
    assert (stats["lent"], case.lender.counters.extents_back) == (12, 1)
    assert case.hand.parts == [] and case.pool.in_use == 10


def test_nothing_is_begun_while_the_coordinator_is_away() -> None:
    case = Case(hold_s=0.0)
    case.hand.connected = False
    for _ in range(3):
        case.tend()
    assert case.pool.away == 0
    case.hand.connected = True
    case.tend()
    assert case.pool.away == 16


def test_between_decisions_nothing_is_looked_at() -> None:
    case = Case()
    looked: list[int] = []
    case.lender._live = lambda: looked.append(1) or []  # type: ignore[assignment,func-returns-value]
    case.tend()
    for _ in range(100):
        case.tend(0.001)
    assert len(looked) == 1


@pytest.mark.parametrize(
    ("pages", "page_bytes", "lendable", "result"),
    [
        (128, 8192, 96 * 8192, (32, 16, 6)), (100, 4096, 1 << 30, (4, 16, 6)),
        (10, 4096, 3 * 4096, (7, 3, 1)), (10, 1024, 8 * 1024, (2, 2, 4)),
        (64, 6144, 64 * 6144, (2, 31, 2)), (40, 6144, 39 * 6144, (8, 16, 2)),
        (10, 1024, 3 * 1024, None), (1, 4096, 1 << 30, None), (10, 4096, 100, None),
        (1 << 14, 1 << 20, 12 << 30, (4096, 48, 256)),
    ],
)
def test_how_pages_are_divided(pages, page_bytes, lendable, result) -> None:
    found = split(pages, page_bytes, lendable)
    if result is None:
        assert found is None
        return
    assert found is not None
    reserve, extents, length = found.reserve, found.extents, found.extent_pages
    assert reserve + extents * length == pages and extents * length * page_bytes <= lendable
    assert length * page_bytes % 4096 == 0
    if extents <= 16:
        assert (reserve, extents, length) == result


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"lend": "auto"}, "coordinator"), ({"coordinator": "@x"}, "coordinator"),
        ({"lend": "maybe"}, "lend"), ({"lend_kv_memory": 1 << 20}, "lend_kv_memory"),
        ({"lend": "auto", "coordinator": "@x", "lend_kv_memory": 0}, "lend_kv_memory"),
        ({"lend_reserve": 1.5}, "lend_reserve"), ({"lend_hold_s": -1}, "lend_hold_s"),
        ({"lend_deadline_s": "x"}, "lend_deadline_s"), ({"lend_bandwidth": -1}, "lend_bandwidth"),
    ],
)
def test_configurations_that_cannot_be(settings, field) -> None:
    with pytest.raises(ConfigError, match=rf"^{field}: "):
        EngineConfig(model="m", **settings)


def test_what_is_only_known_at_the_start_names_its_field(tmp_path) -> None:
    path = new_name()
    lends = {"lend": "auto", "coordinator": path}
    with leftovers() as left, pytest.raises(ConfigError, match=r"^coordinator: .* runs"):
        tiny_engine(tmp_path, **lends)
    wait_for(lambda: not left(), "connections end")
    with pytest.raises(ConfigError, match=r"^lend: .*reference"):
        tiny_engine(tmp_path, attention="reference", **lends)
    with pytest.raises(ConfigError, match=r"^lend_kv_memory: "):
        tiny_engine(tmp_path, lend_kv_memory=100, **lends)
    with coordinator(path):
        with pytest.raises(ConfigError, match=r"^max_model_len: .*lend_kv_memory"):
            tiny_engine(tmp_path, max_model_len=300, **lends)
        with tiny_engine(tmp_path, **lends) as engine:
            assert engine.max_model_len == 256  # what the reserve holds


def work_of(rng: random.Random, count: int) -> list[tuple[list[int], SamplingParams]]:
    """Prompts with common beginnings, some with several samples."""
    stems = [[rng.randrange(3, 131) for _ in range(64)] for _ in range(3)]
    return [
        (
            rng.choice(stems)[: rng.randrange(64)] + [rng.randrange(3, 131)],
            SamplingParams(
                max_tokens=rng.randrange(4, 60), temperature=rng.choice([0.0, 1.0]), seed=index,
                n=rng.choice([1, 1, 1, 3]), ignore_eos=True, logprobs=1,
            ),
        )
        for index in range(count)
    ]


def answers(outputs) -> list:
    """All that a request says."""
    return [
        [(o.token_ids, o.cumulative_logprob, o.finish_reason) for o in output.outputs]
        for output in outputs
    ]


@pytest.mark.parametrize(
    ("seed", "devices"), [(seed, 1) for seed in range(scaled(2))] + [(2, 2), (3, 4)][: scaled(1)]
)
def test_lending_on_and_off_at_random_changes_no_answer(tmp_path, seed, devices) -> None:
    """Also of a pool whose pages several devices share."""
    rng = random.Random(seed)
    work = work_of(rng, 20)
    settings = {
        "kv_cache_tokens": 1024, "deterministic": True, "max_model_len": 160, "warmup": "full",
        "policy": rng.choice(["fair", "fcfs"]), "compile_cache_dir": str(tmp_path / "cache"),
        "tensor_parallel": devices,
    }
    with tiny_engine(tmp_path, **settings) as engine:
        expected = answers(run_all(engine, work))
    path = new_name()
    with coordinator(path), leftovers() as left:
        engine = tiny_engine(
            tmp_path, lend="auto", coordinator=path, lend_hold_s=0.0,
            lend_kv_memory=48 * 4096 * max(2, devices),
            lend_deadline_s=0.5, **settings,
        )
        with garbage_borrower(path, 1) as one, garbage_borrower(path, 2) as two, engine:
            lender, pool = engine._lender, engine._pool
            assert lender is not None
            # As if need changed all the time: also where pages are in use.
            lender._informer.decide = lambda now, load: rng.randrange(0, 49)
            slots, moved = engine._runner._slots, []
            refill = slots.refill
            slots.refill = lambda slot: (moved.append(slot), refill(slot))
            rounds, wanted = 0, 40 if devices == 1 else 12
            while rounds < 2 or lender.counters.extents_back < wanted:
                lender._next = 0.0
                assert answers(run_all_slowly(engine, work, rng)) == expected
                rounds += 1
                assert rounds < 40, lender.stats()
            assert pool.in_use == 0 and engine.stats()["compiles_after_warmup"] == 0
            assert lender.counters.extents_lent >= wanted
            assert one.ask("spoiled") == two.ask("spoiled") == "0"
            assert moved, "no sequence has been moved off pages that are lent"
            # And what was lent comes back in the end, all of it.
            lender._informer.decide = lambda now, load: 0
            wait_for(lambda: engine.tend() or pool.away == 0, "everything is back")
            assert answers(run_all(engine, work)) == expected
    wait_for(lambda: not left(), "connections end")


def run_all_slowly(engine, work, rng) -> list:
    """As `run_all`, with decisions at nearly every step and some pauses."""
    lender = engine._lender
    for index, (prompt, params) in enumerate(work):
        engine.add_request(f"r{index}", prompt, params)
    last = {}
    while engine.has_unfinished():
        if rng.random() < 0.3:
            lender._next = 0.0
        if rng.random() < 0.02:
            time.sleep(0.01)
        for output in engine.step():
            last[output.request_id] = output
    return [last[f"r{index}"] for index in range(len(work))]


def test_an_engine_lends_when_idle_and_takes_back_under_load(tmp_path) -> None:
    path = new_name()
    rng = random.Random(7)
    with coordinator(path), garbage_borrower(path, 3) as borrower:
        with tiny_engine(
            tmp_path, lend="auto", coordinator=path, lend_hold_s=0.2, kv_cache_tokens=2048,
        ) as engine:
            def lending() -> dict:
                engine.tend()
                return engine.stats()["lending"]

            wait_for(lambda: lending()["lent"] == lending()["lendable"] == 96)
            wait_for(lambda: int(borrower.ask("held")) > 0, "somebody borrows")
            for _ in range(20):  # the borrower takes its time on a busy machine
                run_all(engine, work_of(rng, 40))
                if lending()["extents_back"] > 0:
                    break
            seen = lending()
            assert seen["extents_back"] > 0 and seen["lost"] == 0
            wait_for(lambda: lending()["lent"] == 96, "lent again")
            assert lending()["extents_lent"] > 16
