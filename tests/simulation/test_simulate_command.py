"""`aqua-jax simulate` from flags to tables."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from aqua_jax.cli.flagset import FlagSet, UsageError
from aqua_jax.cli.simulate import define, run
from aqua_jax.errors import ConfigError
from aqua_jax.simulation.setups import Setup, expand, parse_setup
from tests.simulation.test_machines import profile


def simulate(*arguments: str) -> int:
    flags = FlagSet()
    define(flags)
    flags.parse(["--num_requests=30", *arguments])
    return run(flags)


def test_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate("--policies=fcfs,vtc", "--request_rate=9") == 0
    out = capsys.readouterr().out
    assert "H100 80 GB, NVLink 4, 34b" in out and "modelled figures" in out
    assert "TTFT p99 s" in out and "vtc" in out


def test_json_of_a_sweep_is_the_same_every_time(capsys: pytest.CaptureFixture[str]) -> None:
    shown = []
    for _ in range(2):
        simulate(
            "--policies=fcfs,fair@none", "--slices=5,40", "--request_rate=2,20", "--json",
            "--machine=a100-80-pcie", "--num_users=3", "--kv_cache_tokens=4100",
        )
        shown.append(json.loads(capsys.readouterr().out))
    assert shown[0] == shown[1]
    assert shown[0]["figures"] == "modelled" and shown[0]["num_pages"] == 256
    assert list(shown[0]["points"]) == ["2/s", "20/s"]
    point = shown[0]["points"]["20/s"]
    assert list(point) == ["fcfs", "fair@none/5", "fair@none/40"]
    assert point["fair@none/5"]["preemptions"] > 0
    tokens = {name: one["tokens"] for name, one in point.items()}
    assert len(set(tokens.values())) == 1, "every policy serves the same load to its end"


def test_several_seeds_at_their_medians(capsys: pytest.CaptureFixture[str]) -> None:
    shown = []
    for seeds in ("--seed=3", "--seed=4", "--seed=5", "--seed=3 --seeds=3"):
        simulate("--policies=fcfs,vtc", "--request_rate=9", "--json", *seeds.split())
        shown.append(json.loads(capsys.readouterr().out))
    assert "medians of 3 seeds" in shown[-1]["title"] and "median" not in shown[0]["title"]
    for name, figures in shown[-1]["points"]["9/s"].items():
        for field, value in figures.items():
            each = sorted(one["points"]["9/s"][name][field] for one in shown[:3])
            assert value == each[1], (name, field)
    with pytest.raises(UsageError, match="seeds"):
        simulate("--workload=trace", "--trace=nowhere.jsonl", "--seeds=2")


def test_recorded_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.jsonl"
    lines = [{"arrival_s": i * 0.1, "prompt_tokens": 40, "output_tokens": 5} for i in range(9)]
    trace.write_text("\n".join(json.dumps(line) for line in lines))
    simulate("--workload=trace", f"--trace={trace}", "--policies=fcfs", "--json")
    assert json.loads(capsys.readouterr().out)["points"]["trace"]["fcfs"]["tokens"] == 45
    simulate("--lengths=trace", f"--trace={trace}", "--policies=fcfs", "--json")
    assert json.loads(capsys.readouterr().out)["points"]["1/s"]["fcfs"]["tokens"] == 150


def test_bytes_at_equal_bars(capsys: pytest.CaptureFixture[str]) -> None:
    simulate(
        "--policies=fair@peer,aqua_reference@peer", "--slices=5,40", "--request_rate=20",
        "--kv_cache_tokens=4100", "--bars=fair",
    )
    out = capsys.readouterr().out
    assert "At equal bars, 20/s:" in out and "fair moves no more than aqua_reference at" in out


def test_users_have_the_shares_that_their_weights_are_due(
    capsys: pytest.CaptureFixture[str],
) -> None:
    load = [
        "--num_requests=60", "--workload=burst", "--lengths=fixed", "--num_users=3",
        "--prompt_tokens=128", "--output_tokens=128", "--kv_cache_tokens=6000",
        "--user_weights=user-0=3,user-2=0.5", "--policies=fcfs,fair,vtc",
    ]
    simulate(*load, "--json")
    point = json.loads(capsys.readouterr().out)["points"]["burst"]
    for name, figures in point.items():
        assert figures["due to user-0"] == pytest.approx(3 / 4.5), name
        assert figures["due to user-2"] == pytest.approx(0.5 / 4.5), name
    for user in ("user-0", "user-2"):
        due = point["fair"][f"due to {user}"]
        assert point["fair"][f"share of {user}"] == pytest.approx(due, abs=0.04)
        assert point["fcfs"][f"share of {user}"] == pytest.approx(1 / 3, abs=0.04)
    # It takes nobody off, but admits by what users have had.
    assert point["vtc"]["share of user-0"] > point["fcfs"]["share of user-0"] + 0.1
    simulate(*load)
    assert "share of user-2" in capsys.readouterr().out


def test_one_point_for_each_gap_aimed_at(capsys: pytest.CaptureFixture[str]) -> None:
    simulate(
        "--workload=burst", "--lengths=fixed", "--policies=fair@peer,vtc", "--json",
        "--kv_cache_tokens=4000", "--tbt_slo_ms=0,400,5000", "--max_num_seqs=32",
    )
    points = json.loads(capsys.readouterr().out)["points"]
    assert list(points) == ["burst, 0 ms", "burst, 400 ms", "burst, 5000 ms"]
    fair = [one["fair@peer"] for one in points.values()]
    worst = [one["worst_gap_s"] for one in fair]
    assert worst == sorted(worst) and worst[-1] > 2 * worst[0]
    moved = [one["bytes_in"] for one in fair]
    assert moved == sorted(moved, reverse=True) and moved[-1] < 0.5 * moved[0]
    assert len({str(one["vtc"]) for one in points.values()}) == 1


def test_pictures(tmp_path: Path) -> None:
    simulate("--policies=fcfs,vllm", f"--plots={tmp_path / 'one'}")
    assert (tmp_path / "one" / "cdf.png").stat().st_size > 5000
    simulate("--policies=fcfs,vllm", f"--plots={tmp_path / 'two'}", "--request_rate=1,9")
    assert (tmp_path / "two" / "sweep.png").stat().st_size > 5000
    data = json.loads((tmp_path / "two" / "data.json").read_text())
    assert set(data["points"]) == {"1/s", "9/s"} and "modelled" in data["title"]


@pytest.mark.parametrize("arguments, words", [
    (["--machine=abacus"], "machine"),
    (["--model=5b"], "34b"),
    (["--policies=lifo"], "POLICY"),
    (["--policies=fcfs,fcfs"], "each once"),
    (["--policies=fcfs/5"], "STEPS"),
    (["--policies=fair@tape"], "peer, host"),
    (["--slices=5,x"], "slices"),
    (["--request_rate=0"], "request_rate"),
    (["--workload=trace"], "trace"),
    (["--kv_cache_tokens=9"], "less than a page"),
    (["--bars=vtc"], "a policy of --policies"),
    (["--bars=fcfs", "--policies=fcfs"], "beside others"),
    (["--bars=fair", "--json"], "not for --json"),
    (["--slices=5", "--policies=fcfs,vtc"], "only beside fair or aqua_reference"),
    (["--slices=5", "--policies=fair/9"], "without a number of steps"),
    (["--policies=fair@peer+peer"], "each store once"),
    (["--workload=burst", "--request_rate=3"], "--request_rate needs --workload=poisson or gamma"),
    (["--workload=trace", "--trace=x", "--request_rate=3"], "--request_rate needs"),
    (["--burstiness=2"], "--burstiness needs --workload=gamma"),
    (["--rate=2"], "--rate needs --workload=trace"),
    (["--prompt_tokens=9"], "--prompt_tokens needs --lengths=fixed"),
    (["--trace_format=azure"], "goes with --workload=trace"),
    (["--policies=fcfs", "--tbt_slo_ms=5"], "automatic slices"),
    (["--policies=fair", "--slices=5", "--tbt_slo_ms=5"], "automatic slices"),
    (["--tbt_slo_ms=-5"], "numbers >= 0"),
    (["--tbt_slo_ms=5,5.0"], "each once"),
    (["--request_rate=2,2"], "each once"),
    (["--user_weights=user-0=2"], "users of a load that has several"),
    (["--num_users=2", "--user_weights=user-2=2"], "'user-2'.*user-0, user-1"),
    (["--num_users=2", "--user_weights=user-0=0"], "user_weights"),
    (["--num_users=2", "--user_weights=user-0=2", "--policies=fcfs"], "for fair and vtc"),
])
def test_wrong_flags_are_named(arguments: list[str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        simulate(*arguments)


def test_a_profile_is_a_machine_with_a_model_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "here.json"
    path.write_text(json.dumps(profile()))
    load = [f"--machine={path}", "--workload=burst", "--lengths=fixed", "--prompt_tokens=9"]
    simulate(*load, "--policies=fcfs", "--max_num_seqs=8")
    assert "the recorded model" in capsys.readouterr().out
    for flag in ("--model=7b", "--page_tokens=32"):
        with pytest.raises(UsageError, match="which has its own"):
            simulate(*load, flag)


def test_names_of_contestants() -> None:
    assert parse_setup("fcfs") == Setup("fcfs", "fcfs")
    assert parse_setup("fair@peer+host/10").stores == ("peer", "host")
    assert parse_setup("fair@none") == Setup("fair@none", "fair", None, ())
    names = [one.name for one in expand(["vtc", "fair", "fair@host/7"], [5, 0])]
    assert names == ["vtc", "fair/5", "fair/0", "fair@host/7"]
    with pytest.raises(ConfigError, match="each once"):
        expand(["fair", "fair/5"], [5])
