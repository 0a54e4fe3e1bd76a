"""Two devices, each with a lender of its own: pages that exist only while both have their parts."""

from __future__ import annotations

import contextlib
import dataclasses
import signal

import numpy as np
import pytest

from aqua_jax.config import EngineConfig
from aqua_jax.engine import device_mapping
from aqua_jax.engine.engine import Engine
from aqua_jax.engine.shifts import Shifter
from aqua_jax.errors import ConfigError
from aqua_jax.memory.borrower import Borrower, connect
from aqua_jax.memory.split import SplitStore
from aqua_jax.memory.stores import HostStore, PeerStore
from aqua_jax.ops import moves as copy_queue
from aqua_jax.ops.moves import Status
from aqua_jax.paging.moves import Shift
from tests.coordinator.running import coordinator
from tests.engine.driving import run_all, tiny_engine
from tests.engine.paged import PAGE_BYTES, PAGE_TOKENS, paged_engine
from tests.engine.schedules import Catalogue, Schedule, check
from tests.engine.test_borrowing import lenders, lent
from tests.engine.test_paging import (
    check_nothing_in_use,
    ids,
    paged_some,
    peer_of,
    run_with,
    tight,
    work,
)
from tests.engine.test_schedules import SCALE, requests
from tests.faults import processes
from tests.memory.leftovers import leftovers
from tests.memory.lending import lending, new_name, wait_for
from tests.scale import at_scale

PART = PAGE_BYTES // 2
SETTINGS = {"policy": "fair", "slice_steps": 8, "tensor_parallel": 2}
# Of random schedules: of a lender that takes back, changes its mind, is killed, of several.
SEEDS = range(2, at_scale(6, 80))

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture(scope="module")
def expected(folder) -> list[list[int]]:
    """Answers to `work()` with a pool that holds everything."""
    settings = {"deterministic": True, "kv_cache_tokens": 4096, "tensor_parallel": 2}
    with tiny_engine(folder, **settings) as engine:
        return ids(run_all(engine, work()))


@contextlib.contextmanager
def split_store(slots: int = 16):
    """A store over two lenders."""
    with contextlib.ExitStack() as stack:
        parts = []
        for _ in range(2):
            lender = stack.enter_context(lending(slots * PART))
            lease = connect(lender.path, slots * PART)
            assert lease is not None
            parts.append(PeerStore(lease, PART, PAGE_TOKENS))
        yield stack.enter_context(SplitStore(parts, (0, 1), PAGE_TOKENS))


def test_each_lender_has_its_devices_heads_and_pages_come_back_exact(folder):
    with split_store() as store, paged_engine(
        folder, [store], verify=True, tensor_parallel=2
    ) as paged:
        before, pages = paged.content, [page.id for page in paged.pages]
        slots = store.allocate(4)
        ends = [paged.out(page, store, slots[page]) for page in range(3)]
        ends += [paged.out(3, store, slots[3], start=4, count=9)]
        paged.add("r")
        paged.ask(*ends)
        paged.run()
        assert paged.planner.ends() == dict.fromkeys(ends, True)
        for slot in slots:
            store.fill(slot, PAGE_TOKENS)
        for page, slot in enumerate(slots[:3]):
            for device, part in enumerate(store.parts):
                held = np.frombuffer(part.lease.read(slot.id * PART, PART), np.float32)
                own = before[pages[page]][..., device : device + 1, :]  # [L, 2, page_tokens, K, D]
                assert (held.reshape(own.shape) == own).all()
        sums = {move: checksum for move, _, checksum in paged.planner.ended}
        paged.planner.ended.clear()
        # One byte of one device's part of one page.
        at = slots[1].id * PART + 100
        lease = store.parts[1].lease
        lease.write(at, bytes([lease.read(at, 1)[0] ^ 1]))
        back = [paged.back(8 + i, store, slots[i], checksum=sums[ends[i]]) for i in range(3)]
        back += [paged.back(11, store, slots[3], 4, 9, checksum=sums[ends[3]])]
        paged.ask(*back)
        paged.run()
        assert paged.planner.ends() == dict(zip(back, [True, False, True, True], strict=True))
        assert paged.pager.stats()["moves_failed"] == {Status.MISMATCH.name: 1}
        after = paged.content
        for mine, came in ((0, 8), (2, 10)):
            np.testing.assert_array_equal(after[pages[came]], before[pages[mine]])
        np.testing.assert_array_equal(
            after[pages[11]][:, :, 4:13], before[pages[3]][:, :, 4:13]
        )


