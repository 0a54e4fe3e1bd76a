"""config.json of every family, both rope spellings, and what is refused; tensor names."""

from __future__ import annotations

import dataclasses
import json
import math
import tracemalloc
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from aqua_jax.errors import ConfigError, ModelLoadError
from aqua_jax.models.config import ModelConfig, RopeScaling
from aqua_jax.models.huggingface import config_from_hf, config_to_hf, hf_tensor_map
from aqua_jax.models.parameters import abstract_decoder

LLAMA: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 40,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip
QWEN = {**LLAMA, "model_type": "qwen2"}
MISTRAL = {**LLAMA, "model_type": "mistral"}


def test_llama() -> None:
    assert config_from_hf(LLAMA) == ModelConfig(
        family="llama", vocab_size=96, hidden_size=32, intermediate_size=40, num_layers=3,
        num_heads=4, num_kv_heads=2, head_dim=8, max_position=512, rms_norm_eps=1e-5,
        rope_theta=500000.0, bos_token_id=1, eos_token_ids=(2,),
    )  # fmt: skip


def test_what_absent_and_null_fields_mean() -> None:
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    bare = {name: LLAMA[name] for name in ("model_type", "num_attention_heads", *sizes)}
    config = config_from_hf(bare)
    assert (config.num_kv_heads, config.head_dim) == (4, 8)
    assert (config.max_position, config.rms_norm_eps, config.rope_theta) == (2048, 1e-6, 10000.0)
    assert (config.bos_token_id, config.eos_token_ids) == (1, (2,))
    mistral = config_from_hf({**bare, "model_type": "mistral", "num_key_value_heads": None})
    assert mistral.layer_windows == (4096,) * 3
    assert mistral.num_kv_heads == 4
    assert config_from_hf({**MISTRAL, "sliding_window": None}).layer_windows == ()
    assert config_from_hf({**QWEN, "model_type": "qwen3"}).head_dim == 128
    none = config_from_hf({**LLAMA, "bos_token_id": None, "eos_token_id": None})
    assert (none.bos_token_id, none.eos_token_ids) == (None, ())


def test_several_ends_of_sequence() -> None:
    config = config_from_hf({**LLAMA, "eos_token_id": [128001, 128008, 128009]})
    assert config.eos_token_ids == (128001, 128008, 128009)


def test_what_no_config_json_says() -> None:
    read = config_from_hf({**MISTRAL, "sliding_window": 6})
    with pytest.raises(ConfigError, match="layer_windows"):
        config_to_hf(dataclasses.replace(read, layer_windows=(6, 6, 7)))
    with pytest.raises(ConfigError, match="qk_norm"):
        config_to_hf(dataclasses.replace(read, qk_norm=True))
    with pytest.raises(ConfigError, match="model_type"):
        config_to_hf(dataclasses.replace(read, family="gpt"))
    # Biases go as far as the fields do.
    raw = config_to_hf(dataclasses.replace(read, qkv_bias=True))
    assert config_from_hf(raw) == read


def test_biases_by_family() -> None:
    asked = {"attention_bias": True, "mlp_bias": True}
    found = {
        family: config_from_hf({**LLAMA, **asked, "model_type": family})
        for family in ("llama", "mistral", "qwen2", "qwen3")
    }
    got = {name: (c.qkv_bias, c.o_bias, c.mlp_bias, c.qk_norm) for name, c in found.items()}
    assert got == {
        "llama": (True, True, True, False),
        "mistral": (False, False, False, False),
        "qwen2": (True, False, False, False),
        "qwen3": (True, True, False, True),
    }
    plain = config_from_hf({**QWEN, "attention_bias": False})
    assert (plain.qkv_bias, plain.o_bias) == (True, False)


