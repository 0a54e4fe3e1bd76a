"""A look inside a running engine: states, and where the pages are of whoever gave way."""

from __future__ import annotations

import random

import pytest

from aqua_jax.config import EngineConfig, SamplingParams
from aqua_jax.engine.engine import Engine
from aqua_jax.engine.inspect import COLUMNS, Inspector, inspect
from aqua_jax.ops import library
from tests.tiny import write_config


def rows_of(engine):
    look = inspect(engine)
    return [dict(zip(look["columns"], row, strict=True)) for row in look["rows"]]


@pytest.mark.parametrize("policy", ["fcfs", "fair"])
def test_states_and_pages_add_up(tmp_path, policy):
    config = EngineConfig(
        model=str(write_config(tmp_path / "model")), load_format="dummy", dtype="float32",
        max_num_seqs=8, max_step_tokens=64, warmup="none", policy=policy, slice_steps=4,
        kv_cache_tokens=96, page_tokens=8, prefix_caching=False,
    )
    params = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True, detokenize=False)
    swapped = 0
    with Engine(config) as engine:
        for index in range(8):
            prompt = [3 + index] * 16
            engine.add_request(f"r{index}", {"prompt_token_ids": prompt}, params, user="ann")
        assert [row["state"] for row in rows_of(engine)] == ["waiting"] * 8
        while engine.has_unfinished():
            engine.step()
            stats, rows = engine.stats(), rows_of(engine)
            assert len(rows) == stats["live_requests"]
            running = [row for row in rows if row["state"] == "running"]
            assert len(running) == stats["running"]
            assert all(row["pool_pages"] > 0 for row in running)
            away = [row for row in rows if row["state"] == "swapped"]
            assert len(away) == stats["swapped"]
            swapped += sum(row["host_pages"] > 0 for row in away)
            if stats["paging"] is not None:
                held = stats["paging"]["stores"][0]["in_use"]
                assert sum(row["host_pages"] for row in rows) <= held
            else:
                assert all(row["host_pages"] is None for row in rows)
    keeps = policy == "fair" and library.use("aqua_enqueue_moves")
    assert (swapped > 0) == bool(keeps)


@pytest.mark.parametrize("policy", ["fcfs", "fair"])
def test_what_has_changed_adds_up_whatever_looks_get_lost(tmp_path, policy):
    """Every second look or so doesn't arrive; requests end, are aborted, and come again."""
    config = EngineConfig(
        model=str(write_config(tmp_path / "model")), load_format="dummy", dtype="float32",
        max_num_seqs=8, max_step_tokens=64, warmup="none", policy=policy, slice_steps=4,
        kv_cache_tokens=128, page_tokens=8, host_kv_memory=1 << 20 if policy == "fair" else 0,
    )
    draw = random.Random(7)
    rows, users, taken, arrived, swapped, small, everything = {}, {}, 0, 0, 0, 0, 0
    inspector = Inspector()
    with Engine(config) as engine:
        for step in range(400):
            if engine.num_live_requests < 12 and step < 300:
                name = f"r{draw.randrange(20)}"
                if name not in {one.output.request_id for one in engine.requests}:
                    params = SamplingParams(
                        max_tokens=draw.randint(1, 24), ignore_eos=True, detokenize=False,
                        n=draw.choice((1, 1, 3)),
                    )
                    prompt = [3 + draw.randrange(9)] * draw.randint(1, 24)
                    engine.add_request(
                        name, {"prompt_token_ids": prompt}, params, user=draw.choice("abc")
                    )
            if draw.random() < 0.03 and engine.num_live_requests:
                engine.abort(next(iter(engine.requests)).output.request_id)
            engine.step()
            if draw.random() < 0.4:
                continue
            look = inspector.look(engine, taken)
            if draw.random() < 0.5 and step < 390:
                continue
            taken, arrived = look.number, arrived + 1
            for key in look.gone:
                rows.pop(key, None)
            rows.update(look.rows)
            for user, vruntime in look.users.items():
                users[user] = vruntime
                if vruntime is None:
                    del users[user]
            whole = inspect(engine)
            assert list(rows.values()) == whole["rows"] and users == whole["users"]
            assert look.stats["swapped"] == engine.stats()["swapped"]
            swapped += look.stats["swapped"]
            small += len(look.rows)
            everything += len(rows)
        assert arrived > 60 and not rows and not users
        assert 0 < small < everything and (swapped > 0) == (policy == "fair")


def test_copies_that_went_to_another_store_are_looked_at_again(tmp_path):
    config = EngineConfig(
        model=str(write_config(tmp_path / "model")), load_format="dummy", dtype="float32",
        max_num_seqs=8, max_step_tokens=64, warmup="none", policy="fair", slice_steps=4,
        kv_cache_tokens=96, page_tokens=8, host_kv_memory=1 << 20,
    )
    params = SamplingParams(max_tokens=40, ignore_eos=True, detokenize=False)
    inspector = Inspector()
    with Engine(config) as engine:
        for index in range(8):
            engine.add_request(f"r{index}", {"prompt_token_ids": [3 + index] * 16}, params)
        residency = engine.scheduler.residency
        while sum(row["host_pages"] > 0 for row in rows_of(engine)) < 4 or residency.outstanding:
            engine.step()
        inspector.look(engine)
        assert not inspector.look(engine, 1).gone
        residency.tiers.stores[0].name = "peer"  # as if all copies had climbed
        residency.counters.climbed += 1
        changed = inspector.look(engine, 2).rows
        assert set(changed.values()) == {
            row for row in inspect(engine)["rows"] if row[COLUMNS.index("peer_pages")]
        }
