"""Page moves from plan to report, through the engine's own compiled programs and real copies."""

from __future__ import annotations

import signal

import jax
import numpy as np
import pytest

from aqua_jax.memory.borrower import connect
from aqua_jax.memory.stores import HostStore, PeerStore
from aqua_jax.ops import moves as copy_queue
from aqua_jax.ops.moves import MoveBatch, MovePool, Segment
from aqua_jax.paging.moves import Shift
from tests.engine.driving import run_all, tiny_engine
from tests.engine.paged import MAX_MOVES, PAGE_BYTES, PAGE_TOKENS, Paged, paged_engine
from tests.engine.test_engine import greedy, prompt
from tests.faults import processes
from tests.memory.leftovers import leftovers
from tests.memory.lending import lending, new_name, wait_for
from tests.scale import scaled


def host(slots: int = 16, name: str = "host") -> HostStore:
    return HostStore(slots * PAGE_BYTES, PAGE_BYTES, PAGE_TOKENS, name=name)


def peer(path: str, slots: int = 16) -> PeerStore:
    lease = connect(path, slots * PAGE_BYTES)
    assert lease is not None
    return PeerStore(lease, PAGE_BYTES, PAGE_TOKENS)


def out_and_in(paged: Paged, store, pages: int = 4) -> tuple[list, dict]:
    """Stores the first pages; the slots, and the moves that ended."""
    slots = store.allocate(pages)
    paged.ask(*(paged.out(page, store, slots[page]) for page in range(pages)))
    paged.run()
    for slot in slots:
        store.fill(slot, PAGE_TOKENS)
    return slots, paged.planner.ends()


@pytest.mark.parametrize("busy", [True, False])
def test_pages_come_back_exact_on_steps_and_without_any(tmp_path, busy):
    store = host()
    with paged_engine(tmp_path, [store]) as paged:
        before = paged.content
        ids = [page.id for page in paged.pages]
        if busy:
            paged.add("a")
        slots, ends = out_and_in(paged, store)
        assert list(ends.values()) == [True] * 4
        if busy:
            paged.add("b")
        paged.ask(*(paged.back(8 + page, store, slots[page]) for page in range(4)))
        paged.run()
        after = paged.content
        np.testing.assert_array_equal(after[ids[8:12]], before[ids[:4]])
        untouched = ids[:8] + ids[12:]
        np.testing.assert_array_equal(after[untouched], before[untouched])
        assert list(paged.planner.ends().values()) == [True] * 8
        stats = paged.engine.stats()
        assert stats["compiles_after_warmup"] == 0
        assert (stats["steps"] > 0) == busy
        assert stats["paging"]["bytes_out"] == stats["paging"]["bytes_in"] == 4 * PAGE_BYTES
        assert stats["paging"]["moves_failed"] == {} and stats["paging"]["outstanding"] == 0
        assert stats["paging"]["stores"][0] == {
            "name": "host", "slot_bytes": PAGE_BYTES, "capacity": 16, "in_use": 4, "free": 12,
            "lost": False,
        }
        assert stats["paging"]["copy_busy_s"] > 0


def test_parts_of_pages_make_a_whole(tmp_path):
    store = host()
    with paged_engine(tmp_path, [store]) as paged:
        before = paged.content
        (slot,) = store.allocate(1)
        paged.ask(paged.out(0, store, slot, 0, 5))
        paged.ask(paged.out(0, store, slot, 5, 1), paged.out(0, store, slot, 6, 7))
        paged.run()
        store.fill(slot, 13)
        paged.ask(paged.back(1, store, slot, 0, 13))
        paged.run()
        after, (source, target) = paged.content, (paged.pages[0].id, paged.pages[1].id)
        np.testing.assert_array_equal(after[target][:, :, :13], before[source][:, :, :13])
        np.testing.assert_array_equal(after[target][:, :, 13:], before[target][:, :, 13:])
        token = PAGE_BYTES // PAGE_TOKENS
        stats = paged.pager.stats()
        assert (stats["bytes_out"], stats["bytes_in"]) == (13 * token, 13 * token)


