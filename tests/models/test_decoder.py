"""The decoder as a researcher uses it, and the same layers with a cache."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from aqua_jax.models import Decoder, ModelConfig, RopeScaling
from aqua_jax.models.parameters import abstract_decoder, merge, parameters, random_params
from aqua_jax.ops.linear import pack

CONFIG = ModelConfig(
    family="qwen3", vocab_size=53, hidden_size=24, intermediate_size=40, num_layers=2, num_heads=6,
    num_kv_heads=2, head_dim=10, max_position=16, layer_windows=(5, None), qkv_bias=True,
    o_bias=True, mlp_bias=True, qk_norm=True, rope_scaling=RopeScaling(kind="dynamic", factor=2.0),
)  # fmt: skip
TIED = dataclasses.replace(CONFIG, tied_embeddings=True, qkv_bias=False, qk_norm=False)


def _model(config: ModelConfig = CONFIG, dtype: Any = jnp.float32) -> Decoder:
    """Random weights, enlarged so that attention isn't uniform and logits aren't all alike."""
    params = {}
    for name, value in random_params(config, dtype):
        larger = value if name.endswith("norm.scale") else value * np.asarray(8, value.dtype)
        params[name] = jnp.asarray(larger)
    return merge(abstract_decoder(config, dtype)[0], params)


# Compiled whole: operation by operation the same takes several times as long.
_run = nnx.jit(lambda model, tokens: model(tokens))


def _tokens(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(3).integers(0, 53, shape), jnp.int32)


@pytest.fixture(scope="module")
def model() -> Decoder:
    return _model()


@pytest.fixture(scope="module")
def logits(model: Decoder) -> np.ndarray:
    """Of _tokens(2, 23), longer than the trained context of 16."""
    return np.asarray(_run(model, _tokens(2, 23)))


def test_logits(logits: np.ndarray) -> None:
    assert logits.shape == (2, 23, 53) and logits.dtype == np.float32
    assert logits.std() > 0.1


def test_sequences_of_a_batch_are_independent(model: Decoder, logits: np.ndarray) -> None:
    alone = _run(model, _tokens(2, 23)[1:])
    np.testing.assert_allclose(alone[0], logits[1], atol=2e-5)


def test_no_token_sees_a_later_one(model: Decoder, logits: np.ndarray) -> None:
    changed = _tokens(2, 23).at[:, 15:].add(1) % 53
    out = np.asarray(_run(model, changed))
    np.testing.assert_allclose(out[:, :15], logits[:, :15], atol=2e-5)
    assert np.abs(out[:, 15:] - logits[:, 15:]).max() > 0.1


@nnx.jit
def _chunk(model: Decoder, tokens: jax.Array, start: Any, cache: Any) -> tuple[jax.Array, Any]:
    """Logits of a chunk at `start`, with keys and values [L, 2, 23, K, D] as the cache."""
    config, count = model.config, tokens.shape[0]
    positions = start + jnp.arange(count, dtype=jnp.int32)

    def attend(layer: int, q: Any, k: Any, v: Any, cache: Any) -> tuple[Any, Any]:
        cache = cache.at[layer, :, positions].set(jnp.stack([k, v], axis=1))
        keys, values = (jnp.repeat(x, 3, axis=1) for x in cache[layer])  # 3 query heads each
        scores = jnp.einsum("thd,uhd->htu", q, keys) * config.head_dim**-0.5
        distance = positions[:, None] - jnp.arange(23)
        visible = (distance >= 0) & (distance < (config.window(layer) or 99))
        weights = jax.nn.softmax(jnp.where(visible, scores, -1e9), axis=-1)
        return jnp.einsum("htu,uhd->thd", weights, values), cache

    hidden, cache = model.forward(
        tokens, positions, attend, cache, prompt_lens=jnp.full(count, 23), implementation="xla"
    )
    return model.logits(hidden, implementation="xla"), cache


def test_chunks_with_a_cache_equal_the_dense_forward(model: Decoder, logits: np.ndarray) -> None:
    tokens, start, rows = _tokens(2, 23)[0], 0, []
    cache = jnp.zeros((2, 2, 23, 2, 10))
    for count in (10, 10, 1, 1, 1):
        out, cache = _chunk(model, tokens[start : start + count], start, cache)
        rows.append(out)
        start += count
    np.testing.assert_allclose(np.concatenate(rows), logits[0], atol=5e-5)


def test_padding_rows_change_nothing(model: Decoder) -> None:
    tokens, positions = _tokens(12), jnp.arange(12, dtype=jnp.int32)
    seen: list[tuple[int, ...]] = []

    def attend(layer: int, q: Any, k: Any, v: Any, cache: Any) -> tuple[Any, Any]:
        seen.append((layer, *q.shape, *k.shape, *v.shape))
        return q + jnp.repeat(k + v, 3, axis=1), cache + 1

    @nnx.jit
    def run(model: Decoder, rows: jax.Array) -> tuple[jax.Array, jax.Array, Any]:
        hidden, calls = model.forward(tokens, positions, attend, jnp.zeros(()), rows=rows)
        return hidden, model.logits(hidden, rows), calls

    *full, calls = run(model, jnp.array([12], jnp.int32))
    *part, _ = run(model, jnp.array([7], jnp.int32))
    assert calls == 2
    assert seen == [(layer, 12, 6, 10, 12, 2, 10, 12, 2, 10) for layer in range(2)]
    for few, all_rows in zip(part, full, strict=True):
        np.testing.assert_allclose(few[:7], all_rows[:7], atol=1e-4)
        assert np.isfinite(np.asarray(few)).all()


@pytest.mark.parametrize("config", [CONFIG, TIED], ids=["odd", "tied"])
def test_gradient_agrees_with_finite_differences(config: ModelConfig) -> None:
    model = _model(dataclasses.replace(config, num_layers=1, layer_windows=(5,)))
    tokens = _tokens(2, 9)
    graphdef, state = nnx.split(model)

    def loss(state: Any) -> jax.Array:
        log_probs = jax.nn.log_softmax(nnx.merge(graphdef, state)(tokens[:, :-1]))
        return -jnp.mean(jnp.take_along_axis(log_probs, tokens[:, 1:, None], axis=-1))

    loss = jax.jit(loss)
    gradient = jax.grad(loss)(state)
    leaves, tree = jax.tree.flatten(state)
    slopes = jax.tree.leaves(gradient)
    assert len(slopes) == len(leaves)
    for slope in slopes:
        assert np.isfinite(np.asarray(slope)).all() and np.abs(np.asarray(slope)).max() > 0
    rng = np.random.default_rng(0)
    direction = [jnp.asarray(rng.standard_normal(x.shape), jnp.float32) for x in leaves]
    expected = sum(float(jnp.vdot(s, d)) for s, d in zip(slopes, direction, strict=True))
    step = 1e-3

    def moved(sign: float) -> float:
        pairs = zip(leaves, direction, strict=True)
        return float(loss(tree.unflatten([x + sign * step * d for x, d in pairs])))

    assert (moved(1) - moved(-1)) / (2 * step) == pytest.approx(expected, rel=2e-2, abs=2e-3)


def test_bfloat16_rounds_only_matrices(model: Decoder, logits: np.ndarray) -> None:
    graphdef, shapes = abstract_decoder(CONFIG, jnp.bfloat16)
    params = parameters(model)
    narrow = merge(graphdef, {name: params[name].astype(s.dtype) for name, s in shapes.items()})
    assert {name for name, s in shapes.items() if s.dtype == jnp.bfloat16} == {
        name for name in shapes if name.endswith(("kernel", "embedding"))
    }
    out = np.asarray(_run(narrow, _tokens(2, 23)))
    assert out.dtype == np.float32
    error = np.abs(out - logits).max() / np.abs(logits).max()
    assert 1e-5 < error < 5e-2


@pytest.mark.parametrize(
    ("config", "dtype"), [(CONFIG, jnp.float32), (TIED, jnp.bfloat16)], ids=["odd", "tied"]
)
def test_packed_matrices_give_the_same_logits(config: ModelConfig, dtype: Any) -> None:
    # The C++ feed-forward op, where there is one, takes hidden widths that are multiples of 64.
    config = dataclasses.replace(config, intermediate_size=128)
    model = _model(config, dtype=dtype)
    expected = _run(model, _tokens(2, 12))
    packed = dict(parameters(model))
    for name, value in packed.items():
        if name.endswith("kernel"):
            packed[name] = jnp.asarray(pack(np.asarray(value), dtype))
    if config.tied_embeddings:
        table = np.asarray(packed["embed.embedding"])
        packed["embed.embedding"] = jnp.asarray(pack(table.T, dtype))
    graphdef, _ = abstract_decoder(config, dtype)
    decoder = merge(graphdef, packed)
    np.testing.assert_allclose(_run(decoder, _tokens(2, 12)), expected, rtol=1e-4, atol=1e-4)
    fast = nnx.jit(lambda model, tokens: model(tokens, implementation=None))
    # Another order of sums moves some bf16 roundings of what is multiplied next.
    allowed = (2e-2 if dtype == jnp.bfloat16 else 1e-4) * np.abs(expected).max()
    np.testing.assert_allclose(fast(decoder, _tokens(2, 12)), expected, atol=allowed)


def test_tokens_of_the_wrong_rank(model: Decoder) -> None:
    with pytest.raises(ValueError, match=r"tokens.*\[batch, length\]"):
        model(_tokens(5))


def test_same_seed_same_model() -> None:
    config = dataclasses.replace(TIED, num_layers=1, layer_windows=())
    one, two = (Decoder(config, rngs=nnx.Rngs(7)) for _ in range(2))
    other = Decoder(config, rngs=nnx.Rngs(8))
    a, b, c = (parameters(m)["layers.0.mlp.down.kernel"] for m in (one, two, other))
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, c)
    assert float(jnp.std(a)) == pytest.approx(0.02, rel=0.1)
