"""Open-loop runs under a clock that only moves when somebody waits or works; one real tiny run."""

from __future__ import annotations

import json
import random
import types

import pytest

from aqua_jax.bench.counters import difference, figures, stores
from aqua_jax.bench.open_loop import Run, Sample, Served, serve
from aqua_jax.bench.ratios import interval
from aqua_jax.bench.service import (
    contended,
    jain,
    run_metrics,
    service_by_user,
    timeline,
    windowed_jain,
)
from aqua_jax.bench.serving import Load, compare, table
from aqua_jax.bench.traces import TraceRequest
from aqua_jax.bench.variants import of_policies, unlimited_tokens
from aqua_jax.cli import bench, main
from aqua_jax.config import EngineConfig
from aqua_jax.errors import ConfigError
from tests.cli.text_model import run_command
from tests.tiny import write_config


class FakeClock:
    """Time that a test owns."""

    def __init__(self):
        self.time, self.sleeps = 1000.0, []

    def now(self):
        return self.time

    def sleep(self, seconds):
        assert seconds > 0
        self.sleeps.append(seconds)
        self.time += seconds


class FakeEngine:
    """Serves one request at a time, a token a step, each step `step_s` long."""

    max_model_len = 64
    model_config = types.SimpleNamespace(vocab_size=100)

    def __init__(self, clock, step_s=1.0, fail=()):
        self.clock, self.step_s, self.fail = clock, step_s, fail
        self.queue, self.added, self.stats_calls, self.closed = [], [], 0, False

    def add_request(self, request_id, prompt, params, **fields):
        self.added.append((request_id, self.clock.now(), len(prompt), fields))
        self.queue.append([request_id, params.max_tokens, []])

    def has_unfinished(self):
        return bool(self.queue)

    def step(self):
        self.clock.time += self.step_s
        name, wanted, tokens = self.queue[0]
        failed = name in self.fail
        if not failed:
            tokens.append(1)
        finished = failed or len(tokens) == wanted
        if finished:
            self.queue.pop(0)
        return [types.SimpleNamespace(
            request_id=name, outputs=[types.SimpleNamespace(token_ids=list(tokens))],
            finished=finished, error="broken" if failed else None,
        )]

    def stats(self):
        self.stats_calls += 1
        return {"pages": {"in_use": len(self.queue), "total": 9}, "steps": 3}

    def close(self):
        self.closed = True


def requests_at(*times, output=2, user="u"):
    return [TraceRequest(at, 4, output, user) for at in times]


def test_requests_are_sent_when_due_and_idle_time_is_slept_through():
    clock = FakeClock()
    engine = FakeEngine(clock)
    run = serve(engine, requests_at(0, 0.5, 10), [[1] * 4] * 3, clock)
    # The second became due during the first's step; the third after 6 s of sleep in one piece.
    assert [(name, at) for name, at, _, _ in engine.added] == [
        ("bench-0", 1000), ("bench-1", 1001), ("bench-2", 1010),
    ]
    assert clock.sleeps == [6.0]
    assert [one.tokens for one in run.served] == [[1, 2], [3, 4], [11, 12]]
    # The engine is told when a request was due, not when it was sent.
    assert [fields["arrival"] for *_, fields in engine.added] == [1000, 1000.5, 1010]
    assert engine.added[0][3]["user"] == "u" and engine.added[0][3]["weight"] == 1
    assert [(at.waiting, at.live) for at in run.samples] == [
        (0, 1), (1, 1), (0, 1), (0, 0), (0, 1), (0, 0),
    ]
    metrics = run_metrics(run, ttft_slo_s=1.2, tbt_slo_s=1.0)
    assert metrics["ttft_p50_s"] == 1 and metrics["ttft_p99_s"] == pytest.approx(2.47)
    assert metrics["tbt_max_ms"] == 1000 and metrics["output_tok_s"] == 0.5
    assert metrics["goodput_req_s"] == pytest.approx(2 / 12)
    assert metrics["waiting_max"] == 1 and "jain_index" not in metrics


