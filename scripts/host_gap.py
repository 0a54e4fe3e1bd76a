"""How much of a decode step the device waits for the host.

The engine plans and dispatches a step while the one before runs, so the host's time should hide
behind the device's. This measures it: the wall time of engine steps, against the same compiled
programs called back to back with the same inputs and no host work between, alternating; and the
processor time that the host thread takes for itself (it shares the cores with the device).

    python scripts/host_gap.py --model=DIR --batch_sizes=1,8,32,64
"""

from __future__ import annotations

import random
import statistics
import time

import numpy as np
from absl import app, flags

from aqua_jax.config import EngineConfig, SamplingParams
from aqua_jax.engine.batch import SampleBatch
from aqua_jax.engine.engine import Engine
from aqua_jax.engine.sampler import SampleVariant

_MODEL = flags.DEFINE_string("model", "demo", "Model directory, .gguf file, or demo.")
_DUMMY = flags.DEFINE_bool("dummy", False, "Random weights from the directory's config.json.")
_BATCHES = flags.DEFINE_list("batch_sizes", ["1", "8", "32", "64"], "Sequences decoded at once.")
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Alternations per batch size.")
_STEPS = flags.DEFINE_integer("steps", 20, "Steps per measurement.")


def _engine_steps(engine: Engine) -> tuple[float, float]:
    """Seconds per step: wall, and processor time of the host thread."""
    wall, cpu = time.perf_counter(), time.thread_time()
    for _ in range(_STEPS.value):
        engine.step()
    steps = _STEPS.value
    return (time.perf_counter() - wall) / steps, (time.thread_time() - cpu) / steps


def _device_steps(engine: Engine, batch: int) -> float:
    """Seconds per step of the bare programs, on the inputs of the engine's next step."""
    runner = engine._runner
    while engine._pending:
        engine._take_in(engine._pending.popleft())
    plan = engine._scheduler.plan(time.monotonic())
    assert plan is not None
    vector, bucket = runner._forward_vector(plan)
    record = runner.dispatch(plan)
    engine._pending.append(record)
    record.fence.block_until_ready()
    forward = runner.programs.forward(bucket)
    rows = runner._spec.buckets.row_bucket(batch)
    sample = runner.programs.sample(rows, SampleVariant())
    layout = SampleBatch.layout(rows)
    parameters = np.zeros(layout.size, np.int32)
    views = layout.views(parameters)
    views["counts"][0] = batch
    nowhere = SampleBatch.columns(views["rows"])["slots"]
    nowhere[:] = runner._spec.sequences  # the engine's last tokens stay
    started = time.perf_counter()
    for _ in range(_STEPS.value):
        runner._kv, picked, _ = forward(
            runner._params, runner._kv, vector, runner._last_tokens, runner._spaces
        )
        _, packed = sample(runner._head, picked, parameters, runner._last_tokens, None)
    packed.block_until_ready()
    return (time.perf_counter() - started) / _STEPS.value


def main(argv: list[str]) -> None:
    """Print a line per batch size: medians in ms."""
    del argv
    batches = [int(size) for size in _BATCHES.value]
    tokens = 64 + (2 * _STEPS.value + 8) * _ROUNDS.value
    engine = Engine(EngineConfig(
        model=_MODEL.value, load_format="dummy" if _DUMMY.value else "auto",
        kv_cache_tokens=max(batches) * (tokens + 64), max_model_len=tokens + 64,
    ))
    generator = random.Random(0)
    vocabulary = engine.model_config.vocab_size
    print("batch   engine step   device step   gap   host thread (ms, medians)")
    for batch in batches:
        for index in range(batch):
            ids = [generator.randrange(3, vocabulary) for _ in range(64)]
            params = SamplingParams(temperature=0.0, max_tokens=tokens - 64, ignore_eos=True)
            engine.add_request(f"{batch}-{index}", ids, params)
        for _ in range(8):
            engine.step()
        full, device, host = [], [], []
        for _ in range(_ROUNDS.value):
            wall, cpu = _engine_steps(engine)
            full.append(wall * 1e3)
            host.append(cpu * 1e3)
            device.append(_device_steps(engine, batch) * 1e3)
        gap = statistics.median(a - b for a, b in zip(full, device, strict=True))
        print(
            f"{batch:5d}   {statistics.median(full):11.2f}   {statistics.median(device):11.2f}"
            f"   {gap:+.2f}   {statistics.median(host):.2f}"
        )
        for index in range(batch):
            engine.abort(f"{batch}-{index}")
        while engine.has_unfinished():
            engine.step()
    engine.close()


if __name__ == "__main__":
    app.run(main)