class Traffic:
    """Random moves between the spare pages and slots, and what each of them must hold."""

    def __init__(self, paged: Paged, stores: list, rng: np.random.Generator) -> None:
        self.paged, self.stores, self.rng = paged, stores, rng
        self.mirror = paged.content
        self.leaving: dict = {}  # moves under way, with what they copy
        self.stored: dict = {}  # (store, slot) -> content, checksum
        self.seen = 0

    def take_ends(self) -> None:
        for move, ok, checksum in self.paged.planner.ended[self.seen :]:
            assert ok
            if move.inward:
                move.store.free(move.slot)
            else:
                assert checksum is not None
                move.store.fill(move.slot, PAGE_TOKENS)
                self.stored[move.store, move.slot] = self.leaving.pop(move), checksum
        self.seen = len(self.paged.planner.ended)

    def ask(self) -> None:
        pages = self.rng.permutation(len(self.paged.pages)).tolist()
        moves = []
        for store, slot in list(self.stored)[: self.rng.integers(0, 6)]:
            content, checksum = self.stored.pop((store, slot))
            page = pages.pop()
            self.mirror[self.paged.pages[page].id] = content
            moves.append(self.paged.back(page, store, slot, checksum=checksum))
        for _ in range(self.rng.integers(1, 6)):
            store = self.stores[self.rng.integers(0, 2)]
            for slot in store.allocate(1) or ():
                page = pages.pop()
                move = self.paged.out(page, store, slot)
                self.leaving[move] = self.mirror[self.paged.pages[page].id].copy()
                moves.append(move)
        self.paged.ask(*moves)


def test_answers_are_the_same_beside_moves_and_nothing_compiles(tmp_path):
    """Random moves of every kind under random delays, checked against a mirror, as requests run."""
    work = [(prompt(7 + 9 * i, i), greedy(30)) for i in range(6)]
    with tiny_engine(tmp_path) as plain:
        expected = [output.outputs[0].token_ids for output in run_all(plain, work)]
    with lending(16 * PAGE_BYTES) as lender:
        stores = [peer(lender.path), host()]
        with paged_engine(tmp_path, stores, verify=True) as paged:
            copy_queue.set_delay(11, 300)
            engine = paged.engine
            traffic = Traffic(paged, stores, np.random.default_rng(3))
            address = engine._runner.kv.unsafe_buffer_pointer()
            for index, (ids, params) in enumerate(work):
                engine.add_request(f"r{index}", ids, params)
            last = {}
            while engine.has_unfinished() or traffic.seen < scaled(150):
                traffic.take_ends()
                if not paged.planner.outstanding and traffic.seen < scaled(150):
                    traffic.ask()
                for output in engine.step():
                    last[output.request_id] = output
            got = [last[f"r{index}"].outputs[0].token_ids for index in range(len(work))]
            own = [page.id for page in paged.pages]
            np.testing.assert_array_equal(paged.content[own], traffic.mirror[own])
            assert engine._runner.kv.unsafe_buffer_pointer() == address
            stats = engine.stats()
    assert got == expected
    assert stats["compiles_after_warmup"] == 0 and stats["paging"]["moves_failed"] == {}
    assert stats["paging"]["bytes_in"] > 0 and stats["paging"]["wait_s"] > 0


def test_a_page_that_changed_in_its_store_does_not_come_back(tmp_path):
    store = host()
    with paged_engine(tmp_path, [store], verify=True) as paged:
        slots, _ = out_and_in(paged, store, 3)
        sums = [checksum for _, _, checksum in paged.planner.ended]
        assert len(set(sums)) == 3
        at = store.offset(slots[1]) + 1234
        store.arena.write(at, bytes([store.arena.read(at, 1)[0] ^ 16]))
        moves = [paged.back(8 + i, store, slots[i], checksum=sums[i]) for i in range(3)]
        paged.ask(*moves)
        paged.run()
        ends = paged.planner.ends()
        assert [ends[move] for move in moves] == [True, False, True]
        assert paged.pager.stats()["moves_failed"] == {"MISMATCH": 1}