def test_the_engine_is_asked_at_most_every_20_ms_and_200th_of_the_run():
    clock = FakeClock()
    engine = FakeEngine(clock, step_s=0.005)
    run = serve(engine, requests_at(0, output=100), [[1] * 4], clock)
    gaps = [b.time_s - a.time_s for a, b in zip(run.samples, run.samples[1:], strict=False)]
    assert min(gaps[:-1]) >= 0.0199 and engine.stats_calls <= 28
    assert run.samples[-1].live == 0
    long = serve(FakeEngine(clock, step_s=0.1), requests_at(0, output=1200), [[1] * 4], clock)
    assert len(long.samples) < 900  # of 1,200 steps: every half a per cent of the run so far
    columns = timeline(run, 5)
    assert len(columns["time_s"]) <= 5 and columns["waiting"][0] == 0


def test_a_failed_request_is_counted_and_no_longer_waits():
    clock = FakeClock()
    run = serve(FakeEngine(clock, fail=("bench-0",)), requests_at(0, 0), [[1] * 4] * 2, clock)
    metrics = run_metrics(run, ttft_slo_s=9, tbt_slo_s=9)
    assert metrics["failed"] == 1 and metrics["goodput_req_s"] == pytest.approx(1 / 3)
    assert run.samples[-1].waiting == 0 and run.samples[-1].live == 0
    only = serve(FakeEngine(clock, fail=("bench-0",)), requests_at(0), [[1] * 4], clock)
    with pytest.raises(RuntimeError, match="no request got a token: broken"):
        run_metrics(only, ttft_slo_s=9, tbt_slo_s=9)


def test_jain_is_taken_while_all_users_have_work():
    assert jain([2, 2, 2]) == pytest.approx(1) and jain([1, 0, 0, 0]) == pytest.approx(0.25)
    assert jain([0, 0]) == 1
    served = [
        Served(TraceRequest(0, 10, 4, "a"), 0, [1, 2, 3, 9]),
        Served(TraceRequest(1, 20, 2, "b", 2.0), 1, [2, 4]),
    ]
    assert contended(served) == (1, 4)
    # a: tokens at 2, 3 (its prompt came before); b: 20 + 2 tokens, whatever they weigh among b's.
    assert service_by_user(served, 1, 4) == {"a": 2, "b": 22}
    metrics = run_metrics(Run(served, [Sample(9, 0, 0, 0)], 1), ttft_slo_s=9, tbt_slo_s=9)
    assert metrics["jain_index"] == pytest.approx(24**2 / (2 * (4 + 484)))
    assert metrics["jain_window_s"] == 3
    apart = [served[0], Served(TraceRequest(20, 1, 1, "b"), 20, [21])]
    assert contended(apart) is None and contended(served[:1]) is None


