"""One model on several CPU devices: the same answers, pages that move part by part, faults."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from aqua_jax.config import SamplingParams
from aqua_jax.errors import ConfigError
from aqua_jax.memory.stores import HostStore
from aqua_jax.ops.moves import Status
from tests.engine.driving import run_all, tiny_engine
from tests.engine.paged import PAGE_BYTES, PAGE_TOKENS, paged_engine
from tests.engine.schedules import Catalogue, Schedule, check
from tests.engine.test_engine import greedy, prompt
from tests.engine.test_schedules import SCALE, requests
from tests.scale import at_scale

# Of random schedules: of all pages changed, a failed step, a lender that is killed.
SEEDS = (7, 9, *range(10, at_scale(10, 150)))


def work() -> list[tuple[list[int], SamplingParams]]:
    """Prompts that cross pages and steps; forks, penalties, log probabilities."""
    params = [
        greedy(12), SamplingParams(temperature=0.0, logprobs=5, prompt_logprobs=3, max_tokens=9),
        SamplingParams(temperature=0.8, seed=5, n=2, max_tokens=7),
        SamplingParams(temperature=0.0, presence_penalty=1.0, max_tokens=8, ignore_eos=True),
    ]
    return [(prompt(11 * i + 5, i), params[i % len(params)]) for i in range(8)]


@pytest.fixture(scope="module")
def alone(folder):
    """What one device says."""
    with tiny_engine(folder) as engine:
        return run_all(engine, work())


@pytest.mark.parametrize(
    ("devices", "settings"),
    [(2, {"warmup": "full", "max_step_tokens": 16, "max_num_seqs": 4}), (4, {}),
     (2, {"attention": "reference", "matmul": "xla"})],
    ids=["two", "four", "two without kernels"],
)
def test_answers_are_those_of_one_device(folder, alone, devices, settings):
    with tiny_engine(folder, tensor_parallel=devices, **settings) as engine:
        outputs = run_all(engine, work())
        stats = engine.stats()
    assert stats["pages"]["in_use"] == 0
    assert stats["compiles_after_warmup"] == 0 and stats["compiles"] > 0
    for ours, theirs in zip(outputs, alone, strict=True):
        for sample, other in zip(ours.outputs, theirs.outputs, strict=True):
            assert sample.token_ids == other.token_ids
            for entry, wanted in zip(sample.logprobs or (), other.logprobs or (), strict=True):
                assert entry.keys() == wanted.keys()
                for token, value in entry.items():
                    assert value.logprob == pytest.approx(wanted[token].logprob, abs=1e-5)


def test_each_device_has_its_part_of_weights_and_pool_in_place(folder):
    with tiny_engine(folder, kv_cache_memory=32 << 20) as engine:
        (whole,) = engine.stats()["memory"]["devices"]
    with tiny_engine(folder, kv_cache_memory=32 << 20, tensor_parallel=2) as engine:
        programs, kv, stats = engine._runner.programs, engine._runner.kv, engine.stats()
        assert programs.temp_bytes(16) < kv.nbytes / 2 / 8
        addresses = [shard.data.unsafe_buffer_pointer() for shard in kv.addressable_shards]
        run_all(engine, work()[:3])
        kv = engine._runner.kv
        assert addresses == [s.data.unsafe_buffer_pointer() for s in kv.addressable_shards]
    devices = stats["memory"]["devices"]
    assert stats["tensor_parallel"] == 2
    assert [device["device"] for device in devices] == [str(d) for d in jax.local_devices()[:2]]
    for device in devices:
        assert device["pool"] == whole["pool"] / 2 == stats["memory"]["pool"]
        assert whole["weights"] / 2 < device["weights"] < whole["weights"] * 0.7


@pytest.mark.parametrize("devices", [2, 4])
def test_random_schedules_say_the_same(folder, devices):
    heads = max(2, devices)  # with four devices every kv head is there twice
    scale = dataclasses.replace(SCALE, page_bytes=PAGE_BYTES * heads // 2)
    settings = {"deterministic": True, "tensor_parallel": devices}
    with tiny_engine(folder, kv_cache_tokens=16384, policy="fcfs", **settings) as roomy:
        catalogue = Catalogue(requests(), roomy)
        for seed in SEEDS:
            schedule = Schedule(seed, scale, catalogue.requests)
            wanted = catalogue.answers(schedule.chosen)
            answers, stats = schedule.run(lambda **more: tiny_engine(folder, **settings, **more))
            check(schedule, answers, stats, wanted)
            assert stats["preemptions"] > 0


@pytest.fixture
def store():
    with HostStore(16 * PAGE_BYTES, PAGE_BYTES, PAGE_TOKENS) as found:
        yield found


def test_a_slot_holds_every_devices_heads(folder, store):
    slots = store.allocate(3)
    with paged_engine(folder, [store], verify=True, tensor_parallel=2) as paged:
        before = paged.content
        ends = [paged.out(page, store, slot) for page, slot in enumerate(slots)]
        ends[2] = paged.out(2, store, slots[2], start=4, count=9)
        paged.ask(*ends)
        paged.add("r")
        paged.run()
        assert paged.planner.ends() == dict.fromkeys(ends, True)
        for slot in slots:
            store.fill(slot, PAGE_TOKENS)
        sums = {move: checksum for move, _, checksum in paged.planner.ended}
        for page, slot in enumerate(slots[:2]):
            stored = np.frombuffer(store.arena.read(store.offset(slot), PAGE_BYTES), np.float32)
            whole = before[paged.pages[page].id]  # [L, 2, page_tokens, K, D]
            both = np.stack([whole[..., :1, :], whole[..., 1:, :]])
            assert (stored.reshape(both.shape) == both).all()
        paged.planner.ended.clear()
        back = [
            paged.back(5, store, slots[0], checksum=sums[ends[0]]),
            paged.back(6, store, slots[1], checksum=sums[ends[0]]),  # another page's
            paged.back(7, store, slots[2], 4, 9, checksum=sums[ends[2]]),
        ]
        paged.ask(*back)
        paged.run()
        assert paged.planner.ends() == {back[0]: True, back[1]: False, back[2]: True}
        after = paged.content
        assert paged.pager.stats()["bytes_out"] == 2 * PAGE_BYTES + PAGE_BYTES * 9 // 16
    ids = [handle.id for handle in paged.pages]
    assert (after[ids[5]] == before[ids[0]]).all()
    assert (after[ids[7]][:, :, 4:13] == before[ids[2]][:, :, 4:13]).all()
    assert (after[ids[7]][:, :, :4] == before[ids[7]][:, :, :4]).all()


@pytest.mark.parametrize("device", [0, 1])
def test_one_devices_wrong_bytes_fail_the_move(folder, store, device):
    slots = store.allocate(2)
    with paged_engine(folder, [store], verify=True, tensor_parallel=2) as paged:
        out = [paged.out(page, store, slot) for page, slot in enumerate(slots)]
        paged.ask(*out)
        paged.run()
        sums = {move: checksum for move, _, checksum in paged.planner.ended}
        paged.planner.ended.clear()
        for slot in slots:
            store.fill(slot, PAGE_TOKENS)
        at = store.offset(slots[0]) + device * PAGE_BYTES // 2 + 100
        store.arena.write(at, bytes([store.arena.read(at, 1)[0] ^ 1]))
        back = [
            paged.back(5 + i, store, slot, checksum=sums[out[i]]) for i, slot in enumerate(slots)
        ]
        paged.ask(*back)
        paged.run()
        assert paged.planner.ends() == {back[0]: False, back[1]: True}
        assert paged.pager.stats()["moves_failed"] == {Status.MISMATCH.name: 1}


def test_a_device_whose_copies_fail_costs_recomputation_and_changes_no_answer(folder):
    """From some step on one of two devices' copies all fail; the other's go on."""
    settings = {"kv_cache_tokens": 16 * 14, "policy": "fair", "slice_steps": 4,
                "deterministic": True, "tensor_parallel": 2, "host_kv_memory": 64 * PAGE_BYTES}
    asked = [(prompt(40, index), greedy(24)) for index in range(6)]
    with tiny_engine(folder, **{**settings, "kv_cache_tokens": 4096}) as engine:
        wanted = [output.outputs[0].token_ids for output in run_all(engine, asked)]
    with tiny_engine(folder, **settings) as engine:
        engine._scheduler.costs.swap = lambda tokens, unsaved: 0.0
        pager, step, count = engine._pager, engine._runner.dispatch, 0
        pool = pager._copies._pools[1]

        def dispatch(plan):
            nonlocal count
            count += 1
            if count == 40:
                engine._runner.fence()
                pool.close()  # natively: the copy queue refuses it from now on
                pool._closed = False
            return step(plan)

        engine._runner.dispatch = dispatch
        outputs = run_all(engine, asked)
        paging = engine.stats()["paging"]
        pool._closed = True
        assert engine.stats()["pages"]["in_use"] == 0
    assert [output.outputs[0].token_ids for output in outputs] == wanted
    assert paging["moves_failed"].keys() == {Status.POOL_STALE.name}
    assert paging["bytes_in"] > 0 and sum(paging["moves_failed"].values()) > 3
    assert paging["outstanding"] == 0 and paging["stores"][0]["in_use"] == 0


@pytest.mark.parametrize(
    ("devices", "what"), [(3, "4 attention heads"), (0, "integer > 0")]
)
def test_what_cannot_be_is_refused(folder, devices, what):
    with pytest.raises(ConfigError, match=what) as caught:
        tiny_engine(folder, tensor_parallel=devices)
    assert caught.value.field == "tensor_parallel" and caught.value.value == devices
