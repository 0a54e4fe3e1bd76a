"""Names and shapes without arrays, merging, dummy weights."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from aqua_jax.errors import ModelLoadError
from aqua_jax.models.config import ModelConfig
from aqua_jax.models.decoder import Decoder
from aqua_jax.models.parameters import abstract_decoder, merge, parameters, random_params

CONFIG = ModelConfig(
    family="qwen3", vocab_size=70, hidden_size=12, intermediate_size=20, num_layers=12,
    num_heads=2, num_kv_heads=1, head_dim=8, max_position=32, qkv_bias=True, o_bias=True,
    qk_norm=True,
)  # fmt: skip


def test_names_and_shapes() -> None:
    _, shapes = abstract_decoder(CONFIG, jnp.bfloat16)
    layer = {
        "input_norm.scale": (12,), "attention.qkv.kernel": (12, 32), "attention.qkv.bias": (32,),
        "attention.o.kernel": (16, 12), "attention.o.bias": (12,), "attention.q_norm.scale": (8,),
        "attention.k_norm.scale": (8,), "post_norm.scale": (12,), "mlp.gate_up.kernel": (12, 40),
        "mlp.down.kernel": (20, 12),
    }  # fmt: skip
    expected = {"embed.embedding": (70, 12), "norm.scale": (12,), "lm_head.kernel": (12, 70)}
    for index in range(12):
        expected |= {f"layers.{index}.{name}": shape for name, shape in layer.items()}
    assert {name: spec.shape for name, spec in shapes.items()} == expected
    for name, spec in shapes.items():
        matrix = name.endswith(("kernel", "embedding"))
        assert spec.dtype == (jnp.bfloat16 if matrix else jnp.float32)


def test_abstract_decoder_is_what_eval_shape_sees() -> None:
    graphdef, shapes = abstract_decoder(CONFIG)
    real, state = nnx.split(nnx.eval_shape(lambda: Decoder(CONFIG, rngs=nnx.Rngs(0))))
    assert graphdef == real and hash(graphdef) == hash(real)
    assert [leaf.shape for leaf in jax.tree.leaves(state)] == [s.shape for s in shapes.values()]


def test_a_model_of_terabytes_costs_nothing() -> None:
    huge = dataclasses.replace(
        CONFIG, hidden_size=2**15, intermediate_size=2**17, vocab_size=2**20, num_layers=64
    )
    _, shapes = abstract_decoder(huge)
    matrices = (s for name, s in shapes.items() if name.endswith(("kernel", "embedding")))
    assert sum(s.size for s in matrices) == huge.num_parameters > 2**39


def test_merge_and_back() -> None:
    params = dict(random_params(CONFIG))
    graphdef, _ = abstract_decoder(CONFIG)
    shuffled = dict(reversed(params.items()))
    again = parameters(merge(graphdef, shuffled))
    assert again.keys() == params.keys()
    for name, value in params.items():
        assert again[name] is value


def test_merge_inside_jit() -> None:
    config = dataclasses.replace(CONFIG, num_layers=1)
    graphdef, _ = abstract_decoder(config)
    params = {name: jnp.asarray(value) for name, value in random_params(config)}
    tokens = jnp.arange(6, dtype=jnp.int32)[None]
    inside = jax.jit(lambda params: merge(graphdef, params)(tokens))(params)
    outside = nnx.jit(lambda model: model(tokens))(merge(graphdef, params))
    np.testing.assert_allclose(inside, outside, atol=1e-5)


def test_merge_refuses_wrong_names() -> None:
    graphdef, _ = abstract_decoder(CONFIG)
    params = dict(random_params(CONFIG))
    scale = params.pop("norm.scale")
    with pytest.raises(ModelLoadError):
        merge(graphdef, params)
    with pytest.raises(ModelLoadError, match=r"final_norm\.scale, norm\.scale"):
        merge(graphdef, {**params, "final_norm.scale": scale})
    with pytest.raises(ModelLoadError):
        merge(graphdef, {**params, "norm.scale": scale, "extra.scale": scale})


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_random_params(dtype: jnp.dtype) -> None:
    _, shapes = abstract_decoder(CONFIG, dtype)
    params = dict(random_params(CONFIG, dtype, seed=1))
    assert {n: (p.shape, p.dtype) for n, p in params.items()} == {
        n: (s.shape, np.dtype(s.dtype)) for n, s in shapes.items()
    }
    assert (params["layers.3.attention.q_norm.scale"] == 1).all()
    kernels = np.concatenate([
        p.astype(np.float32).ravel() for n, p in params.items() if n.endswith("kernel")
    ])
    assert kernels.mean() == pytest.approx(0, abs=1e-3)
    assert kernels.std() == pytest.approx(0.02, rel=0.02)


def test_random_params_depend_on_seed_and_name_only() -> None:
    first, same = (dict(random_params(CONFIG, seed=-5)) for _ in range(2))
    other = dict(random_params(CONFIG, seed=6))
    shallow = dict(random_params(dataclasses.replace(CONFIG, num_layers=2), seed=-5))
    narrow = dict(random_params(CONFIG, jnp.bfloat16, seed=-5))
    name = "layers.1.mlp.down.kernel"
    np.testing.assert_array_equal(first[name], same[name])
    np.testing.assert_array_equal(first[name], shallow[name])
    np.testing.assert_array_equal(first[name].astype(ml_dtypes.bfloat16), narrow[name])
    assert not np.array_equal(first[name], other[name])
    assert not np.array_equal(first[name], first["layers.2.mlp.down.kernel"])
