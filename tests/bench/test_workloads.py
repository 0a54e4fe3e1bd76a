"""The workloads: the ids, the sizes and the keys that comparisons rely on; a real tiny engine."""

from __future__ import annotations

import json

import pytest

from aqua_jax.bench import workloads
from aqua_jax.bench.measure import measure, table
from aqua_jax.bench.memory import peak_rss, process_tree, reset_peak
from aqua_jax.bench.workloads import Sizes, random_prompt, random_prompts, sizes_of
from aqua_jax.config import EngineConfig
from aqua_jax.engine.engine import Engine
from aqua_jax.errors import ConfigError
from tests.cli.text_model import run_command
from tests.tiny import write_config

KEYS = {
    "single": {"tok_s", "decode_tok_s", "total_s"},
    "prefill": {"ttft_s", "prompt_tok_s"},
    "batch": {"output_tok_s", "total_s"},
    "burst": {
        "ttft_p50_s", "ttft_p99_s", "tbt_p50_ms", "tbt_p99_ms", "tbt_max_ms", "worst_stall_p50_ms",
        "e2e_p50_s", "e2e_p99_s", "output_tok_s", "tokens", "total_s", "preemptions",
    },
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("bench") / "model", vocab_size=131)


@pytest.fixture(scope="module")
def config(model):
    return EngineConfig(
        model=str(model), load_format="dummy", dtype="float32", max_num_seqs=12,
        max_step_tokens=64, warmup="none", kv_cache_tokens=512, deterministic=True,
    )


def test_prompts_are_those_of_the_comparisons():
    """The very ids that the scripts for other engines draw."""
    assert random_prompt(5, 101, 32000) == [19046, 27761, 6384, 29768, 31632]
    assert random_prompts(2, 3, 300, 32000) == [
        [1864, 19573, 5737], [14134, 24790, 5117],
    ]
    assert max(random_prompt(1000, 1, 100)) < 100
    assert random_prompt(3, 1, 2) == [1, 1, 1]


def test_sizes():
    assert sizes_of("batch", None, None, None) == Sizes(64, 128, 128)
    assert sizes_of("burst", 5, 6, 7) == Sizes(5, 6, 7)
    assert sizes_of("single", 5, 6, 7) == Sizes(1, 6, 7)
    assert sizes_of("prefill", 5, None, 7) == Sizes(1, 1024, 1)
    assert workloads.pool_tokens([Sizes(2, 20, 13), Sizes(1, 5, 5)], 16) == 2 * 4 * 16


def test_a_report_has_the_keys_that_other_engines_print(config):
    sizes = {name: sizes_of(name, 12, 24, 8) for name in KEYS}
    report = measure(config, sizes, 2, Engine, own_pool=False)
    json.dumps(report, allow_nan=False)
    for name, keys in KEYS.items():
        assert keys <= set(report[name])
        for key in keys:
            assert set(report[name][key]) == {"median", "min", "max", "n"}
            assert report[name][key]["n"] == 2
            assert report[name][key]["min"] <= report[name][key]["median"]
    assert report["burst"]["tokens"]["median"] == 12 * 8
    assert report["burst"]["kv_cache_tokens"] == 8 * 32
    assert report["peak_rss"]["sum_mib"] > 50 and report["burst_startup_s"] > 0
    text = table(report, list(KEYS))
    assert "decode_tok_s" in text and "peak RSS MiB" in text and "preemptions" in text


def test_the_bursts_pool_makes_requests_wait(config):
    """With room for 8 of 12 sequences, somebody's first token comes after somebody's last."""
    seen = {}

    class Watched(Engine):
        """Counts the pages in use after each step."""

        def step(self):
            outputs = super().step()
            pages = self.stats()["pages"]
            seen["total"] = pages["total"]
            seen["most"] = max(seen.get("most", 0), pages["in_use"])
            return outputs

    measure(config, {"burst": Sizes(12, 40, 24)}, 1, Watched, own_pool=False)
    assert seen["total"] == 8 * 4 and seen["most"] <= seen["total"]
    assert seen["most"] > seen["total"] // 2


def test_what_does_not_fit_says_so(config):
    with pytest.raises(ConfigError, match="prompt_tokens"):
        measure(config, {"prefill": Sizes(1, 2000, 1)}, 1, Engine, own_pool=True)


def test_memory_of_this_process():
    assert reset_peak()
    before = peak_rss()["sum_mib"]
    block = bytearray(64 << 20)
    block[:: 4096] = b"x" * len(block[:: 4096])
    assert peak_rss()["sum_mib"] >= before + 60
    del block
    assert len(process_tree()) >= 1


def test_the_command_prints_one_line_of_json(model):
    done = run_command(
        "bench", f"--model={model}", "--load_format=dummy", "--dtype=float32", "--warmup=none",
        "--max_step_tokens=64", "--max_num_seqs=8", "--workload=single,batch", "--reps=1",
        "--num_requests=4", "--prompt_tokens=8", "--output_tokens=4", "--json",
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert done.stdout.count("\n") == 1
    assert KEYS["single"] == set(report["single"]) and KEYS["batch"] == set(report["batch"])
    assert report["dtype"] == "float32" and report["engine"] == "aqua_jax"
