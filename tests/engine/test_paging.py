"""Engines that keep pages of whoever gives way: same answers, whatever happens to the stores."""

from __future__ import annotations

import collections
import json
import signal
import time

import jax
import pytest

from aqua_jax.config import EngineConfig, SamplingParams
from aqua_jax.engine import startup, tiers
from aqua_jax.engine.engine import Engine
from aqua_jax.errors import ConfigError
from aqua_jax.memory.borrower import Borrower
from aqua_jax.ops import library
from aqua_jax.ops import moves as copy_queue
from tests.engine.driving import run_all, tiny_engine
from tests.engine.paged import PAGE_BYTES
from tests.engine.test_engine import greedy, prompt
from tests.faults import processes
from tests.memory.leftovers import leftovers
from tests.memory.lending import lending, new_name, wait_for

POOL = 256  # tokens, for work that wants 1,680 at once
SWAPPING = ("fair", "fcfs_swap", "priority")

pytestmark = pytest.mark.usefixtures("quiet")


def work(count: int = 12, tokens: int = 100) -> list[tuple[list[int], SamplingParams]]:
    return [(prompt(20 + 3 * i, 50 + i), greedy(tokens)) for i in range(count)]


@pytest.fixture(scope="module")
def expected(folder) -> list[list[int]]:
    """Answers to `work()` with a pool that holds everything."""
    with tiny_engine(folder, deterministic=True, kv_cache_tokens=4096) as engine:
        return ids(run_all(engine, work()))


def ids(outputs) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


def tight(folder, **settings) -> Engine:
    defaults = {"policy": "fcfs_swap", "kv_cache_tokens": POOL, "deterministic": True}
    engine = tiny_engine(folder, **{**defaults, **settings})
    # So small a model is recomputed faster than copied, slowly as copies are made here.
    engine._scheduler.costs.swap = lambda tokens, unsaved: 0.0
    return engine


def check_nothing_in_use(stats: dict) -> None:
    assert stats["pages"]["in_use"] == 0
    assert [store["in_use"] for store in stats["paging"]["stores"]] == [0] * len(
        stats["paging"]["stores"]
    )
    assert stats["paging"]["outstanding"] == 0
    assert stats["running"] == stats["waiting"] == stats["swapped"] == 0


@pytest.mark.parametrize("policy", SWAPPING)
def test_swapping_changes_no_answer_and_recomputes_little(folder, expected, policy):
    with tight(folder, policy=policy, warmup="minimal", host_kv_memory=256 * PAGE_BYTES) as engine:
        assert ids(run_all(engine, work())) == expected
        stats = engine.stats()
    check_nothing_in_use(stats)
    assert stats["implementations"]["moves"] == "ffi"
    assert stats["preemptions"] > 0 and stats["pool_resets"] == 0
    assert stats["compiles_after_warmup"] == 0
    assert stats["paging"]["bytes_out"] > 0 and stats["paging"]["moves_failed"] == {}
    assert stats["recomputed_tokens"] < stats["paging"]["tokens_held"] / 4


def test_two_tiers_with_checksums_under_slow_copies(folder, expected):
    copy_queue.set_delay(9, 2000)
    with lending(12 * PAGE_BYTES) as lender:
        with tight(
            folder, policy="fair", slice_steps=8, peer=lender.path, verify_pages=True,
            host_kv_memory=64 * PAGE_BYTES,
        ) as engine:
            assert ids(run_all(engine, work())) == expected
            stats = engine.stats()
        wait_for(lambda: lender.lender.grants.held == 0, "all is given back")
    check_nothing_in_use(stats)
    assert [store["name"] for store in stats["paging"]["stores"]] == ["peer", "host"]
    assert stats["paging"]["tokens_in"] > 0 and stats["paging"]["moves_failed"] == {}


def test_waiting_for_pages_is_not_the_hosts_work(folder, monkeypatch):
    with tight(folder, policy="fair", host_kv_memory=40 * PAGE_BYTES) as engine:
        pager = engine._pager

        def linger(limit_s: float) -> None:
            time.sleep(0.002)
            pager.linger_s += 0.002

        monkeypatch.setattr(pager, "linger", linger)
        started = time.perf_counter()
        run_all(engine, work(4, 50))
        passed = time.perf_counter() - started
        stats = engine.stats()
    lingered = stats["paging"]["linger_s"]
    waited = stats["wait_s"] + stats["paging"]["wait_s"]
    assert lingered > 0.05
    assert stats["host_s"] + lingered + waited <= passed  # nothing counts twice


def steps(engine: Engine, until, limit_s: float = 60.0) -> dict:
    """Steps until `until()`; the last output of each request that changed."""
    last, end = {}, time.monotonic() + limit_s
    while not until():
        assert time.monotonic() < end
        last |= {output.request_id: output for output in engine.step()}
    return last


