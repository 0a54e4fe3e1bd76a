"""Engines that borrow through a coordinator: same answers, whoever comes, goes, hangs or dies."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from aqua_jax.engine.engine import Engine
from aqua_jax.memory import link
from aqua_jax.memory.arena import Arena
from aqua_jax.memory.client import Client
from aqua_jax.memory.loan import Lending
from aqua_jax.ops import moves as copy_queue
from tests.coordinator.running import Running, coordinator
from tests.engine.driving import run_all, tiny_engine
from tests.engine.paged import PAGE_BYTES
from tests.engine.test_paging import check_nothing_in_use, ids, paged_some, steps, tight, work
from tests.faults import coordinated, processes
from tests.memory.leftovers import leftovers
from tests.memory.lending import new_name, wait_for

SLICES = {"policy": "fair", "slice_steps": 8}


@pytest.fixture(scope="module")
def expected(folder) -> list[list[int]]:
    """Answers to `work()` with a pool that holds everything."""
    with tiny_engine(folder, deterministic=True, kv_cache_tokens=4096) as engine:
        return ids(run_all(engine, work()))


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with coordinator(new_name(), "--term_s=5", "--metrics_port=0") as found:
        yield found


@contextlib.contextmanager
def lent(
    path: str, pages: int, name: str, cap: int = 0, domain: str = ""
) -> Iterator[Lending]:
    """Pages of this process's, lent through the coordinator; afterwards all are back."""
    with Arena.create(pages * PAGE_BYTES) as arena, Client(
        path, name=name, domain=domain
    ) as client:
        lending = client.lend(arena, name=name, cap=cap)
        # Zeroed by now, or the first to ask gets what is.
        wait_for(lambda: not sum(row.dirty for row in link.status(path).arenas), "all is ready")
        yield lending
        if lending.alive and client.connected:
            lending.reclaim(0, 5.0)
            wait_for(lambda: lending.lent == 0, "everything is back")


def begin(engine: Engine) -> None:
    for index, (tokens, params) in enumerate(work()):
        engine.add_request(f"r{index}", tokens, params)


def finish(engine: Engine, last: dict) -> list[list[int]]:
    """Runs what has begun to its end."""
    last |= steps(engine, lambda: not engine.has_unfinished())
    assert all(output.finished and output.error is None for output in last.values())
    return ids(last[f"r{index}"] for index in range(len(last)))


def until(engine: Engine, condition, last: dict) -> None:
    """Steps until it holds; work begins anew when it has ended before."""
    again = 0

    def look() -> bool:
        nonlocal again
        if not engine.has_unfinished():
            again += 1
            assert again < 50, "it never happens"
            begin(engine)
        return condition()

    last |= steps(engine, look)


def lenders(engine: Engine) -> dict[str, dict]:
    """Whose memory is there."""
    shown = engine.stats()["paging"]["stores"][0]["lenders"]
    return {one["lender"]: one for one in shown if one["leases"]}


def held(engine: Engine) -> dict[str, int]:
    """Pages in use by lender."""
    return {name: one["in_use"] for name, one in lenders(engine).items()}


def test_memory_of_two_lenders_comes_goes_and_comes_again(folder, expected, running):
    """Pages go to both; what one wants back goes to the other or the host, and climbs later."""
    with leftovers() as left:
        with lent(running.path, 8, "near") as near, lent(running.path, 64, "far") as far:
            with tight(
                folder, peer=running.path, host_kv_memory=128 * PAGE_BYTES, verify_pages=True,
                warmup="minimal", **SLICES,
            ) as engine:
                assert {n: one["capacity"] for n, one in lenders(engine).items()} == {
                    "near": 8, "far": 64,
                }
                begin(engine)
                last: dict = {}
                # Enough of them that some are there when the wish arrives, some steps later.
                until(engine, lambda: min(held(engine).values()) >= 4, last)
                far.reclaim(0, 5.0)
                until(engine, lambda: far.lent == 0 and "far" not in held(engine), last)
                assert running.held() == near.lent == 8 * PAGE_BYTES  # only as much as asked
                assert finish(engine, last) == expected
                # Somebody lends again while requests are away: what is at the host climbs.
                begin(engine)
                host = engine._scheduler.residency.tiers.stores[-1]
                until(engine, lambda: host.in_use > 4, last)
                far.reclaim(64 * PAGE_BYTES)
                for start, end in far.take_returned():
                    far.lend(start, end - start)
                climbed = engine._scheduler.residency.counters
                until(engine, lambda: climbed.climbed > 0, last)
                assert finish(engine, last) == expected
                stats = engine.stats()
            wait_for(lambda: running.held() == 0, "all is given back")
        check_nothing_in_use(stats)
        assert stats["paging"]["moves_failed"] == {} and stats["compiles_after_warmup"] == 0
        assert stats["paging"]["relocated"] > 0
    wait_for(lambda: left() == [], "connections end")


