"""A look inside a running engine: states, and where the pages are of whoever gave way."""

from __future__ import annotations

import pytest

from aqua_jax.config import EngineConfig, SamplingParams
from aqua_jax.engine.engine import Engine
from aqua_jax.engine.inspect import inspect
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