def run_with(engine: Engine, happens, when) -> list[list[int]]:
    """Runs `work()`; once `when(stats)` holds, `happens()`."""
    for index, (tokens, params) in enumerate(work()):
        engine.add_request(f"r{index}", tokens, params)
    last = steps(engine, lambda: when(engine.stats()) or not engine.has_unfinished())
    assert engine.has_unfinished()  # it happens in the middle
    happens()
    last |= steps(engine, lambda: not engine.has_unfinished())
    assert all(output.finished and output.error is None for output in last.values())
    return ids(last[f"r{index}"] for index in range(len(last)))


def paged_some(stats: dict) -> bool:
    return stats["paging"]["bytes_out"] >= 12 * PAGE_BYTES


def test_a_lender_that_is_killed_costs_recomputation_only(folder, expected):
    path = new_name()
    with processes.lender(path, "1MiB") as lender, leftovers() as left:
        with tight(folder, policy="fair", slice_steps=8, peer=path, host_kv_memory=0) as engine:
            got = run_with(engine, lambda: lender.signal(signal.SIGKILL), paged_some)
            stats = engine.stats()
        assert left() == []
    assert got == expected
    assert stats["paging"]["stores"][0]["lost"] and stats["pages"]["in_use"] == 0
    assert stats["recomputed_tokens"] > 0 and stats["pool_resets"] == 0


@pytest.mark.parametrize("host_pages", [0, 64])
def test_a_lender_that_wants_its_memory_back_gets_it(folder, expected, host_pages):
    with lending(64 * PAGE_BYTES) as lender:
        with tight(
            folder, policy="fair", slice_steps=8, peer=lender.path, verify_pages=True,
            host_kv_memory=host_pages * PAGE_BYTES,
        ) as engine:
            got = run_with(engine, lambda: lender.lender.resize(4 * PAGE_BYTES), paged_some)
            stats = engine.stats()
            assert lender.lender.grants.held <= 4 * PAGE_BYTES
    assert got == expected
    check_nothing_in_use(stats)
    assert stats["paging"]["stores"][0]["capacity"] <= 4
    assert stats["paging"]["moves_failed"] == {}


def test_pages_that_change_in_the_store_are_computed_again(folder, expected):
    with tight(folder, policy="fair", slice_steps=8, verify_pages=True) as engine:
        store = engine._scheduler.residency.tiers.stores[0]

        def corrupt():
            for slot in store.live():
                at = store.offset(slot) + 100
                store.arena.write(at, bytes([store.arena.read(at, 1)[0] ^ 1]))

        got = run_with(engine, corrupt, paged_some)
        stats = engine.stats()
    assert got == expected
    check_nothing_in_use(stats)
    assert stats["paging"]["moves_failed"]["MISMATCH"] > 0 and stats["recomputed_tokens"] > 0


def test_a_failed_step_with_moves_under_way(folder, expected):
    copy_queue.set_delay(13, 5000)
    with tight(folder, policy="fair", slice_steps=8) as engine:

        def fail():
            dispatch = engine._runner.dispatch

            def failing(plan):
                engine._runner.dispatch = dispatch
                raise jax.errors.JaxRuntimeError("device lost")

            engine._runner.dispatch = failing

        got = run_with(engine, fail, lambda s: paged_some(s) and s["paging"]["outstanding"])
        stats = engine.stats()
    assert got == expected
    check_nothing_in_use(stats)
    assert stats["pool_resets"] == 1


def test_the_timeline_shows_who_is_away_and_what_moves(folder, tmp_path):
    path = tmp_path / "events.json"
    with tight(folder, policy="fair", slice_steps=8, trace_events=str(path)) as engine:
        run_all(engine, work())
    events = json.loads(path.read_text())
    begun = collections.Counter(e["name"] for e in events if e["ph"] in "Bb")
    assert begun["out to host"] > 0 and begun["in from host"] > 0
    assert begun["swapped out"] > 0 and begun["running"] >= begun["swapped out"] + 12
    ends = collections.Counter(e["name"] for e in events if e["ph"] == "e")
    assert ends["out to host"] == begun["out to host"]
    assert sum(e["ph"] == "i" and e["name"] == "finished: length" for e in events) == 12


# What is opened at the start.


def test_sizes_of_the_stores(folder, monkeypatch):
    with tight(folder) as engine:
        (host,) = engine.stats()["paging"]["stores"]
        assert host["name"] == "host" and host["slot_bytes"] == PAGE_BYTES
        assert host["capacity"] == 4 * POOL // 16
    monkeypatch.setattr(tiers, "available_memory", lambda: 40 * PAGE_BYTES)
    with tight(folder) as engine:
        assert engine.stats()["paging"]["stores"][0]["capacity"] == 10
    with lending(24 * PAGE_BYTES) as lender:
        with tight(folder, peer=lender.path, peer_kv_memory=10 * PAGE_BYTES) as engine:
            peer, host = engine.stats()["paging"]["stores"]
            assert (peer["name"], peer["capacity"], host["name"]) == ("peer", 10, "host")
            # Of what is left it takes all.
            with tight(folder, peer=lender.path, host_kv_memory=0) as second:
                assert [s["capacity"] for s in second.stats()["paging"]["stores"]] == [14]