def test_shifts_go_between_two_lenders_and_one_memory(folder):
    host = HostStore(8 * PAGE_BYTES, PAGE_BYTES, PAGE_TOKENS)
    with split_store(8) as store, split_store(8) as other, paged_engine(
        folder, [store, other, host], tensor_parallel=2
    ) as paged:
        before = paged.content
        slot = store.allocate(3)[2]
        paged.ask(paged.out(0, store, slot))
        paged.run()
        at = store, slot

        def shift_to(target):
            nonlocal at
            source, slot = at
            place = target.allocate(2)[1]

            def move(copy):
                source.fill(slot, PAGE_TOKENS)
                copy(shift := Shift(source, slot, target, place))
                wait_for(lambda: shift.done, "it is copied")

            paged.planner.responses.append(move)
            paged.pager._bell.rung = True
            paged.engine.tend()
            target.fill(place, PAGE_TOKENS)
            at = target, place

        for target in (host, other, store):
            shift_to(target)
        paged.ask(back := paged.back(5, *at))
        paged.run()
        assert paged.planner.ends()[back]
        pages = [page.id for page in paged.pages]
        np.testing.assert_array_equal(paged.content[pages[5]], before[pages[0]])


def test_between_tiers_each_device_copies_its_own_part():
    """Only it is sure to reach the memory of its lender."""
    with split_store(4) as store, HostStore(4 * PAGE_BYTES, PAGE_BYTES, PAGE_TOKENS) as host:
        done: list[tuple[int, ...]] = []
        shifter = Shifter(lambda *copy: done.append(copy))
        (slot,), (place,) = store.allocate(1), host.allocate(1)
        parts, start = [part.base for part in store.parts], host.address(place)
        shifter.begin(Shift(store, slot, host, place))
        shifter.begin(Shift(host, place, store, slot))
        shifter.begin(Shift(host, place, host, place))
        shifter.close()
        there = [start, start + PART]
        assert done == [
            *((there[device], parts[device], PART, device) for device in range(2)),
            *((parts[device], there[device], PART, device) for device in range(2)),
            (start, start, PAGE_BYTES, 0),
        ]
        assert shifter.bytes == 3 * PAGE_BYTES


@pytest.mark.parametrize("victim", [0, 1])
def test_one_of_two_lenders_killed_costs_recomputation_only(folder, expected, victim):
    copy_queue.set_delay(3, 1000)
    paths = [new_name(), new_name()]
    with contextlib.ExitStack() as stack:
        both = [stack.enter_context(processes.lender(path, "512KiB")) for path in paths]
        with leftovers() as left:
            with tight(folder, peer=",".join(paths), host_kv_memory=0, **SETTINGS) as engine:
                assert peer_of(engine)["capacity"] == (512 << 10) // PART
                got = run_with(engine, lambda: both[victim].signal(signal.SIGKILL), paged_some)
                wait_for(lambda: engine.tend() or not lenders(engine), "both's memory is let go of")
                stats = engine.stats()
                # The one that lives has all of its memory back.
                with Borrower(paths[1 - victim]) as again:
                    wait_for(lambda: again.status()["free"] == 512 << 10, "nothing of it is held")
            wait_for(lambda: left() == [], "connections end")
    assert got == expected
    check_nothing_in_use(stats)
    (peer,) = stats["paging"]["stores"]
    assert peer["lost"] and peer["leases_lost"] == 1 and peer["leases"] == 2
    assert stats["recomputed_tokens"] > 0 and stats["pool_resets"] == 0
    moved = [(one["bytes_out"], one["bytes_in"]) for one in peer["lenders"]]
    assert len(moved) == 2 and moved[0] == moved[1]
    assert sum(out for out, _ in moved) == stats["paging"]["bytes_out"] > 0


