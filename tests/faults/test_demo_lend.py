"""`make demo-lend` on a tiny model: all its processes, the whole story."""

from __future__ import annotations

import os

import pytest
from rich.console import Console

from aqua_jax.bench.workloads import random_prompts
from tests.faults.scripts import scripts
from tests.tiny import write_config


@pytest.fixture(scope="module")
def demos():
    """scripts/demo_lend.py and the display that it shares."""
    with scripts("demo", "demo_lend") as modules:
        yield modules


def test_it_lends_takes_back_and_lends_again_and_answers_everybody(demos, tmp_path, monkeypatch):
    demo, demo_lend = demos
    monkeypatch.setattr(demo_lend, "_HOLD_S", 0.2)
    model = write_config(tmp_path / "model")
    burst = demo.Burst(random_prompts(12, 60, 3, 131), [""] * 12, 140, 16)
    own = demo.Burst(random_prompts(4, 60, 4, 131), [""] * 4, 200, 16)
    common = [
        f"--model={model}", "--load_format=dummy", "--max_num_seqs=16", "--max_step_tokens=64",
        "--warmup=minimal", f"--compile_cache_dir={tmp_path / 'cache'}",
    ]
    with open(tmp_path / "said", "w") as said:
        console = Console(file=said, width=100)
        with demo_lend.engines(tmp_path, common, burst, own, 16) as (consumer, producer):
            display = demo.Display(console, [consumer.view, producer.view], plain=True)
            seen = demo_lend.Demo(consumer, producer, display).run(burst, own)
        processes = consumer.service.process, producer.service.process
        demo_lend.summary(seen, consumer.view, producer.view, display)
    text = "\n".join(
        f"{path.name}: {path.read_text(errors='replace')[-3000:]}"
        for path in (tmp_path / "said", *sorted(tmp_path.glob("*.log")))
    )
    assert seen.problems == [], text
    assert "12 of 12 requests answered" in text and "4 of 4 requests answered" in text, text
    # Nothing of `least_lent`: what is lent is looked at now and then, and pages may go and come
    # back between two looks. What has come back is counted.
    assert seen.lent_idle == seen.lent_again > 0, (seen, text)
    assert seen.borrowed > 0 and seen.taken_back > 0 and seen.taking_s > 0.0, (seen, text)
    assert all(process.poll() is not None for process in processes)
    assert not [name for name in os.listdir("/proc/self/fd") if "aqua-demo" in name]


def test_a_process_that_does_not_start_is_an_error_and_ends_the_others(demos, tmp_path):
    demo, demo_lend = demos
    burst = demo.Burst([[5] * 20], [""], 20, 16)
    with pytest.raises(RuntimeError, match=r"the producer did not start: .*nowhere"):
        with demo_lend.engines(tmp_path, ["--model=/nowhere"], burst, burst, 16):
            raise AssertionError
