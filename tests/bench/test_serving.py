"""Open-loop runs under a clock that only moves when somebody waits or works; one real tiny run."""

from __future__ import annotations

import json
import types

import pytest

from aqua_jax.bench.open_loop import Run, Sample, Served, serve
from aqua_jax.bench.service import contended, jain, run_metrics, service_by_user, timeline
from aqua_jax.bench.serving import Load, compare, table
from aqua_jax.bench.traces import TraceRequest
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


def test_the_engine_is_asked_at_most_every_20_ms():
    clock = FakeClock()
    engine = FakeEngine(clock, step_s=0.005)
    run = serve(engine, requests_at(0, output=100), [[1] * 4], clock)
    gaps = [b.time_s - a.time_s for a, b in zip(run.samples, run.samples[1:], strict=False)]
    assert min(gaps[:-1]) >= 0.0199 and engine.stats_calls <= 28
    assert run.samples[-1].live == 0
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
    # a: tokens at 2, 3 (its prompt came before); b: 20 + 2 tokens at double weight.
    assert service_by_user(served, 1, 4) == {"a": 2, "b": 11}
    metrics = run_metrics(Run(served, [Sample(9, 0, 0, 0)], 1), ttft_slo_s=9, tbt_slo_s=9)
    assert metrics["jain_index"] == pytest.approx(13**2 / (2 * (4 + 121)))
    assert metrics["jain_window_s"] == 3
    apart = [served[0], Served(TraceRequest(20, 1, 1, "b"), 20, [21])]
    assert contended(apart) is None and contended(served[:1]) is None


def test_policies_get_fresh_engines_and_the_same_load():
    clock, engines, configs = FakeClock(), [], []

    def make_engine(config):
        configs.append(config)
        engines.append(FakeEngine(clock))
        return engines[-1]

    load = Load(requests_at(0, 0, 90), 32, 9, 9)
    config = EngineConfig(model="m")
    report, runs = compare(config, ["fcfs", "fair"], load, 2, make_engine, clock)
    assert [one.policy for one in configs] == ["fcfs", "fair"]
    assert all(engine.closed for engine in engines)
    sent = [[entry[0::2] for entry in engine.added] for engine in engines]
    assert sent[0] == sent[1] and len(sent[0]) == 5 + 2 * 3  # warm-up, then twice the load
    assert list(runs) == ["fcfs", "fair"]
    assert report["policies"]["fair"]["metrics"]["ttft_p50_s"]["n"] == 2
    text = table(report)
    assert "fcfs" in text and "fair" in text and "goodput_req_s" in text
    json.dumps(report, allow_nan=False)
    with pytest.raises(ConfigError, match="prompt_tokens: got 60"):
        compare(config, ["fcfs"], Load([TraceRequest(0, 60, 9)], None, 9, 9), 1, make_engine, clock)


def test_the_command_runs_a_trace_on_a_tiny_model(tmp_path):
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
        "--max_step_tokens=64", "--max_num_seqs=8", "--workload=trace", f"--trace={trace}",
        "--reps=1", "--max_trace_tokens=40", "--json",
    )
    done = run_command(*flags, "--policies=fcfs,fair")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["workload"] == "trace" and report["requests"] == 6
    for policy in ("fcfs", "fair"):
        one = report["policies"][policy]
        assert one["metrics"]["tokens"]["median"] == 36 and one["lengths_cut"] == 1
        assert one["metrics"]["ttft_p99_s"]["min"] > 0
    wrong = run_command(*flags, "--policies=fcfs,best")
    assert wrong.returncode == 2 and "--policies=fcfs,best" in wrong.stderr
    trace.write_text('{"arrival_s": 0, "prompt_tokens": 0, "output_tokens": 6}\n')
    broken = run_command(*flags)
    assert broken.returncode == 2 and "line 1, prompt_tokens: got 0" in broken.stderr
    assert "Traceback" not in broken.stderr