@pytest.mark.parametrize(("who", "host_pages"), [(0, 64), (1, 0), (1, 64)])
def test_what_one_lender_wants_back_goes_down_a_tier_as_whole_pages(
    folder, expected, who, host_pages
):
    with lending(64 * PART) as first, lending(80 * PART) as second:
        both = (first, second)
        with tight(
            folder, peer=f"{first.path},{second.path}", verify_pages=True,
            host_kv_memory=host_pages * PAGE_BYTES, **SETTINGS,
        ) as engine:
            assert [one["capacity"] for one in peer_of(engine)["lenders"]] == [64, 64]
            assert second.lender.grants.held == 64 * PART  # what has no counterpart isn't kept
            got = run_with(engine, lambda: both[who].lender.resize(8 * PART), paged_some)
            stats = engine.stats()
            assert first.lender.grants.held == second.lender.grants.held <= 8 * PART
        wait_for(lambda: not any(one.lender.grants.held for one in both), "all is given back")
    assert got == expected
    check_nothing_in_use(stats)
    assert stats["paging"]["stores"][0]["capacity"] <= 8
    assert stats["paging"]["moves_failed"] == {}
    assert stats["paging"]["relocated"] > 0 or not host_pages


def test_a_lender_that_has_nothing_yet_is_waited_for_and_the_other_keeps_its_memory(
    folder, expected
):
    with lending(64 * PART) as ready, lending(64 * PART) as busy, Borrower(busy.path) as holder:
        lease = holder.borrow(64 * PART)
        with tight(
            folder, peer=f"{ready.path},{busy.path}", host_kv_memory=0, warmup="minimal", **SETTINGS
        ) as engine:
            assert peer_of(engine)["capacity"] == ready.lender.grants.held == 0
            assert ids(run_all(engine, work()[:2])) == expected[:2]
            lease.close()
            wait_for(lambda: engine.tend() or peer_of(engine)["capacity"] == 64)
            assert ids(run_all(engine, work())) == expected
            stats = engine.stats()
    check_nothing_in_use(stats)
    assert stats["paging"]["bytes_out"] > 0 and stats["compiles_after_warmup"] == 0


def test_two_capped_lenders_of_a_coordinator_each(folder, expected):
    """One of them slower: no more is copied than it allows, and the whole page waits for it."""
    slow, fast = 400 * PART, 4000 * PART
    with contextlib.ExitStack() as stack:
        paths = []
        for name, cap in (("slow", slow), ("fast", fast)):
            path = new_name()
            stack.enter_context(coordinator(path, "--term_s=5", "--metrics_port=0"))
            stack.enter_context(lent(path, 64, name, cap))
            paths.append(path)
        with tight(folder, peer=",".join(paths), host_kv_memory=0, **SETTINGS) as engine:
            assert peer_of(engine)["capacity"] == 128
            assert ids(run_all(engine, work())) == expected
            stats = engine.stats()
            assert engine._scheduler.residency.tiers.paced_page_s == pytest.approx(PART / slow)
            found = lenders(engine)
    check_nothing_in_use(stats)
    assert {name: one["bandwidth_cap"] for name, one in found.items()} == {
        "slow": slow, "fast": fast
    }
    assert stats["paging"]["bytes_in"] > 0 and stats["paging"]["capped_copies"] > 0


@pytest.mark.parametrize("near", [2, 1])
def test_devices_in_different_places_each_borrow_near_memory_of_one_coordinator(
    folder, expected, monkeypatch, near
):
    """As GPUs would be. With only one lender, it has both parts of every page."""
    places = ["numa0/gpu0", "numa1/gpu1"]
    monkeypatch.setattr(device_mapping, "domain", lambda devices: places[devices[0]])
    path = new_name()
    with contextlib.ExitStack() as stack:
        stack.enter_context(coordinator(path, "--term_s=5", "--metrics_port=0"))
        for number in reversed(range(near)):
            stack.enter_context(lent(path, 32, f"at {number}", domain=places[number]))
        with tight(folder, peer=path, host_kv_memory=0, **SETTINGS) as engine:
            assert lenders(engine)  # from the start
            found = [
                tuple(part.lease.lender for part in store.parts)
                for store in engine._pager._borrowing.stores
            ]
            assert set(found) == {("at 0", f"at {near - 1}")}
            assert ids(run_all(engine, work())) == expected
            stats = engine.stats()
    check_nothing_in_use(stats)
    assert stats["paging"]["bytes_out"] > 0 and stats["paging"]["moves_failed"] == {}