@pytest.mark.parametrize(
    ("fields", "windows"),
    [
        ({"sliding_window": 8}, ()),
        ({"sliding_window": 8, "use_sliding_window": False, "max_window_layers": 0}, ()),
        ({"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 0}, (8, 8, 8)),
        ({"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 2},
         (None, None, 8)),
        ({"sliding_window": 8, "use_sliding_window": True}, ()),  # from layer 28 on
        ({"sliding_window": None, "use_sliding_window": True, "max_window_layers": 0}, ()),
        ({"sliding_window": 8, "use_sliding_window": True,
          "layer_types": ["sliding_attention", "full_attention", "full_attention"]},
         (8, None, None)),
        ({"layer_types": ["full_attention"] * 3}, ()),
    ],
)  # fmt: skip
def test_qwen_windows(fields: dict[str, Any], windows: tuple[int | None, ...]) -> None:
    assert config_from_hf({**QWEN, **fields}).layer_windows == windows


def test_mistral_windows() -> None:
    assert config_from_hf({**MISTRAL, "sliding_window": 6}).layer_windows == (6, 6, 6)
    mixed = {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}
    config = config_from_hf({**MISTRAL, "sliding_window": 6, **mixed})
    assert config.layer_windows == (None, 6, None)


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 128}  # fmt: skip


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({}, RopeScaling()),
        ({"rope_type": "default"}, RopeScaling()),
        ({"rope_type": "linear", "factor": 2}, RopeScaling(kind="linear", factor=2)),
        ({"rope_type": "dynamic", "factor": 2.0}, RopeScaling(kind="dynamic", factor=2.0)),
        ({"rope_type": "llama3", **LLAMA3},
         RopeScaling(kind="llama3", factor=8.0, original_max_position=128)),
        ({"rope_type": "llama3", "factor": 8.0}, RopeScaling(kind="llama3", factor=8.0)),
        ({"rope_type": "yarn", "factor": 4.0, "beta_fast": None, "truncate": False},
         RopeScaling(kind="yarn", factor=4.0, truncate=False)),
        ({"rope_type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.5,
          "attention_factor": 1.2, "beta_fast": 16, "beta_slow": 2},
         RopeScaling(kind="yarn", factor=4.0, mscale=1.0, mscale_all_dim=0.5,
                     attention_factor=1.2, beta_fast=16, beta_slow=2)),
        ({"rope_type": "yarn", "original_max_position_embeddings": 128},
         RopeScaling(kind="yarn", factor=4.0, original_max_position=128)),
    ],
)  # fmt: skip
def test_every_rope_spelling(rope: dict[str, Any], expected: RopeScaling) -> None:
    old = {**LLAMA, "rope_scaling": rope or None}
    older = {**LLAMA, "rope_scaling": {
        ("type" if name == "rope_type" else name): value for name, value in rope.items()}}
    new = {name: value for name, value in LLAMA.items() if name != "rope_theta"}
    new["rope_parameters"] = {**rope, "rope_theta": 500000.0}
    for spelling in (old, older, new):
        config = config_from_hf(spelling)
        assert config.rope_scaling == expected
        assert config.rope_theta == 500000.0


def test_rope_scaling_wins_over_rope_parameters() -> None:
    both = {"rope_scaling": {"type": "linear", "factor": 2.0},
            "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e6}}
    config = config_from_hf({**LLAMA, **both})
    assert (config.rope_scaling.factor, config.rope_theta) == (2.0, 500000.0)


def test_original_length_beside_the_rope_settings_wins() -> None:
    rope = {"rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8},
            "original_max_position_embeddings": 16}
    assert config_from_hf({**LLAMA, **rope}).rope_scaling.original_max_position == 16


def _refused(config: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        config_from_hf(config)
    return caught.value


@pytest.mark.parametrize("field", ["model_type", "vocab_size", "hidden_size", "intermediate_size",
                                   "num_hidden_layers", "num_attention_heads"])
def test_missing_field_is_named(field: str) -> None:
    left = {name: value for name, value in LLAMA.items() if name != field}
    assert _refused(left).field == field


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        *(({name: value}, name)
          for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                       "num_attention_heads", "num_key_value_heads", "head_dim",
                       "max_position_embeddings")
          for value in (0, -3, 2**40, 10**300, 2.5, "many", False, [], {}, math.nan)),
        ({"model_type": "gpt2"}, "model_type"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"num_attention_heads": 5, "num_key_value_heads": 5}, "hidden_size"),
        ({"head_dim": 9}, "head_dim"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings"),
        ({"attention_bias": 1}, "attention_bias"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"rope_theta": "1e6"}, "rope_theta"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"bos_token_id": "<s>"}, "bos_token_id"),
        ({"eos_token_id": [2, None]}, "eos_token_id"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"rope_scaling": [2.0]}, "rope_scaling"),
        ({"rope_scaling": {"type": "longrope", "long_factor": []}}, "rope_scaling.rope_type"),
        ({"rope_parameters": {"rope_type": "mrope"}}, "rope_parameters.rope_type"),
        ({"rope_parameters": {"rope_type": 7}}, "rope_parameters.rope_type"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "rope_parameters.factor"),
        ({"rope_scaling": {"type": "linear", "factor": -2}}, "rope_scaling.factor"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling.factor"),
        ({"max_position_embeddings": 10**400, "rope_scaling":
          {"type": "yarn", "original_max_position_embeddings": 8}}, "rope_scaling.factor"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0,
                              "original_max_position_embeddings": "8k"}},
         "rope_parameters.original_max_position_embeddings"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_fast": 0.5}},
         "rope_scaling.beta_fast"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
         "rope_parameters.full_attention"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25}},
         "rope_parameters.partial_rotary_factor"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window"),
        ({"model_type": "mistral", "sliding_window": "4096"}, "sliding_window"),
        ({"model_type": "qwen2", "use_sliding_window": 1}, "use_sliding_window"),
        ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": -1},
         "max_window_layers"),
        ({"model_type": "qwen3", "layer_types": ["full_attention"]}, "layer_types"),
        ({"model_type": "qwen3", "layer_types": ["full_attention", "linear_attention", 3]},
         "layer_types"),
        ({"model_type": "qwen3", "layer_types": ["sliding_attention"] * 3}, "sliding_window"),
    ],
)  # fmt: skip
def test_bad_field_is_named(fields: dict[str, Any], named: str) -> None:
    error = _refused({**LLAMA, **fields})
    assert error.field == named
    assert error.allowed
    assert named in str(error)


