"""`make demo` on a tiny model: three runs, a lender process that gets killed; the board."""

from __future__ import annotations

import json
import os

import pytest
from rich.console import Console

from aqua_jax.bench.workloads import random_prompts
from aqua_jax.config import EngineConfig
from aqua_jax.ops import library
from tests.faults.scripts import scripts
from tests.tiny import write_config


@pytest.fixture(scope="module")
def demo():
    """scripts/demo.py and its board."""
    with scripts("demo", "demo_board") as modules:
        yield modules


def test_the_lender_dies_and_everything_finishes(demo, tmp_path, monkeypatch):
    demo, demo_board = demo
    monkeypatch.setattr(demo, "_LOOK_EVERY_S", 0.0)
    assert library.use("aqua_enqueue_moves"), library.reason()
    prompts = random_prompts(16, 20, 3, 131)
    burst = demo.Burst(prompts, [str(ids) for ids in prompts], 40, 16)
    config = EngineConfig(
        model=str(write_config(tmp_path / "model")), load_format="dummy", dtype="bfloat16",
        kv_cache_tokens=-(-burst.pages // 4) * 16, max_num_seqs=16, max_step_tokens=64,
        warmup="none", deterministic=True, slice_steps=4,
    )
    assert burst.pages == 16 * 4
    views = [
        demo_board.RunView(title, ["waiting"] * 16) for title in ("fcfs", "fair", "fair, killed")
    ]
    with open(tmp_path / "said", "w") as said:
        console = Console(file=said, width=100)
        display = demo.Display(console, views, plain=True)
        results = demo.run_all(config, burst, display, tmp_path)
        good = demo.report(results, burst, views[2], display)
    said = (tmp_path / "said").read_text()
    assert good and [one.unfinished for one in results.values()] == [0, 0, 0]
    last = results["fair, lender killed"]
    assert views[2].note.startswith("lender killed at") and views[2].note in said
    assert last.lost_requests > 0 and last.metrics["recomputed_tokens"] > 0
    assert results["fair"].metrics["paged_out_mib"] > 0
    assert results["fair"].metrics["compiles_after_warmup"] == 0
    # Deterministic: whatever happened, the answers are the same.
    assert all(one.tokens == results["fcfs"].tokens for one in results.values())
    assert "16 of 16 requests finished" in said and "fair, killed" not in said.split("What was")[1]
    assert json.loads((tmp_path / "fair.trace.json").read_text())
    assert not [name for name in os.listdir("/proc/self/fd") if "aqua-demo" in name]


def test_the_board_shows_states_in_any_encoding(demo):
    _, board = demo
    states = [*board.STATES, *["running"] * 12]
    view = board.RunView(
        "fair", states, [("pool", 3, 4), ("lender", 0, 0)], [0.5, 1.5], 30, 2.0, True, "killed"
    )
    assert view.line().startswith("fair:   2.0 s: 1 done, 13 running, 1 in the lender's memory")
    for encoding, mark in (("utf-8", "◐"), ("ascii", "P")):
        with open(os.devnull, "w", encoding=encoding) as sink:
            console = Console(file=sink, width=100, record=True, force_terminal=True)
            console.print(board.board([view, view], console))
            text = console.export_text()
        assert mark in text and "pool" in text and "3/4" in text and "killed" in text
        assert "15 tokens/s" in text and "(2 of 19)" in text
        text.encode(encoding)
