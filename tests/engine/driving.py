"""Small engines, and running work through them."""

from __future__ import annotations

import pathlib

from aqua_jax.config import EngineConfig, SamplingParams
from aqua_jax.engine.engine import Engine
from aqua_jax.engine.outputs import RequestOutput
from tests.tiny import write_config


def tiny_engine(folder: pathlib.Path, **settings) -> Engine:
    """An engine over a two-layer model with random weights; keyword arguments override."""
    model = write_config(folder / "model") if not (folder / "model").exists() else folder / "model"
    defaults = {
        "load_format": "dummy", "dtype": "float32", "max_num_seqs": 8, "max_step_tokens": 64,
        "kv_cache_tokens": None if "kv_cache_memory" in settings else 1024, "warmup": "none",
    }
    return Engine(EngineConfig(model=str(model), **{**defaults, **settings}))


def run_all(engine: Engine, work: list[tuple[list[int], SamplingParams]]) -> list[RequestOutput]:
    """Add everything at once and step to the end; last outputs in the order of `work`."""
    for index, (prompt, params) in enumerate(work):
        engine.add_request(f"r{index}", prompt, params)
    last: dict[str, RequestOutput] = {}
    while engine.has_unfinished():
        for output in engine.step():
            last[output.request_id] = output
    outputs = [last[f"r{index}"] for index in range(len(work))]
    assert all(output.finished for output in outputs)
    return outputs