@pytest.mark.parametrize("victim", ["lender", "coordinator", "both"])
def test_what_is_killed_costs_recomputation_only(folder, expected, victim):
    path = new_name()
    with coordinator(path, "--term_s=2", "--metrics_port=0") as running, leftovers() as left:
        with coordinated.lender(path, "1MiB", "--name=mortal") as lender, tight(
            folder, peer=path, host_kv_memory=0, **SLICES
        ) as engine:
            begin(engine)
            last = steps(engine, lambda: paged_some(engine.stats()))
            if victim != "lender":
                running.kill()
            if victim != "coordinator":
                lender.signal(signal.SIGKILL)
            assert finish(engine, last) == expected
            stats = engine.stats()
            check_nothing_in_use(stats)
            if victim == "lender":
                wait_for(lambda: engine.tend() or not lenders(engine), "its memory is let go of")
            if victim == "coordinator":
                assert stats["paging"]["stores"][0]["capacity"] == (1 << 20) // PAGE_BYTES
                assert stats["recomputed_tokens"] == 0 and not stats["paging"]["moves_failed"]
            else:
                assert stats["pool_resets"] == 0
            if victim != "lender":
                running.start()
            with lent(path, 130, "next"):
                wait_for(
                    lambda: engine.tend() or lenders(engine).get("next", {}).get("capacity") == 130,
                    "the next lender's is borrowed", 20.0,
                )
                last = {}
                begin(engine)
                assert finish(engine, last) == expected
                engine.close()
    wait_for(lambda: left() == [], "connections end")


def test_a_coordinator_that_hangs_costs_the_engine_nothing(folder, expected):
    """Exactly the same steps, and no wait."""
    path = new_name()
    seen = []
    with coordinator(path, "--term_s=5", "--metrics_port=0") as running, lent(path, 128, "lender"):
        for hangs in (False, True):
            with tight(folder, peer=path, host_kv_memory=0, **SLICES) as engine:
                engine._scheduler.costs.observe_step = lambda *_: None  # plans by counts alone

                def in_order(engine: Engine = engine) -> bool:
                    engine._runner.fence()
                    assert copy_queue.drain(60)
                    return not engine.has_unfinished()

                if hangs:
                    running.signal(signal.SIGSTOP)
                begin(engine)
                last = steps(engine, in_order)
                assert finish(engine, last) == expected
                stats = engine.stats()
                running.signal(signal.SIGCONT)
            paging = stats["paging"]
            assert paging["bytes_out"] > 0
            seen.append((stats["steps"], stats["recomputed_tokens"], paging["bytes_out"]))
            assert paging["wait_s"] < 0.05
    assert seen[0] == seen[1]


