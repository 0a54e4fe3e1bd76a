"""Small, odd Hugging Face models of every family, for comparing ours with transformers.

The sizes are chosen to break what powers of two hide: three or five heads, head sizes that aren't
hidden size / heads, a vocabulary that isn't a multiple of anything, windows and trained contexts
shorter than the prompts. Importing this module needs no torch; making a model does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from aqua_jax.models.config import ModelConfig
from aqua_jax.models.huggingface import hf_tensor_map

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_COMMON: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
# Contexts of 24 tokens, so that prompts of some 40 to 90 go far past them.
_TRAINED = 24
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": _TRAINED}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": _TRAINED,
}


def _config(model_type: str, **fields: Any) -> PretrainedConfig:
    from transformers import AutoConfig

    return AutoConfig.for_model(model_type, **{**_COMMON, **fields})


def _rope(model_type: str, rope: dict[str, Any], **fields: Any) -> PretrainedConfig:
    """A config with rope settings in transformers 5's spelling, and a base to notice."""
    return _config(model_type, rope_parameters={"rope_theta": 5000.0, **rope}, **fields)


def _table() -> dict[str, Callable[[], PretrainedConfig]]:
    """(model_type, fields) by name; names say what is odd about each."""
    plain: dict[str, tuple[str, dict[str, Any]]] = {
        "llama": ("llama", {}),
        "llama_mha": ("llama", {"num_key_value_heads": 6}),
        "llama_mqa": ("llama", {"num_key_value_heads": 1, "num_hidden_layers": 4}),
        "llama_tied": ("llama", {"tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
        "llama_biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
        "llama_wide_heads": ("llama", {"head_dim": 20, "num_attention_heads": 3,
                                       "num_key_value_heads": 3}),
        "smollm2": ("llama", {"hidden_size": 72, "num_attention_heads": 9,
                              "num_key_value_heads": 3, "tie_word_embeddings": True}),
        "mistral_window": ("mistral", {"sliding_window": 7}),
        "mistral_full": ("mistral", {"sliding_window": None, "head_dim": 10}),
        "mistral_window_one": ("mistral", {"sliding_window": 1, "num_key_value_heads": 6}),
        "ministral_mixed": ("ministral", {
            "sliding_window": 9, "head_dim": 12, "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
        "qwen2": ("qwen2", {"num_key_value_heads": 3}),
        "qwen2_tied_window": ("qwen2", {
            "tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 11,
            "max_window_layers": 1}),
        "qwen2_window_off": ("qwen2", {"use_sliding_window": False, "sliding_window": 5,
                                       "max_window_layers": 0}),
        "qwen3": ("qwen3", {"head_dim": 16}),
        "qwen3_tied_bias": ("qwen3", {"head_dim": 6, "tie_word_embeddings": True,
                                      "attention_bias": True, "num_key_value_heads": 6}),
        "qwen3_layer_types": ("qwen3", {
            "head_dim": 14, "use_sliding_window": True, "sliding_window": 13,
            "num_hidden_layers": 3,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"]}),
    }  # fmt: skip
    scaled: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
        "codellama_theta": ("llama", {"rope_type": "default", "rope_theta": 1e6}, {}),
        "llama_linear": ("llama", {"rope_type": "linear", "factor": 2.5}, {}),
        "llama_dynamic": ("llama", {"rope_type": "dynamic", "factor": 3.0},
                          {"max_position_embeddings": _TRAINED}),
        "llama3": ("llama", _LLAMA3, {"head_dim": 32}),
        "llama3_bands": ("llama", {**_LLAMA3, "low_freq_factor": 0.3, "high_freq_factor": 1.7,
                                   "original_max_position_embeddings": 50}, {"head_dim": 32}),
        "llama_yarn": ("llama", _YARN, {"head_dim": 32}),
        "llama_yarn_ramp": ("llama", {**_YARN, "beta_fast": 3.0, "beta_slow": 0.2,
                                      "truncate": False}, {"head_dim": 32}),
        "qwen2_yarn_attention_factor": ("qwen2", {**_YARN, "beta_fast": 4.0,
                                                  "attention_factor": 0.8}, {}),
        "qwen3_yarn_mscale": ("qwen3", {**_YARN, "mscale": 0.7, "mscale_all_dim": 1.3},
                              {"head_dim": 24}),
        "qwen3_yarn_ratio": ("qwen3", {**_YARN, "factor": None}, {"head_dim": 24}),
        "mistral_dynamic_window": ("mistral", {"rope_type": "dynamic", "factor": 2.0},
                                   {"max_position_embeddings": _TRAINED, "sliding_window": 10}),
        "mistral_yarn": ("mistral", {**_YARN, "beta_slow": 0.5},
                         {"sliding_window": 30, "head_dim": 16}),
    }  # fmt: skip
    table = {
        name: functools.partial(_config, kind, **fields) for name, (kind, fields) in plain.items()
    }
    for name, (kind, rope, fields) in scaled.items():
        table[name] = functools.partial(_rope, kind, rope, **fields)
    return table


FAMILIES: dict[str, Callable[[], PretrainedConfig]] = _table()
"""Configuration factories by name."""


def make_hf_model(name: str, seed: int = 0) -> PreTrainedModel:
    """A randomly initialised transformers model of `FAMILIES[name]`: f32, eval mode, CPU.

    Norm scales and biases, which transformers starts at 1 and 0, are drawn too, and matrices are
    larger than its 0.02, so that every parameter matters and logits lie well apart.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = FAMILIES[name]()
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in key:
                parameter.copy_(1 + 0.2 * noise)
            else:
                parameter.copy_((0.3 if key.endswith("bias") else 0.15) * noise)
    return model


def hf_config_dict(hf_model: PreTrainedModel) -> dict[str, Any]:
    """What `save_pretrained` would write to config.json, with our name for Ministral."""
    fields = hf_model.config.to_dict()
    if fields["model_type"] == "ministral":
        fields["model_type"] = "mistral"  # files say mistral; transformers renames on load
    return fields


def our_params(hf_model: PreTrainedModel, config: ModelConfig) -> dict[str, np.ndarray]:
    """The model's weights as our parameters, f32, by dotted name."""
    tensors = {name: tensor.numpy() for name, tensor in hf_model.state_dict().items()}
    return {
        name: source.join([tensors[part] for part in source.names])
        for name, source in hf_tensor_map(config).items()
    }
