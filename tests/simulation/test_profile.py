"""Profiles: batch shapes that tell costs apart, a machine made of a recorded engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from aqua_jax.bench.traces import TraceRequest
from aqua_jax.cli.flagset import FlagSet, UsageError
from aqua_jax.cli.profile import define, run
from aqua_jax.config import EngineConfig, SamplingParams
from aqua_jax.engine.recorder import RecordedEngine
from aqua_jax.errors import ConfigError
from aqua_jax.scheduling.fair import Fair, FairConfig
from aqua_jax.scheduling.policies import POLICIES
from aqua_jax.scheduling.recording import Recorder
from aqua_jax.scheduling.slices import SliceConfig
from aqua_jax.simulation.cost import Line
from aqua_jax.simulation.machines import build_system
from aqua_jax.simulation.profile import designed_loads, machine_of, record, recorded_ratios
from aqua_jax.simulation.replay import Replay, build_scheduler
from aqua_jax.simulation.simulator import Simulator
from tests.tiny import write_config

LIMITS: dict[str, Any] = {
    "num_pages": 64, "page_tokens": 16, "stores": [["host", 500, 4096]],
    "config": {"max_num_seqs": 16, "max_step_tokens": 64},
}


def test_designed_loads_fit_the_engine_and_vary_what_matters() -> None:
    loads = designed_loads(LIMITS, 512, seed=0)
    shapes = {(len(load), load[0].prompt) for load in loads[:-2]}
    assert {(1, 24), (16, 24), (1, 200), (4, 200)} <= shapes
    for load in loads[:-2]:
        assert len(load) <= 16 and sum(one.prompt + one.output for one in load) <= 64 * 16
    mixed, paged = loads[-2:]
    assert len({one.prompt for one in mixed}) > 10 and mixed[-1].after > 50
    assert sum(one.prompt + one.output for one in paged) > 2 * 64 * 16
    assert all(one.prompt + one.output <= 512 for load in loads for one in load)
    assert len(designed_loads({**LIMITS, "stores": []}, 512, 0)) == len(loads) - 1


def config(folder: Path, policy: str, **changes: Any) -> EngineConfig:
    values: dict[str, Any] = {
        "model": str(write_config(folder / "tiny")), "load_format": "dummy", "dtype": "float32",
        "kv_cache_tokens": 320, "max_num_seqs": 8, "max_step_tokens": 64, "warmup": "none",
        "compile_cache_dir": "", "policy": policy, "host_kv_memory": 1 << 22, **changes,
    }
    if policy == "fcfs":
        del values["host_kv_memory"]
    return EngineConfig(**values)


@pytest.mark.parametrize("policy", ["fcfs", "fair"])
def test_a_real_engines_run_is_replayed_to_the_same_plans(tmp_path: Path, policy: str) -> None:
    """Requests, tokens, measured times and ends of moves of a real run give the same plans."""
    slices = {"slice_steps": 4} if policy == "fair" else {}
    with RecordedEngine(config(tmp_path, policy, **slices)) as engine:
        params = SamplingParams(temperature=0.0, max_tokens=90, ignore_eos=True)
        for number in range(12):
            prompt = [3 + (7 * number + i * i) % 120 for i in range(20 + 5 * (number % 4))]
            engine.add_request(f"r{number}", prompt, params)
            engine.step()
        engine.abort("r3")
        while engine.has_unfinished():
            engine.step()
        stats = engine.stats()
        limits, events = json.loads(json.dumps([engine.limits, engine.recorder.events]))
    assert stats["preemptions"] > 0
    policies = {"fcfs": POLICIES["fcfs"], "fair": lambda: Fair(FairConfig(SliceConfig(4)))}
    done = Replay(build_scheduler(limits, policies[policy]())).run(events)
    assert done.chunks > 10 * 90
    if policy == "fair" and stats["implementations"]["moves"] == "ffi":
        assert done.moves > 0 and stats["paging"]["bytes_in"] > 0


def test_a_burst_simulated_and_real_are_the_same_plans(tmp_path: Path) -> None:
    """Not a replay: nothing of the real run is known to the simulator but the requests."""
    lengths = [(10 + 7 * number % 40, 60 + 11 * number % 50) for number in range(12)]
    with RecordedEngine(config(tmp_path, "fcfs", max_step_tokens=48)) as engine:
        for number, (prompt, output) in enumerate(lengths):
            engine.add_request(
                f"r{number}", [3 + (31 * number + i * i) % 120 for i in range(prompt)],
                SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True), arrival=0.0,
            )
        while engine.has_unfinished():
            engine.step()
        limits, events = engine.limits, engine.recorder.events
    scheduler = build_scheduler(limits, POLICIES["fcfs"]())
    recorder = Recorder(scheduler)
    requests = [TraceRequest(0.0, prompt, output) for prompt, output in lengths]
    outcome = Simulator(scheduler, Line(1.0), requests).run()
    assert outcome.counters.preemptions > 0 and outcome.counters.recomputed_tokens > 0
    real, simulated = (
        [event[2] for event in one if event[0] == "plan" and event[2]]
        for one in (events, recorder.events)
    )
    assert len(real) == outcome.steps > 200
    assert simulated == real


def test_a_machine_of_a_recorded_engine(tmp_path: Path) -> None:
    with RecordedEngine(config(tmp_path, "fair", kv_cache_tokens=640)) as engine:
        steps = record(engine, 100, rounds=1, seed=0)
        machine, fit = machine_of("tiny", engine, steps)
    assert len(steps) > 100 and fit.steps <= len(steps)
    assert {work.decodes for work, _ in steps} >= {1, 2, 4, 8}
    assert any(work.prefill_tokens and work.decodes for work, _ in steps)
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(machine))
    system = build_system(str(path), None)
    assert system.figures == "fitted" and system.num_pages == 40
    assert system.page_bytes == 2 * 2 * 16 * 2 * 16 * 4  # layers, K and V, tokens, heads, dim, f32
    ratios = recorded_ratios(json.loads(path.read_text()), system.cost)
    taken = [(work, seconds) for work, seconds in steps if seconds > 0.0]
    for (work, seconds), ratio in zip(taken, ratios, strict=True):
        assert system.cost.seconds(work) * ratio == pytest.approx(seconds, abs=1e-7)
    with pytest.raises(ConfigError, match="steps"):
        recorded_ratios({**machine, "columns": []}, system.cost)


def test_the_command_says_what_it_needs(tmp_path: Path) -> None:
    for arguments, words in (
        ([], "--engine is required"), (["--engine"], "--output is required"),
        (["--engine", "--model=demo", "--output=/nowhere/x.json"], "output=/nowhere"),
    ):
        flags = FlagSet()
        define(flags)
        flags.parse(arguments)
        with pytest.raises(UsageError, match=words):
            run(flags)


def profile_to(path: Path, folder: Path) -> int:
    flags = FlagSet()
    define(flags)
    flags.parse([
        "--engine", f"--output={path}", f"--model={write_config(folder / 'tiny')}",
        "--load_format=dummy", "--dtype=float32", "--kv_cache_tokens=320", "--max_num_seqs=8",
        "--max_step_tokens=64", "--warmup=none", "--compile_cache_dir=", "--rounds=1",
    ])
    return run(flags)


def test_a_profile_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    path = folder / "machine.json"

    def stopped(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("aqua_jax.simulation.profile.record", stopped)
        with pytest.raises(KeyboardInterrupt):
            profile_to(path, tmp_path)
    assert list(folder.iterdir()) == [], "an interrupted profile leaves nothing"
    path.write_text("what was there")
    with monkeypatch.context() as patched:
        patched.setattr("os.replace", stopped)
        with pytest.raises(KeyboardInterrupt):
            profile_to(path, tmp_path)
    assert path.read_text() == "what was there" and list(folder.iterdir()) == [path]
    assert profile_to(path, tmp_path) == 0
    assert build_system(str(path), None).num_pages == 20 and list(folder.iterdir()) == [path]