def test_every_run_has_a_fresh_engine_and_the_same_load():
    clock, engines, configs = FakeClock(), [], []

    def make_engine(config):
        configs.append(config)
        engines.append(FakeEngine(clock))
        return engines[-1]

    load = Load(requests_at(0, 0, 90), 32, 9, 9)
    config = EngineConfig(
        model="m", peer="socket", host_kv_memory=77, policy="fair", trace_events="a.b/out.json",
        user_weights={"u": 2.0},
    )
    chosen = of_policies(["fcfs", "fair"], [5])
    report, runs = compare(config, chosen, load, 2, make_engine, clock)
    order = [(one.policy, one.slice_steps, one.peer, one.host_kv_memory) for one in configs]
    # The second repeat goes the other way round; fcfs, which recomputes, keeps no pages.
    turn = [("fcfs", None, "", None), ("fair", None, "socket", 77), ("fair", 5, "socket", 77)]
    assert order == turn + turn[::-1]
    assert [dict(one.user_weights) for one in configs[:3]] == [{}, {"u": 2.0}, {"u": 2.0}]
    assert configs[2].trace_events == "a.b/out.fair-5.1.json"
    assert len({one.trace_events for one in configs}) == 6
    assert all(engine.closed for engine in engines)
    sent = [[(name, length) for name, _, length, _ in engine.added] for engine in engines]
    assert all(one == sent[0] for one in sent) and len(sent[0]) == 5 + 3  # warm-up, the load
    assert list(runs) == ["fcfs", "fair", "fair/5"]
    assert report["policies"]["fair"]["metrics"]["ttft_p50_s"]["n"] == 2
    assert report["ratios"]["fair"]["ttft_p99_gain"]["median"] == pytest.approx(1)
    text = table(report)
    assert "fair/5" in text and "goodput_req_s" in text and "ttft_p99_gain" in text
    json.dumps(report, allow_nan=False)
    with pytest.raises(ConfigError, match="prompt_tokens: got 60"):
        compare(
            config, chosen, Load([TraceRequest(0, 60, 9)], None, 9, 9), 1, make_engine, clock
        )


def test_the_floor_and_the_ideal_take_the_pressure_away():
    clock, engines = FakeClock(), []

    def make_engine(config):
        engines.append((config, FakeEngine(clock)))
        return engines[-1][1]

    load = Load(requests_at(0, 0, 0, 0, output=6), 32, 9, 9)
    config = EngineConfig(
        model="m", policy="fair", peer="socket", host_kv_memory=77, kv_cache_tokens=32,
        max_num_seqs=3, user_weights={"u": 2.0},
    )
    report, _ = compare(
        config, of_policies(["fcfs", "fair"]), load, 2, make_engine, clock, with_floor=True,
        with_ideal=True,
    )
    assert list(report["policies"]) == ["fcfs", "fair", "ideal", "floor"]
    ideal, floor = engines[2][0], engines[3][0]
    # 4 + 6 tokens are one page, one more for what is decided ahead, three at a time; one token
    # each needs as much.
    assert ideal.kv_cache_tokens == floor.kv_cache_tokens == 3 * 2 * 16
    assert ideal.peer == floor.peer == "" and ideal.policy == floor.policy == "fcfs"
    # In the fake engine all that have a token and aren't done are running: one at a time.
    resident = report["policies"]["fair"]["metrics"]["resident_mean"]["median"]
    assert ideal.max_num_seqs == max(1, round(resident)) == 1 and floor.max_num_seqs == 3
    metrics = {name: one["metrics"] for name, one in report["policies"].items()}
    assert metrics["floor"]["tokens"]["median"] == 4 and metrics["ideal"]["tokens"]["median"] == 24
    fair = report["ratios"]["fair"]
    assert fair["ttft_p99_over_floor"]["median"] == pytest.approx(
        metrics["fair"]["ttft_p99_s"]["median"] / metrics["floor"]["ttft_p99_s"]["median"], rel=1e-3
    )
    assert fair["output_tok_s_of_ideal"]["n"] == 2
    assert report["ratios"]["fcfs"]["ttft_ceiling"]["median"] > 1
    assert not {"floor", "ideal"} & set(report["ratios"])


def test_what_unlimited_is():
    config = EngineConfig(model="m", max_num_seqs=4)
    requests = [TraceRequest(0, 16, 16), TraceRequest(0, 100, 28)]
    assert unlimited_tokens(requests, config) == (3 + 9) * 16
    assert unlimited_tokens(requests * 50, config) == 4 * 9 * 16
    assert unlimited_tokens(requests, config, 1) == (3 + 8) * 16