def peer_of(engine: Engine) -> dict:
    """What is shown of the lenders' tier."""
    return engine.stats()["paging"]["stores"][0]


def test_free_memory_in_pieces_is_borrowed_piece_by_piece(folder):
    with lending(32 * PAGE_BYTES) as lender:
        borrower = Borrower(lender.path)
        leases = [borrower.borrow(8 * PAGE_BYTES) for _ in range(4)]
        leases[0].close()
        leases[2].close()
        wait_for(lambda: borrower.status()["free"] == 16 * PAGE_BYTES, "two pieces are free")
        with tight(folder, peer=lender.path, host_kv_memory=0) as engine:
            assert peer_of(engine)["capacity"] == 8
            wait_for(lambda: engine.tend() or peer_of(engine)["capacity"] == 16)
            assert [one["leases"] for one in peer_of(engine)["lenders"]] == [2]
        borrower.close()


def test_a_lender_without_room_is_asked_on(folder, expected):
    with lending(64 * PAGE_BYTES) as lender, Borrower(lender.path) as first:
        lease = first.borrow(64 * PAGE_BYTES)
        with tight(
            folder, peer=lender.path, host_kv_memory=0, warmup="minimal", policy="fair"
        ) as engine:
            assert peer_of(engine)["capacity"] == 0 and not peer_of(engine)["lost"]
            assert ids(run_all(engine, work()[:4])) == expected[:4]
            assert engine.stats()["paging"]["bytes_out"] == 0
            lease.close()
            wait_for(lambda: engine.tend() or peer_of(engine)["capacity"] == 64)
            assert ids(run_all(engine, work())) == expected
            stats = engine.stats()
    check_nothing_in_use(stats)
    assert stats["paging"]["bytes_out"] > 0 and stats["compiles_after_warmup"] == 0


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"policy": "fcfs"}, "policy fcfs recomputes"),
        ({"host_kv_memory": 0}, "there is no memory to move pages to"),
        ({"attention": "reference"}, "attention reference may rewrite pages"),
    ],
)
def test_without_stores_there_is_no_pager(folder, settings, why):
    with tight(folder, **settings) as engine:
        run_all(engine, work(4, 30))
        stats = engine.stats()
        assert stats["paging"] is None
        assert stats["implementations"]["moves"].startswith(f"none: {why}")
        assert engine._runner._spec.max_moves == 0


def test_without_the_library_pages_are_recomputed(folder, monkeypatch, expected):
    use = library.use
    monkeypatch.setattr(
        library, "use", lambda target: target != "aqua_enqueue_moves" and use(target)
    )
    with tight(folder) as engine:
        assert ids(run_all(engine, work())) == expected
        assert engine.stats()["implementations"]["moves"].startswith("none: ")
    for asked in ({"host_kv_memory": 1 << 20}, {"peer": "a socket"}):
        with pytest.raises(ConfigError, match=r"(0 or null|empty) here: "):
            tight(folder, **asked)


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"peer": "@nobody-listens-here"}, "peer"),
        ({"peer": "x" * 300}, "peer"),
        ({"peer": "PATH", "peer_kv_memory": 100}, "peer_kv_memory"),
        ({"peer": "PATH", "policy": "fcfs"}, "peer"),
        ({"peer": 3}, "peer"),
        ({"peer_kv_memory": 1 << 20}, "peer_kv_memory"),
        ({"host_kv_memory": 100}, "host_kv_memory"),
        ({"host_kv_memory": 1 << 50}, "host_kv_memory"),
        ({"host_kv_memory": -1}, "host_kv_memory"),
        ({"host_kv_memory": 1 << 20, "policy": "fcfs"}, "host_kv_memory"),
        ({"host_kv_memory": 1 << 20, "attention": "reference"}, "host_kv_memory"),
        ({"peer": "PATH", "attention": "reference"}, "peer"),
        ({"verify_pages": 1}, "verify_pages"),
    ],
)
def test_impossible_stores_are_refused(folder, settings, field):
    with lending(8 * PAGE_BYTES) as lender, leftovers() as left:
        values = {k: lender.path if v == "PATH" else v for k, v in settings.items()}
        with pytest.raises(ConfigError) as caught:
            tight(folder, **values)
        assert caught.value.field == field
        wait_for(lambda: left() == [], "the lender closes its end of the connection, too")


def test_what_was_borrowed_is_given_back_when_the_start_fails(folder, monkeypatch):
    def fail(*_):
        raise RuntimeError("no programs today")

    monkeypatch.setattr(startup.Programs, "warm_up", fail)
    with lending(8 * PAGE_BYTES) as lender, leftovers() as left:
        with pytest.raises(RuntimeError, match="no programs"):
            tight(folder, peer=lender.path)
        wait_for(lambda: left() == [], "the lender closes its end of the connection, too")


def test_swapping_policies():
    assert [p for p in ("fair", "fcfs", "fcfs_swap", "priority")
            if EngineConfig(model="m", policy=p).swaps] == list(SWAPPING)
