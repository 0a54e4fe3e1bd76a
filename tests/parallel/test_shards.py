"""Parts of a model on several CPU devices against the whole on one."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aqua_jax.errors import ConfigError
from aqua_jax.loading.assemble import take_parts
from aqua_jax.models.attention import dense_attention
from aqua_jax.models.config import ModelConfig
from aqua_jax.models.parameters import abstract_decoder, merge, random_params
from aqua_jax.ops.linear import pack
from aqua_jax.parallel import rules
from aqua_jax.parallel.shards import EVERYWHERE, PARTS, Shards, local_devices

# Everything a parameter can be; the vocabulary divides by nothing.
CONFIG = ModelConfig(
    family="qwen3", vocab_size=53, hidden_size=24, intermediate_size=40, num_layers=2, num_heads=8,
    num_kv_heads=4, head_dim=10, max_position=64, layer_windows=(5, None), qkv_bias=True,
    o_bias=True, mlp_bias=True, qk_norm=True,
)  # fmt: skip
TIED = dataclasses.replace(
    CONFIG, tied_embeddings=True, qkv_bias=False, o_bias=False, mlp_bias=False, qk_norm=False
)
LENGTH = 19


def whole_params(config: ModelConfig) -> dict[str, np.ndarray]:
    """Random, and large enough that attention isn't uniform."""
    return {
        name: value if name.endswith("norm.scale") else value * np.float32(8)
        for name, value in random_params(config)
    }


def packed(name: str, array: np.ndarray) -> np.ndarray:
    """As the engine packs weights on a CPU."""
    if name.endswith(".kernel"):
        return pack(array, np.float32)
    return pack(array.T, np.float32) if name == "embed.embedding" else array


def logits_of_parts(config: ModelConfig, size: int, packs: bool, tokens: np.ndarray) -> np.ndarray:
    """Dense logits [T, V] of a model whose parts are on `size` devices."""
    shards = Shards(config, size)
    params: dict[str, jax.Array] = {}
    for name, value in whole_params(config).items():
        parts = take_parts(value, shards.cuts(name))
        parts = [packed(name, part) if packs else part for part in parts]
        if shards.cuts(name) is None:
            params[name] = shards.everywhere(parts[0])
        else:
            placed = [shards.place(part, rank) for rank, part in enumerate(parts)]
            params[name] = shards.join(placed)
    graphdef, shapes = abstract_decoder(shards.part)
    assert packs or {
        name: shards.parts(value)[0].shape for name, value in params.items()
    } == {name: shape.shape for name, shape in shapes.items()}

    def attend(layer, q, k, v, cache):
        window = config.window(layer)
        q, k, v = (x[None] for x in (q, k, v))
        return dense_attention(q, k, v, scale=config.head_dim**-0.5, window=window)[0], cache

    def run(params, tokens):
        model = merge(graphdef, params)
        positions = jnp.arange(LENGTH, dtype=jnp.int32)
        hidden, _ = model.forward(tokens, positions, attend, None, shards=shards)
        return model.logits(hidden, shards=shards)

    specs = {name: shards.spec(name) for name in params}
    program = jax.jit(shards.over(run, (specs, EVERYWHERE), EVERYWHERE))
    logits = program(params, shards.everywhere(tokens))
    assert all((np.asarray(logits) == part).all() for part in shards.parts(logits))
    return np.asarray(logits)