def test_a_slot_that_was_freed_or_given_back_meanwhile_did_not_arrive(tmp_path):
    store = host()
    with paged_engine(tmp_path, [store]) as paged:
        slots, _ = out_and_in(paged, store, 2)
        copy_queue.set_delay(1, 20_000)
        moves = [paged.back(8 + i, store, slots[i]) for i in range(2)]
        paged.ask(*moves)
        paged.engine.step()
        store.free(slots[0])
        paged.run()
        gone = paged.back(9, store, slots[0])  # planned although it was freed: never handed over
        paged.ask(gone)
        paged.run()
        ends = paged.planner.ends()
        assert [ends[move] for move in [*moves, gone]] == [False, True, False]
        assert paged.pager.stats()["moves_failed"] == {"SLOT_STALE": 1, "SEGMENT_STALE": 1}


def test_a_killed_lender_costs_its_pages_and_nothing_else(tmp_path):
    path = new_name()
    with processes.lender(path, "1MiB") as lender, leftovers() as left:
        stores = [peer(path, 16), host(16)]
        with paged_engine(tmp_path, stores) as paged:
            paged.add("a", 60)
            for store in stores:
                out_and_in(paged, store, 4)
            slots = stores[0].live()
            copy_queue.set_delay(5, 30_000)
            paged.add("b", 60)
            lost = [paged.back(8 + i, stores[0], slots[i]) for i in range(4)]
            lost += [paged.out(14, stores[0], stores[0].allocate(1)[0])]
            kept = [paged.back(12 + i, stores[1], slot) for i, slot in enumerate(stores[1].live())]
            paged.ask(*lost, *kept)
            paged.engine.step()
            lender.signal(signal.SIGKILL)
            wait_for(lambda: not stores[0].lease.alive, "the lender's end is noticed")
            late = [paged.back(8, stores[0], slots[0]), paged.out(9, stores[0], slots[1])]
            paged.ask(*late)
            paged.run()
            ends = paged.planner.ends()
            assert not any(ends[move] for move in lost + late)
            assert all(ends[move] for move in kept)
            failed = paged.pager.stats()["moves_failed"]
            assert sum(failed.values()) == 7 and failed["SEGMENT_STALE"] >= 2
            shown = {store["name"]: store for store in paged.pager.stats()["stores"]}
            assert shown["peer"]["lost"] and not shown["host"]["lost"]
            # Its memory goes when the last slot is let go of, not before.
            assert not stores[0].lease.closed
            for slot in stores[0].live():
                stores[0].free(slot)
            paged.add("c", 3)
            paged.run()
            assert stores[0].lease.closed and paged.engine.stats()["pool_resets"] == 0
        assert left() == []


def test_a_lender_gets_its_memory_back_while_nothing_runs(tmp_path):
    """`respond` shifts from store to store; one that is gone meanwhile is no error."""
    with lending(16 * PAGE_BYTES) as lender:
        stores = [peer(lender.path), host()]
        with paged_engine(tmp_path, stores) as paged:
            content = paged.content
            (slot,), _ = out_and_in(paged, stores[0], 1)
            (place,) = stores[1].allocate(1)

            def move_down(copy):
                copy(shift := Shift(stores[0], slot, stores[1], place))
                wait_for(lambda: shift.done, "it is copied")
                stores[1].fill(place, PAGE_TOKENS)
                stores[0].give_back(16)
                copy(late := Shift(stores[0], slot, stores[1], place))
                assert late.done

            paged.planner.responses.append(move_down)
            stores[0].lease.bell.rung = True
            paged.engine.tend()
            wait_for(lambda: lender.lender.grants.held == 0, "the lender has its memory")
            back = paged.back(5, stores[1], place)
            paged.ask(back)
            paged.run()
            assert paged.planner.ends()[back]
            pages = [page.id for page in paged.pages]
            np.testing.assert_array_equal(paged.content[pages[5]], content[pages[0]])