def test_an_interval_covers_the_median():
    assert interval([3.0]) == {"median": 3, "low": 3, "high": 3, "n": 1, "coverage": 0}
    five = interval([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (five["low"], five["median"], five["high"]) == (1, 3, 5)
    assert five["coverage"] == pytest.approx(1 - 2 / 32, abs=1e-4)
    ten = interval([float(value) for value in range(10)])
    # The second and the ninth of ten: 1 - 2 * (1 + 10) / 1024.
    assert (ten["low"], ten["high"], ten["coverage"]) == (1, 8, 0.9785)
    draw = random.Random(0)
    covered = 0
    for _ in range(400):
        one = interval([draw.gauss(7, 1) for _ in range(15)])
        covered += one["low"] <= 7 <= one["high"]
    assert covered >= 0.93 * 400


def test_what_the_counters_say_of_a_run():
    def stats(scale, stores=()):
        return {
            "steps": 10 * scale, "preemptions": scale, "host_s": 0.1 * scale, "wait_s": 1.0 * scale,
            "paging": {
                "bytes_out": 2**20 * scale, "bytes_in": 2**19 * scale, "wait_s": 0.01 * scale,
                "tokens_out": 300 * scale, "tokens_in": 200 * scale, "tokens_held": 1000 * scale,
                "tokens_revived": 70 * scale, "departures": 4 * scale,
                "stores": [{"name": "peer", "capacity": 9, "in_use": 2}],
            },
        }

    rose = difference(stats(1), stats(3))
    assert rose["steps"] == 20 and rose["bytes_out"] == 2**21
    shown = figures(rose, 10.0)
    assert shown["paged_out_mib"] == 2 and shown["paged_in_mib"] == 1
    assert shown["paged_share"] == pytest.approx(0.5) and shown["revived_tokens"] == 140
    assert shown["paging_wait_s"] == pytest.approx(0.02)
    assert shown["paging_wait_share"] == pytest.approx(0.002)
    assert shown["out_kib_per_switch"] == 2048 / 8 and shown["out_tokens_per_switch"] == 75
    assert shown["host_share"] == pytest.approx(0.02) and "wait_s" not in shown
    assert stores(stats(1)) == {"peer": {"name": "peer", "capacity": 9, "in_use": 2}}
    plain = {"steps": 4, "preemptions": 1}
    assert figures(difference(plain, plain), 1.0) == {"steps": 0, "preemptions": 0}


def test_waits_are_held_against_the_stated_bound():
    one = Served(TraceRequest(0, 4, 3), 0, [1, 2, 9], [3, 4, 11], sent_step=1)
    samples = [Sample(1, 0, 1, 0, bound_steps=5.0), Sample(9, 0, 0, 0, bound_steps=1.0)]
    metrics = run_metrics(Run([one], samples, 1), ttft_slo_s=9, tbt_slo_s=9)
    assert metrics["wait_max_steps"] == 7 and metrics["bound_steps"] == 5
    assert metrics["bound_violations"] == 1
    calm = run_metrics(Run([one], samples[1:] * 2, 1), ttft_slo_s=9, tbt_slo_s=9)
    assert calm["bound_violations"] == 2  # 7 from step 4 to 11, 2 from 1 to 3
    free = run_metrics(Run([one], [Sample(9, 0, 0, 0)], 1), ttft_slo_s=9, tbt_slo_s=9)
    assert "bound_steps" not in free


def test_jain_over_windows():
    served = [
        Served(TraceRequest(0, 1, 9, user), 0, [at + offset for at in range(9)])
        for user, offset in (("a", 1.0), ("b", 1.1))
    ]
    served.append(Served(TraceRequest(0, 1, 9, "c"), 0, [8.5 + at / 10 for at in range(9)]))
    assert contended(served) == (0, 9.0)
    worst = windowed_jain(served, 4.0)
    assert len(worst) == 2 and worst[0] == pytest.approx(9**2 / (3 * (5**2 + 4**2)))
    assert windowed_jain(served, 10.0) == [] and windowed_jain(served[:1], 1.0) == []


def test_the_command_runs_a_trace_on_a_tiny_model(tmp_path, capsys):
    model = write_config(tmp_path / "model", vocab_size=131)
    trace = tmp_path / "trace.jsonl"
    trace.write_text("".join(
        json.dumps({
            "arrival_s": index * 0.01, "prompt_tokens": 12 if index else 4000, "output_tokens": 6,
            "user": f"u{index % 2}",
        }) + "\n" for index in range(6)
    ))
    flags = (
        "bench", f"--model={model}", "--load_format=dummy", "--dtype=float32", "--warmup=none",
        "--deterministic", "--max_step_tokens=64", "--max_num_seqs=8", "--workload=trace",
        f"--trace={trace}", "--reps=1", "--max_trace_tokens=40", "--json",
    )
    done = run_command(*flags, "--policies=fcfs,fair")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["workload"] == "trace" and report["requests"] == 6
    for policy in ("fcfs", "fair"):
        one = report["policies"][policy]
        assert one["metrics"]["tokens"]["median"] == 36 and one["lengths_cut"] == 1
        assert one["metrics"]["ttft_p99_s"]["min"] > 0
        assert one["metrics"]["compiles_after_warmup"]["max"] == 0
    trace.write_text('{"arrival_s": 0, "prompt_tokens": 0, "output_tokens": 6}\n')
    assert main.main(flags) == 2
    assert "line 1, prompt_tokens: got 0" in capsys.readouterr().err


@pytest.mark.parametrize(("flags", "words"), [
    (["--workload=burst", "--policies=fcfs,best"], ["--policies=fcfs,best", "each once: "]),
    (["--workload=single", "--rate=2"], ["--rate ", "--workload=single", "it is for trace"]),
    (["--workload=single", "--num_requests=2"], ["--num_requests", "batch, burst, trace"]),
    (["--workload=prefill", "--output_tokens=2"], ["--output_tokens", "--workload=prefill"]),
    (["--workload=batch,single", "--plots=out"], ["--plots", "burst, trace"]),
    (["--workload=burst", "--trace=x"], ["--trace ", "it is for trace"]),
    (["--workload=trace", "--trace=x", "--users=2"], ["--users", "it is for burst"]),
    (["--workload=trace", "--trace=x", "--prompt_tokens=2"], ["--prompt_tokens"]),
    (["--workload=trace"], ["needs --trace=FILE"]),
    (["--workload=trace,single", "--trace=x"], ["trace runs alone"]),
    (["--workload=burst,burst"], ["each once"]),
    (["--workload=best"], ["--workload=best: allowed"]),
    (["--workload=burst", "--users=2", "--request_rate=3"], ["--request_rate needs --arrivals"]),
    (["--workload=burst", "--arrivals=poisson", "--burstiness=3"], ["--burstiness needs"]),
    (["--workload=burst", "--slices=5,x"], ["--slices=5,x", "integers >= 1"]),
    (["--workload=burst", "--slices=5,5"], ["each once"]),
    (["--workload=burst", "--slices=5", "--policies=fcfs", "--slice_steps=3"],
     ["--slice_steps", "--slices=5", "add fair"]),
    (["--workload=burst", "--slices=5", "--policies=fcfs", "--tbt_slo_ms=3"], ["--tbt_slo_ms"]),
])
def test_flags_that_mean_nothing_are_errors_that_name_them(flags, words, capsys):
    assert main.main(["bench", "--model=m", *flags]) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in words), said


def test_weights_of_users_fit_fair_beside_other_policies(monkeypatch):
    configs = []
    monkeypatch.setattr(bench, "_run_load", lambda flags, config, *_: configs.append(config) or 0)
    flags = ["--users=2", "--policies=fcfs_swap,fair", "--user_weights=user-1=2"]
    assert main.main(["bench", "--model=m", "--workload=burst", *flags]) == 0
    assert configs[0].user_weights == {"user-1": 2.0}
    assert of_policies(["fcfs_swap"])[0].config(configs[0]).user_weights == {}
