"""The dense decoder against transformers in f32: logits of prompts and of continuations."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from aqua_jax.models.attention import dense_attention
from aqua_jax.models.config import ModelConfig
from aqua_jax.models.decoder import Decoder
from aqua_jax.models.huggingface import config_from_hf
from aqua_jax.models.parameters import abstract_decoder, merge
from tests.parity.families import FAMILIES, hf_config_dict, make_hf_model, our_params

TOLERANCE = 2e-4  # of the largest logit
LENGTH = 61  # beyond every window and trained context of FAMILIES


def _ours(hf_model: torch.nn.Module) -> Decoder:
    config = config_from_hf(hf_config_dict(hf_model))
    params = our_params(hf_model, config)
    graphdef, shapes = abstract_decoder(config)
    assert {n: p.shape for n, p in params.items()} == {n: s.shape for n, s in shapes.items()}
    return merge(graphdef, {name: jnp.asarray(value) for name, value in params.items()})


def _prompt(length: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 131, (1, length))


def _assert_close(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.shape == theirs.shape
    assert np.abs(theirs).max() > 1
    assert np.abs(ours - theirs).max() < TOLERANCE * np.abs(theirs).max()


@nnx.jit
def _one_pass(model: Decoder, tokens: jax.Array, prompt_len: jax.Array | int) -> jax.Array:
    """Logits [T, V] of one sequence of which the first `prompt_len` tokens were its prompt."""
    config: ModelConfig = model.config

    def attend(
        layer: int, q: jax.Array, k: jax.Array, v: jax.Array, cache: None
    ) -> tuple[jax.Array, None]:
        scale, window = config.head_dim**-0.5, config.window(layer)
        return dense_attention(q[None], k[None], v[None], scale=scale, window=window)[0], cache

    length = tokens.shape[0]
    hidden, _ = model.forward(
        tokens, jnp.arange(length), attend, None,
        prompt_lens=jnp.full(length, prompt_len), implementation="xla",
    )  # fmt: skip
    return model.logits(hidden, implementation="xla")


@pytest.mark.parametrize("name", FAMILIES)
def test_prompt_logits(name: str) -> None:
    hf_model = make_hf_model(name, seed=1)
    tokens = _prompt(LENGTH, seed=2)
    with torch.no_grad():
        theirs = hf_model(torch.tensor(tokens), use_cache=False).logits.numpy()
    ours = nnx.jit(lambda model, tokens: model(tokens))(_ours(hf_model), jnp.asarray(tokens))
    _assert_close(np.asarray(ours), theirs)


@pytest.mark.parametrize(
    ("name", "prompt_len"),
    [
        ("llama", 20), ("mistral_window", 20), ("qwen2_tied_window", 20), ("qwen3_layer_types", 20),
        ("llama3", 20), ("llama_yarn", 20),
        # Dynamic scaling, trained on 24 tokens: the prompt is shorter and the continuation
        # crosses; one token short of it; just there; just beyond; far beyond.
        *(("llama_dynamic", length) for length in (10, 23, 24, 25, 40)),
        ("mistral_dynamic_window", 18),
    ],
)  # fmt: skip
def test_cached_generation(name: str, prompt_len: int) -> None:
    hf_model = make_hf_model(name, seed=3)  # fresh: dynamic scaling leaves state in the model
    tokens = _prompt(prompt_len, seed=4)
    result = hf_model.generate(
        torch.tensor(tokens), attention_mask=torch.ones((1, prompt_len), dtype=torch.long),
        max_new_tokens=LENGTH - prompt_len, do_sample=False, use_cache=True,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    theirs = torch.cat(result.logits).numpy()  # one row for each generated token
    sequence = result.sequences[0].numpy()
    ours = np.asarray(_one_pass(_ours(hf_model), jnp.asarray(sequence), prompt_len))
    _assert_close(ours[prompt_len - 1 : -1], theirs)


def test_dynamic_rule_is_not_the_final_length() -> None:
    """What transformers caches under dynamic scaling can't be had with one base for all tokens."""
    hf_model = make_hf_model("llama_dynamic", seed=3)
    sequence = jnp.asarray(_prompt(LENGTH, seed=4)[0])
    model = _ours(hf_model)
    by_step, at_once = (_one_pass(model, sequence, length) for length in (10, LENGTH))
    assert np.abs(by_step - at_once).max() > 100 * TOLERANCE * np.abs(at_once).max()


@pytest.mark.parametrize("name", ["qwen2", "qwen2_tied_window", "qwen2_window_off", "qwen3"])
def test_older_files_without_layer_types(name: str) -> None:
    """transformers 5 writes the windows out layer by layer; files from before state the rule."""
    fields = FAMILIES[name]().to_dict()
    stated = config_from_hf(fields)
    types = fields.pop("layer_types")
    assert config_from_hf({**fields, "sliding_window": fields["sliding_window"] or 5}) == stated
    assert [w is not None for w in stated.layer_windows or [None] * len(types)] == [
        kind == "sliding_attention" for kind in types
    ]