def test_random_schedules_say_the_same(folder):
    """As those of one lender, beside a second one that stays."""
    scale = dataclasses.replace(SCALE, page_bytes=PART)
    settings = {"deterministic": True, "tensor_parallel": 2}
    path = new_name()
    with coordinator(path, "--term_s=5", "--metrics_port=0"), tiny_engine(
        folder, kv_cache_tokens=16384, policy="fcfs", **settings
    ) as roomy:
        catalogue = Catalogue(requests(), roomy)
        for seed in SEEDS:
            schedule = Schedule(seed, scale, catalogue.requests, path)
            wanted = catalogue.answers(schedule.chosen)
            schedule.settings["host_kv_memory"] *= 2
            with lending(64 * PART) as second:

                def make(
                    peer: str, seed: int = seed, path: str = second.path, **more: object
                ) -> Engine:
                    both = (peer, path) if seed % 2 else (path, peer)
                    return tiny_engine(
                        folder, peer=",".join(both) if peer else "", **settings, **more
                    )

                answers, stats = schedule.run(make)
                wait_for(lambda: second.lender.grants.held == 0, "all is given back")
            check(schedule, answers, stats, wanted)
            assert stats["preemptions"] > 0


def test_devices_with_the_same_lender_share_its_leases(folder, expected):
    with lending(32 * PAGE_BYTES) as lender:
        with tight(
            folder, peer=f"{lender.path},{lender.path}", host_kv_memory=0, **SETTINGS
        ) as engine:
            assert peer_of(engine)["capacity"] == 32 and peer_of(engine)["leases"] == 1
            assert ids(run_all(engine, work())) == expected
            check_nothing_in_use(engine.stats())
    with lending(24 * PAGE_BYTES) as lender, lending(8 * PAGE_BYTES) as other:
        # Four devices: three at one lender, one at the other; kv heads are there twice.
        entries = [lender.path, other.path, lender.path, lender.path]
        settings = {**SETTINGS, "tensor_parallel": 4}
        with tight(folder, peer=",".join(entries), host_kv_memory=0, **settings) as engine:
            assert peer_of(engine)["capacity"] == 16
            assert ids(run_all(engine, work())) == expected
            stats = engine.stats()
        assert stats["paging"]["bytes_in"] > 0
        check_nothing_in_use(stats)


@pytest.mark.parametrize(
    ("peer", "devices"),
    [("/a,/b", 1), ("/a,/b", 4), ("/a,/b,/c", 2), ("/a,", 2), (",", 2), (",/a", 2), ("cuda:1,", 1)],
)
def test_a_wrong_number_of_peers_is_refused(peer, devices):
    with pytest.raises(ConfigError) as caught:
        EngineConfig(model="m", peer=peer, tensor_parallel=devices)
    assert (caught.value.field, caught.value.value) == ("peer", peer)
    assert f"tensor_parallel={devices}" in caught.value.allowed or devices == 1


def test_what_one_of_them_cannot_do_is_said_at_the_start(folder):
    with lending(8 * PAGE_BYTES) as lender, leftovers() as left:
        for other in ("@nobody-listens-here", "cuda:1"):
            for both in ((lender.path, other), (other, lender.path)):
                with pytest.raises(ConfigError) as caught:
                    tight(folder, peer=",".join(both), tensor_parallel=2)
                assert caught.value.field == "peer"
        with pytest.raises(ConfigError, match="peer_kv_memory"):
            tight(folder, peer=f"{lender.path},{lender.path}", peer_kv_memory=PAGE_BYTES - 1,
                  tensor_parallel=2)
        wait_for(lambda: left() == [], "connections end")


def test_the_limit_is_of_all_lenders_together(folder):
    with lending(64 * PART) as first, lending(64 * PART) as second:
        with tight(
            folder, peer=f"{first.path},{second.path}", peer_kv_memory=10 * PAGE_BYTES + 100,
            host_kv_memory=0, **SETTINGS,
        ) as engine:
            assert peer_of(engine)["capacity"] == 10
            assert first.lender.grants.held == second.lender.grants.held == 10 * PART
