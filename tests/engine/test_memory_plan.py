"""The memory plan: sizing against a device's limit, the table, and the platform that is chosen."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from aqua_jax.config import EngineConfig
from aqua_jax.engine import memory_plan, platform, programs
from aqua_jax.engine.engine import Engine
from aqua_jax.engine.platform import DeviceMemory
from aqua_jax.errors import ConfigError

MIB = 1 << 20


@pytest.fixture
def model(tmp_path):
    """A directory with the configuration of a tiny model."""
    (tmp_path / "config.json").write_text(json.dumps({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128,
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
        "torch_dtype": "float32",
    }))
    return str(tmp_path)


def config(model: str, **fields) -> EngineConfig:
    return EngineConfig(**{
        "model": model, "load_format": "dummy", "max_num_seqs": 4, "max_step_tokens": 16,
        "compile_cache_dir": "", "host_kv_memory": 0, **fields,
    })


@pytest.mark.parametrize(
    ("memory", "available", "arenas"),
    [
        (DeviceMemory(), None, None),
        (DeviceMemory(900, 100, 900, 50, 1000), 800, 50),  # all taken from the device at the start
        (DeviceMemory(900, 100, 200, 800, 1000), 800, 100),  # taken as it is needed
        (DeviceMemory(900, 100, 200, 300, 1000), 400, 0),  # somebody else has most of it
        (DeviceMemory(limit=900, in_use=100, held=100), 800, None),
    ],
)
def test_what_is_left(memory, available, arenas):
    assert (memory.available, memory.for_arenas) == (available, arenas)


def test_a_pool_fills_what_the_measured_peak_leaves(model, monkeypatch):
    """Sized, compiled and run as on a device of 100 MiB; the plan adds up."""
    memory = DeviceMemory(100 * MIB, 50 * MIB, 100 * MIB, 0, 200 * MIB)
    monkeypatch.setattr(platform, "device_memory", lambda device: memory)
    monkeypatch.setattr(memory_plan, "_MARGIN", 4 * MIB)
    engine = Engine(config(model))
    try:
        found = engine.stats()["memory"]
        page = 2 * 2 * 2 * 16 * 16 * 4
        assert found["pool"] == engine.stats()["pages"]["total"] * page
        assert found["temporaries"] > 0 and found["margin"] == 4 * MIB
        assert found["limit"] == 100 * MIB and found["for_arenas"] == 0
        # All of it is planned, but for a page and what the other programs need less.
        assert 0 <= found["unplanned"] <= max(page, 0.02 * 46 * MIB)
        used = found["pool"] + found["temporaries"] + found["margin"] + found["unplanned"]
        assert used == 50 * MIB
        engine.add_request("a", [1, 2, 3])
        while engine.has_unfinished():
            engine.step()
        assert engine.stats()["compiles_after_warmup"] == 0
    finally:
        engine.close()


class Measured:
    """Programs of which only the peak matters: `base` bytes and so many a page."""

    def __init__(self, base: int, each: int, pages: int):
        self.peak = base + each * pages

    def memory_analyses(self):
        @dataclasses.dataclass
        class Analysis:
            temp_size_in_bytes: int
            output_size_in_bytes: int = 1000
            alias_size_in_bytes: int = 1000

        return [Analysis(self.peak), Analysis(self.peak // 2)]


@pytest.mark.parametrize("guess", [0, 3 * MIB, 200 * MIB, 10_000 * MIB])
@pytest.mark.parametrize("each", [0, 64])
def test_a_guess_that_is_off_is_made_again(guess, each):
    page, compiled = 64 << 10, []

    def compile_for(pages):
        compiled.append(pages)
        return Measured(30 * MIB, each, pages)

    memory = DeviceMemory(limit=2000 * MIB, in_use=500 * MIB, held=2000 * MIB, free=0)
    sized = memory_plan.size_pool(memory, page, guess, compile_for)
    left = 1500 * MIB - 256 * MIB - sized.pages * page - sized.programs.peak
    assert sized.pages == compiled[-1] and 0 <= left <= 0.02 * 1244 * MIB
    assert len(compiled) <= 3


def test_what_does_not_fit_is_refused():
    memory = DeviceMemory(900 * MIB, 500 * MIB, 900 * MIB, 0, 1000 * MIB)
    with pytest.raises(ConfigError, match=r"fraction: got 0.9; .* 500 pages of 65536"):
        memory_plan.size_pool(
            memory, 64 << 10, MIB, lambda pages: Measured(130 * MIB, 0, pages), least_pages=500
        )


def test_more_than_the_device_has_is_refused(model, monkeypatch):
    memory = DeviceMemory(limit=400 * MIB, in_use=50 * MIB, held=400 * MIB, free=0, total=500 * MIB)
    monkeypatch.setattr(platform, "device_memory", lambda device: memory)
    with pytest.raises(ConfigError, match=f"kv_cache_memory: .*{350 * MIB} bytes of memory"):
        Engine(config(model, kv_cache_memory=360 * MIB))


def test_programs_are_compiled_before_the_pool_takes_its_place(model, monkeypatch):
    """A GPU's compiler allocates what it tries products out with."""
    there = []
    warm_up = programs.Programs.warm_up

    def spy(self, level, progress=None):
        there.append(any(array.shape == self._kv.shape for array in jax.live_arrays()))
        warm_up(self, level, progress)

    monkeypatch.setattr(programs.Programs, "warm_up", spy)
    with Engine(config(model, kv_cache_tokens=16 * 77)) as engine:
        assert engine._runner.kv.shape[0] == 77
    assert there == [False]


def test_sums_on_a_gpu_are_made_in_one_order_where_that_was_promised(monkeypatch):
    assert programs.compiler_options(True) is None  # on a CPU they are
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert programs.compiler_options(False) is None
    options = programs.compiler_options(True)
    monkeypatch.undo()
    # XLA refuses options that it doesn't know.
    lowered = jax.jit(jnp.sum).lower(jnp.ones(4))
    assert lowered.compile(compiler_options=options)(jnp.ones(4)) == 4
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
        lowered.compile(compiler_options={f"{name}_": True for name in options})


def test_the_platform_is_chosen_once(model):
    before = jax.config.jax_platforms
    with pytest.raises(ConfigError, match="platform: got 'cuda'; allowed: auto or cpu"):
        Engine(config(model, platform="cuda"))
    assert jax.config.jax_platforms == before
    assert platform.start(config(model, platform="cpu")) == "cpu"
    with pytest.raises(ConfigError, match="device_memory_fraction"):
        config(model, device_memory_fraction=1.5)


def test_a_share_that_is_not_what_was_asked_for_is_an_error():
    memory = DeviceMemory(limit=75, total=100)
    with pytest.raises(ConfigError, match=r"got 0.5; allowed: 0.75 in this process"):
        platform._check_fraction(0.5, memory)
    platform._check_fraction(0.74, memory)
    platform._check_fraction(None, memory)


def test_bytes_are_counted_once():
    array = jnp.ones((4, 8), jnp.float32)
    device = jax.local_devices()[0]
    assert memory_plan.bytes_on([array, array, jnp.ones(3, jnp.int8)], device) == 131