def test_where_nothing_is_wanted_no_lease_is_looked_at(tmp_path, monkeypatch):
    """Counted: what a boundary costs doesn't depend on how many leases there are."""
    with lending(16 * PAGE_BYTES) as lender:
        stores = [*(peer(lender.path, 2) for _ in range(8)), host()]
        with paged_engine(tmp_path, stores) as paged:
            pager, looked = paged.pager, []
            for _ in range(2):
                pager.poll()
                pager.respond()
            with monkeypatch.context() as patched:
                for name in ("wanted_slots", "lost", "free_slots", "capacity"):
                    patched.setattr(PeerStore, name, property(looked.append))
                paged.planner.responses.append(looked.append)
                for _ in range(100):
                    pager.poll()
                    pager.respond()
                assert looked == []
            paged.planner.responses.clear()
            # And a wish for any of them is seen.
            lender.lender.resize(14 * PAGE_BYTES)
            wait_for(lambda: pager._bell.rung, "it rings")
            paged.planner.responses.append(looked.append)
            pager.respond()
            assert looked and pager._bell.rung, "until it is fulfilled"
            (wanting,) = [store for store in stores if store.wanted_slots]
            wanting.give_back(2)
            wait_for(lambda: lender.lender.grants.held == 14 * PAGE_BYTES, "it is back")
            pager.respond()
            assert not pager._bell.rung