class Watch:
    """What the copy queue has copied by when, looked at all the time by a thread."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, float, int]] = []  # between two moments, bytes so far
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def _look(self) -> None:
        while not self._over.wait(0.0005):
            before = time.monotonic()
            counters = copy_queue.counters()
            self.seen.append((before, time.monotonic(), counters.bytes_out + counters.bytes_in))

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def most_within(self, window: float) -> int:
        """Bytes copied between two looks that were surely at most so far apart."""
        most = first = 0
        for _, after, total in self.seen:
            while first < len(self.seen) - 1 and self.seen[first][0] < after - window:
                first += 1
            most = max(most, total - self.seen[first][2])
        return most


def test_a_lenders_bandwidth_is_kept_to_and_known(folder, expected, running):
    """Counted by the copy queue itself, while an engine pages as fast as it may."""
    cap = 40 * PAGE_BYTES * 10  # forty pages in a window
    with lent(running.path, 128, "narrow", cap) as lending:
        assert lending.terms.cap == cap
        with tight(folder, peer=running.path, host_kv_memory=0, **SLICES) as engine:
            costs = engine._scheduler.costs
            del costs.swap  # what it really says
            config = dataclasses.replace(costs.config, prefill_tokens=1000.0)
            costs.config, costs._prefill_s = config, 0.0
            prefill, costs.observe_step = costs.observe_step, lambda p, d, s: prefill(0, d, s)
            begin(engine)
            with Watch() as watch:
                got = finish(engine, {})
            stats = engine.stats()["paging"]
            assert costs._delay_s == pytest.approx(PAGE_BYTES / cap)
        assert got == expected
        (lender,) = stats["stores"][0]["lenders"]
        assert lender["bandwidth_cap"] == cap
        assert lender["bytes_out"] == stats["bytes_out"] > 0
        assert lender["bytes_in"] == stats["bytes_in"] > 0
        moved = stats["bytes_out"] + stats["bytes_in"]
        assert moved > cap * 0.2 and stats["capped_copies"] > 0 and stats["capped_s"] > 0
        assert watch.most_within(0.1) <= cap * 0.1 + PAGE_BYTES


def test_one_lenders_cap_is_one_for_all_that_it_lends(folder, running):
    """An engine lends each extent by itself."""
    with (
        Arena.create(8 * PAGE_BYTES) as one, Arena.create(8 * PAGE_BYTES) as two,
        Client(running.path, name="both") as client,
    ):
        for arena in (one, two):
            client.lend(arena, cap=1 << 20)
        with lent(running.path, 8, "other", 1 << 20), tight(
            folder, peer=running.path, host_kv_memory=0, **SLICES
        ) as engine:
            stores = engine._pager._borrowing.stores
            paces = {store.lease.lender: store.pace for store in stores}
            assert len(stores) == 3 and len(set(map(id, paces.values()))) == 2
            assert all(paces[store.lease.lender] is store.pace for store in stores)


def test_a_slow_lender_is_used_beside_a_fast_host_and_not_at_all_if_recomputing_is_faster(
    folder, expected, running
):
    with lent(running.path, 128, "narrow", 4 * PAGE_BYTES) as lending:
        with tight(
            folder, peer=running.path, host_kv_memory=256 * PAGE_BYTES, **SLICES
        ) as engine:
            begin(engine)
            assert finish(engine, {}) == expected
            stats = engine.stats()
            assert stats["recomputed_tokens"] < stats["paging"]["tokens_held"] / 4
            assert engine._scheduler.residency.tiers.stores[-1].counters.peak > 0
        with tight(folder, peer=running.path, host_kv_memory=0, **SLICES) as engine:
            del engine._scheduler.costs.swap
            begin(engine)
            assert finish(engine, {}) == expected
            stats = engine.stats()
        assert stats["recomputed_tokens"] > 0 and stats["paging"]["wait_s"] < 2.0
        assert lending.alive


def test_a_lender_that_has_been_started_again_is_borrowed_from_again(folder, expected):
    """Without a coordinator."""
    path = new_name()
    with leftovers() as left:
        with processes.lender(path, "1MiB") as lender, tight(
            folder, peer=path, host_kv_memory=64 * PAGE_BYTES, **SLICES
        ) as engine:
            begin(engine)
            last = steps(engine, lambda: paged_some(engine.stats()))
            lender.signal(signal.SIGKILL)
            assert lender.wait() == -signal.SIGKILL
            assert finish(engine, last) == expected
            wait_for(lambda: engine.tend() or not lenders(engine), "its memory is let go of")
            assert engine.stats()["paging"]["stores"][0]["lost"]
            with processes.lender(path, "512KiB"):
                wait_for(lambda: engine.tend() or lenders(engine), "the next one's is borrowed")
                begin(engine)
                before = engine.stats()["paging"]["bytes_out"]
                last = steps(engine, lambda: engine.stats()["paging"]["bytes_out"] > before)
                assert finish(engine, last) == expected
                store = engine.stats()["paging"]["stores"][0]
                assert (store["capacity"], store["lost"], store["leases_lost"]) == (64, False, 1)
                check_nothing_in_use(engine.stats())
                engine.close()
    wait_for(lambda: left() == [], "connections end")


def test_two_engines_lend_to_each_other_and_neither_to_itself(folder, expected):
    """Both lend what they don't need and borrow at the same coordinator."""
    path = new_name()
    settings: dict = {
        "peer": path, "coordinator": path, "lend": "auto", "lend_hold_s": 0.0, "lend_bandwidth": 0,
        "lend_deadline_s": 0.5, "host_kv_memory": 0, "kv_cache_tokens": 64 * 16,
        "lend_kv_memory": 48 * PAGE_BYTES, **SLICES,
    }
    with coordinator(path, "--term_s=5", "--metrics_port=0") as running, leftovers() as left:
        with tight(folder, **settings) as first:
            wait_for(lambda: first.tend() or first.stats()["lending"]["lent"] > 0, "it lends")
            time.sleep(0.5)  # it has asked for memory several times meanwhile
            first.tend()
            assert lenders(first) == {} and running.held() == 0
            with tight(folder, **settings) as second:
                both = (first, second)

                def tend() -> None:
                    for engine in both:
                        engine.tend()

                for engine in both:
                    wait_for(lambda: tend() or all(map(lenders, both)), "each borrows of the other")
                    # Under load it takes back what the other one has, and pages into the other.
                    begin(engine)
                    last: dict = {}
                    end = time.monotonic() + 60
                    while engine.has_unfinished():
                        last |= {output.request_id: output for output in engine.step()}
                        tend()
                        assert time.monotonic() < end
                    assert finish(engine, last) == expected
                    check_nothing_in_use(engine.stats())
                    assert engine.stats()["lending"]["pages_back"] > 0
    wait_for(lambda: left() == [], "connections end")