def test_not_an_object() -> None:
    for value in (None, [], "llama", 3):
        with pytest.raises(ModelLoadError):
            config_from_hf(value)  # type: ignore[arg-type]


_FIELDS = (*LLAMA, "head_dim", "rope_scaling", "rope_parameters", "sliding_window", "layer_types",
           "use_sliding_window", "max_window_layers", "attention_bias", "mlp_bias",
           "original_max_position_embeddings", "quantization_config")  # fmt: skip
_ROPE_FIELDS = ("rope_type", "type", "factor", "rope_theta", "original_max_position_embeddings",
                "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "mscale",
                "mscale_all_dim", "attention_factor", "truncate")  # fmt: skip
_KINDS = st.sampled_from(["default", "linear", "dynamic", "llama3", "yarn", "longrope"])
_JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-5, 200), st.integers(), st.floats(),
    st.sampled_from([2**31, 2**63, 10**400, "", "llama", "silu"]), _KINDS,
    st.lists(st.one_of(st.integers(), st.none(), st.sampled_from(["sliding_attention"])),
             max_size=4),
)  # fmt: skip
_ROPE = st.dictionaries(st.sampled_from(_ROPE_FIELDS), st.one_of(_KINDS, _JUNK), max_size=6)


@hypothesis.given(
    family=st.sampled_from(["llama", "mistral", "qwen2", "qwen3"]),
    changes=st.dictionaries(st.sampled_from(_FIELDS), st.one_of(_JUNK, _ROPE), max_size=4),
    removed=st.sets(st.sampled_from(_FIELDS), max_size=2),
)
def test_fuzzed_config_is_read_or_refused(
    family: str, changes: dict[str, Any], removed: set[str]
) -> None:
    config = {**LLAMA, "model_type": family, **changes}
    for field in removed:
        config.pop(field, None)
    try:
        read = config_from_hf(config)
    except ConfigError as error:
        name = error.field.split(".")[0]
        assert name in (*_FIELDS, "num_parameters"), error
        return
    # What is accepted can be said again,
    assert config_from_hf(json.loads(json.dumps(config_to_hf(read)))) == read
    # can be built, and its rotary rates are usable numbers.
    from aqua_jax.models.rope import attention_scale, inverse_frequencies

    rates = inverse_frequencies(read)
    assert rates.shape == (read.head_dim // 2,)
    assert np.isfinite(rates).all() and (rates >= 0).all()
    assert math.isfinite(attention_scale(read))
    assert len(read.layer_windows) in (0, read.num_layers)


def test_absurd_sizes_cost_no_memory() -> None:
    tracemalloc.start()
    for value in (2**24, 2**31, 2**62, 10**300):
        for field in ("num_hidden_layers", "vocab_size", "hidden_size", "sliding_window"):
            for family in ("mistral", "qwen2"):
                try:
                    config_from_hf(json.loads(json.dumps(
                        {**LLAMA, "model_type": family, "head_dim": 8, field: value})))
                except ConfigError as error:
                    assert error.field in (field, "num_parameters")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_tensor_map_covers_the_decoder(family: str, tied: bool) -> None:
    config = config_from_hf({**LLAMA, "model_type": family, "tie_word_embeddings": tied,
                             "attention_bias": True, "mlp_bias": True, "head_dim": 10})
    _, shapes = abstract_decoder(config)
    table = hf_tensor_map(config)
    assert table.keys() == shapes.keys()
    rng, seen = np.random.default_rng(0), []
    for name, source in table.items():
        theirs = [rng.standard_normal(shape) for shape in source.shapes]
        ours = source.join(theirs)
        assert ours.shape == shapes[name].shape
        back = source.split(ours)
        assert tuple(back) == source.names
        for before, after in zip(theirs, back.values(), strict=True):
            np.testing.assert_array_equal(before, after)
        seen += source.names
    assert len(seen) == len(set(seen))
    assert ("lm_head.weight" in seen) != tied


def test_fused_kernels_keep_the_order_of_their_parts() -> None:
    config = config_from_hf(LLAMA)
    source = hf_tensor_map(config)["layers.1.attention.qkv.kernel"]
    assert source.names == tuple(f"model.layers.1.self_attn.{part}_proj.weight" for part in "qkv")
    q, k, v = (np.full(shape, value) for shape, value in zip(source.shapes, (1, 2, 3), strict=True))
    kernel = source.join([q, k, v])
    assert kernel.shape == (32, 64)
    assert [kernel[0, 0], kernel[0, 32], kernel[0, 48]] == [1, 2, 3]