def test_tickets_that_are_forgotten_have_failed(tmp_path):
    store = host()
    with paged_engine(tmp_path, [store]) as paged:
        (slot,) = store.allocate(1)
        paged.ask(paged.out(0, store, slot))
        paged.engine.step()
        paged.engine._runner.fence()
        lap = 4096
        kv = jax.numpy.zeros((1, 64))
        run = jax.jit(copy_queue.enqueue_moves, donate_argnums=0)
        with Segment(np.zeros(256, np.uint8)) as segment, MovePool.of(kv) as pool:
            for _ in range(copy_queue.RESULTS // lap):
                batch = MoveBatch(lap, pool)
                batch.copy_out(np.zeros(lap, int), segment, np.zeros(lap, int))
                kv = run(kv, batch.moves(), batch.head())
            jax.block_until_ready(kv)
            assert copy_queue.drain(30)
        paged.run()
        assert list(paged.planner.ends().values()) == [False]
        assert paged.pager.stats()["moves_failed"] == {"FORGOTTEN": 1}


def test_waiting_for_moves_counts_and_ends_with_the_first(tmp_path):
    store = host()
    with paged_engine(tmp_path, [store]) as paged:
        slots = store.allocate(2)
        copy_queue.set_delay(2, 40_000)
        paged.ask(*(paged.out(i, store, slot) for i, slot in enumerate(slots)))
        engine, calls = paged.engine, 0
        while engine.has_unfinished() or paged.queue:
            assert engine.step() == []
            calls += 1
        assert len(paged.planner.ended) == 2
        assert calls < 20  # it sleeps instead of spinning
        assert 0 < paged.pager.wait_s < 1
        assert engine.metrics.host_s < paged.pager.wait_s + 1
        assert engine.metrics.steps == 0


def fail_once(paged: Paged, monkeypatch) -> None:
    """The forward program fails after the moves of its step were handed to it."""
    forward = paged.engine._runner.programs.forward

    def failing(bucket):
        monkeypatch.setattr(paged.engine._runner.programs, "forward", forward)
        raise jax.errors.JaxRuntimeError("device lost")

    monkeypatch.setattr(paged.engine._runner.programs, "forward", failing)


def test_a_failed_step_drops_its_moves_and_those_under_way(tmp_path, monkeypatch):
    store = host()
    with paged_engine(tmp_path, [store]) as paged:
        slots, _ = out_and_in(paged, store, 3)
        copy_queue.set_delay(3, 20_000)
        paged.add("a")
        paged.ask(paged.back(8, store, slots[0]))
        paged.engine.step()
        paged.ask(paged.back(9, store, slots[1]))
        fail_once(paged, monkeypatch)
        paged.engine.step()
        assert paged.engine.stats()["pool_resets"] == 1 and paged.pager.outstanding == 0
        ended = len(paged.planner.ended)
        paged.planner.outstanding = 0  # what `Scheduler.reset` means for the planner
        paged.run()
        assert len(paged.planner.ended) == ended
        copy_queue.set_delay(0, 0)
        # The new pool takes moves as the old one did.
        paged.ask(paged.out(4, store, slots[2]), paged.back(5, store, slots[0]))
        paged.run()
        assert list(paged.planner.ends().values())[ended:] == [True, True]


@pytest.mark.parametrize("how", ["close", "die", "bug in the planner"])
def test_nothing_is_left_when_the_engine_ends(tmp_path, monkeypatch, how):
    with lending(16 * PAGE_BYTES) as lender:
        tiny_engine(tmp_path).close()  # whatever jax opens once
        copy_queue.drain(30)
        with leftovers() as left:
            stores = [peer(lender.path), host()]
            with paged_engine(tmp_path, stores) as paged:
                slots = [store.allocate(4) for store in stores]
                copy_queue.set_delay(4, 10_000)
                paged.add("a", 400)
                paged.ask(*(
                    paged.out(i, store, slot)
                    for store, taken in zip(stores, slots, strict=True)
                    for i, slot in enumerate(taken)
                ))
                paged.engine.step()
                outputs = []
                if how == "close":
                    paged.engine.close()
                    paged.engine.close()
                elif how == "die":
                    for _ in range(3):
                        fail_once(paged, monkeypatch)
                        outputs += paged.engine.step()
                else:
                    def broken(copy):
                        raise KeyError("ours")

                    paged.planner.responses.append(broken)
                    stores[0].lease.bell.rung = True
                    outputs += paged.engine.step()
                if how != "close":
                    assert [output.finished for output in outputs] == [True]
                assert paged.engine.stats()["paging"]["outstanding"] == 0
                assert not paged.pager.unfinished
                assert stores[0].lease.closed and stores[1].arena.closed
                wait_for(lambda: lender.lender.grants.held == 0, "the lender has its memory")
            wait_for(lambda: left() == [], "the lender closes its end of the connection, too")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_pool_stays_in_place_with_moves(tmp_path, dtype):
    with paged_engine(
        tmp_path, [], kv_cache_memory=64 << 20, spare=1, dtype=dtype, warm_up="none"
    ) as paged:
        programs, kv = paged.engine._runner.programs, paged.engine._runner.kv
        assert kv.nbytes > 60 << 20
        assert programs.temp_bytes(16) < kv.nbytes / 8
        analysis = programs.moves().memory_analysis()
        assert analysis.temp_size_in_bytes < 1 << 16
        assert analysis.alias_size_in_bytes >= kv.nbytes


def test_more_moves_than_the_step_was_compiled_for_are_refused(tmp_path):
    store = host(MAX_MOVES + 1)
    with paged_engine(tmp_path, [store], spare=MAX_MOVES + 1) as paged:
        paged.add("a", 30)
        slots = store.allocate(MAX_MOVES + 1)
        paged.ask(*(paged.out(i, store, slot) for i, slot in enumerate(slots)))
        outputs = paged.engine.step()
        assert outputs[0].finished and "page moves: got 25" in outputs[0].error