@pytest.mark.parametrize(
    ("config", "size", "packs"),
    [(CONFIG, 4, True), (TIED, 2, True), (dataclasses.replace(CONFIG, num_kv_heads=2), 4, False)],
    ids=["four packed", "tied packed", "two kv heads on four"],
)
def test_parts_say_what_the_whole_says(config, size, packs):
    tokens = np.random.default_rng(1).integers(0, 53, LENGTH).astype(np.int32)
    whole = merge(abstract_decoder(config)[0], {
        name: jnp.asarray(value) for name, value in whole_params(config).items()
    })
    wanted = np.asarray(jax.jit(lambda tokens: whole(tokens))(tokens[None])[0])
    got = logits_of_parts(config, size, packs, tokens)
    assert got.shape == wanted.shape and wanted.std() > 0.1
    np.testing.assert_allclose(got, wanted, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("config", [CONFIG, TIED])
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_every_number_has_its_device(config, size):
    """Each output column, hidden unit and token is somewhere, kv heads as often as kept."""
    copies = max(1, size // config.num_kv_heads)
    for name, shape in abstract_decoder(config)[1].items():
        cuts = rules.cuts(config, size, name)
        if cuts is None:
            assert name.endswith("norm.scale")
            continue
        (axis,) = {cut.axis for cut in cuts}
        assert len({cut.size for cut in cuts}) == 1
        seen = np.zeros(shape.shape[axis], int)
        for cut in cuts:
            for start, stop in cut.ranges:
                assert 0 <= start <= stop <= len(seen)
                seen[start:stop] += 1
        kept = seen[config.query_size :] if ".qkv." in name else seen[:0]
        assert (kept == copies).all()
        assert (seen[: len(seen) - len(kept)] == 1).all(), name


@pytest.mark.parametrize(
    ("change", "size", "what"),
    [({"num_heads": 12}, 8, "12 attention heads"), ({"num_kv_heads": 8}, 3, "8 attention heads"),
     ({"num_heads": 12, "num_kv_heads": 3}, 2, "3 kv heads"),
     ({"intermediate_size": 42}, 4, "42 hidden units")],
)
def test_what_cannot_be_cut_is_refused(change, size, what):
    with pytest.raises(ConfigError, match=what) as caught:
        rules.part_of(dataclasses.replace(CONFIG, **change), size)
    assert caught.value.field == "tensor_parallel" and caught.value.value == size


def test_parts_come_back():
    shards = Shards(CONFIG, 4)
    parts = [np.full((3, 2), rank) for rank in range(4)]
    joined = shards.join([shards.place(part, rank) for rank, part in enumerate(parts)])
    assert joined.shape == (12, 2) and joined.sharding.spec == PARTS
    for wanted, got, device in zip(parts, shards.parts(joined), shards.devices, strict=True):
        assert got.devices() == {device} and (np.asarray(got) == wanted).all()
    everywhere = shards.parts(shards.everywhere(np.arange(5)))
    assert all((np.asarray(part) == np.arange(5)).all() for part in everywhere)


def test_more_devices_than_there_are():
    there = len(jax.local_devices())
    with pytest.raises(ConfigError, match=f"1 to {there}, the cpu devices") as caught:
        local_devices(there + 1)
    assert "xla_force_host_platform_device_count" in str(caught.value)


def test_cpu_devices_are_made_before_jax_starts():
    """And not where somebody asked for more."""
    code = (
        "import logging; logging.basicConfig(level=logging.INFO)\n"
        "from aqua_jax.parallel.shards import local_devices\n"
        "import jax\n"
        "print(len(local_devices(3)), len(jax.devices()))"
    )
    clean = {k: v for k, v in os.environ.items() if k not in ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS")}
    more = {"XLA_FLAGS": "--xla_force_host_platform_device_count=5"}
    for extra, wanted in (({}, "3 3"), (more, "3 5")):
        done = subprocess.run(
            [sys.executable, "-c", code], env=clean | extra, capture_output=True, text=True
        )
        assert done.stdout.strip() == wanted, done.stderr
        assert ("3 devices, if they are CPUs, for tensor_parallel=3" in done.stderr) == (not extra)


def test_meeting_goes_on_while_cores_are_short():
    """More devices than cores, with C++ kernels between the places where they meet."""
    shards = Shards(dataclasses.replace(CONFIG, num_kv_heads=1), 4)
    kernel = np.eye(64, dtype=np.float32) / 4

    def run(w, x):
        from aqua_jax.ops.linear import linear

        for _ in range(20):
            x = shards.sum_parts(linear(x, w, in_features=64, out_features=64))
        return x

    w = shards.join([shards.place(pack(kernel, np.float32), rank) for rank in range(4)])
    x = shards.everywhere(np.arange(128, dtype=np.float32).reshape(2, 64))
    program = jax.jit(shards.over(run, (PARTS, EVERYWHERE), EVERYWHERE))
    y = x
    for _ in range(20):
        for _ in range(12):  # under way at once: twice what an engine has
            y = program(w, y)
        y.block_until_ready()
    np.testing.assert_allclose(np.asarray(y), np.asarray(x))
