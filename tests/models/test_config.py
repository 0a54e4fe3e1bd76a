"""ModelConfig and RopeScaling refuse what cannot be built, naming the field."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from aqua_jax.errors import ConfigError
from aqua_jax.models.config import MAX_PARAMETERS, ModelConfig, RopeScaling

BASE: dict[str, Any] = {
    "family": "llama", "vocab_size": 100, "hidden_size": 32, "intermediate_size": 48,
    "num_layers": 2, "num_heads": 6, "num_kv_heads": 3, "head_dim": 8, "max_position": 64,
}  # fmt: skip


def test_derived_sizes() -> None:
    config = ModelConfig(**BASE)
    assert (config.query_size, config.kv_size) == (48, 24)
    assert config.window(1) is None
    # q and o, k and v, gate, up and down; embedding and head.
    layer = 32 * (2 * 48 + 2 * 24 + 3 * 48)
    assert config.num_parameters == 2 * layer + 2 * 100 * 32
    tied = dataclasses.replace(config, tied_embeddings=True)
    assert tied.num_parameters == 2 * layer + 100 * 32


def test_window_of_each_layer() -> None:
    config = ModelConfig(**BASE, layer_windows=(None, 7))
    assert [config.window(layer) for layer in range(2)] == [None, 7]


def test_config_is_hashable_and_equal_by_value() -> None:
    assert hash(ModelConfig(**BASE)) == hash(ModelConfig(**BASE))
    assert ModelConfig(**BASE) == ModelConfig(**BASE)


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        *((name, value, name)
          for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers",
                       "num_heads", "num_kv_heads", "head_dim", "max_position")
          for value in (0, -1, 2**40, 10**300, 1.5, "8", None, True, [4], math.nan)),
        ("head_dim", 7, "head_dim"),
        ("num_kv_heads", 4, "num_kv_heads"),
        ("family", "", "family"),
        ("rms_norm_eps", -1e-5, "rms_norm_eps"),
        ("rms_norm_eps", math.nan, "rms_norm_eps"),
        ("rope_theta", 1.0, "rope_theta"),
        ("rope_theta", math.inf, "rope_theta"),
        ("rope_theta", 10**400, "rope_theta"),
        ("rope_scaling", {"kind": "linear"}, "rope_scaling"),
        ("tied_embeddings", 1, "tied_embeddings"),
        ("qkv_bias", "yes", "qkv_bias"),
        ("hidden_act", "gelu", "hidden_act"),
        ("layer_windows", (4,), "layer_windows"),
        ("layer_windows", (4, 0), "layer_windows"),
        ("layer_windows", [4, 4], "layer_windows"),
        ("bos_token_id", -1, "bos_token_id"),
        ("eos_token_ids", (1, -1), "eos_token_ids"),
        ("eos_token_ids", 3, "eos_token_ids"),
    ],
)  # fmt: skip
def test_bad_field_is_named(field: str, value: Any, named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ModelConfig(**{**BASE, field: value})
    assert caught.value.field == named
    assert caught.value.allowed


def test_sizes_that_are_only_together_absurd() -> None:
    wide = {"hidden_size": 2**20, "intermediate_size": 2**22, "num_layers": 4096}
    with pytest.raises(ConfigError) as caught:
        ModelConfig(**{**BASE, **wide})
    assert caught.value.field == "num_parameters"
    assert caught.value.value > MAX_PARAMETERS


def test_dynamic_scaling_needs_more_than_one_pair() -> None:
    sizes = {**BASE, "head_dim": 2, "rope_scaling": RopeScaling(kind="dynamic", factor=2.0)}
    with pytest.raises(ConfigError, match="head_dim"):
        ModelConfig(**sizes)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"kind": "longrope"}, "kind"),
        ({"kind": ["yarn"]}, "kind"),
        ({"kind": "linear", "factor": 0.5}, "factor"),
        ({"kind": "linear", "factor": "2"}, "factor"),
        ({"kind": "linear", "factor": math.nan}, "factor"),
        ({"kind": "yarn", "original_max_position": 0}, "original_max_position"),
        ({"kind": "yarn", "original_max_position": 4096.0}, "original_max_position"),
        ({"kind": "yarn", "beta_fast": 1.0, "beta_slow": 2.0}, "beta_fast"),
        ({"kind": "yarn", "beta_slow": 0}, "beta_slow"),
        ({"kind": "yarn", "attention_factor": -1.0}, "attention_factor"),
        ({"kind": "yarn", "mscale": math.inf}, "mscale"),
        ({"kind": "yarn", "truncate": None}, "truncate"),
        ({"kind": "llama3", "low_freq_factor": 4.0, "high_freq_factor": 4.0}, "high_freq_factor"),
    ],
)
def test_bad_rope_field_is_named(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        RopeScaling(**fields)
    assert caught.value.field == f"rope_scaling.{named}"
