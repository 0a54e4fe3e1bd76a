"""Architectures by name, for machines that don't hold their weights here."""

from __future__ import annotations

from aqua_jax.errors import ConfigError
from aqua_jax.models.config import ModelConfig

# config.json of codellama/CodeLlama-34b-hf, meta-llama/Llama-2-7b-hf and Llama-2-70b-hf.
MODELS = {
    "7b": ModelConfig(
        family="llama", vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_layers=32,
        num_heads=32, num_kv_heads=32, head_dim=128, max_position=4096,
    ),
    "34b": ModelConfig(
        family="llama", vocab_size=32000, hidden_size=8192, intermediate_size=22016, num_layers=48,
        num_heads=64, num_kv_heads=8, head_dim=128, max_position=16384, rope_theta=1e6,
    ),
    "70b": ModelConfig(
        family="llama", vocab_size=32000, hidden_size=8192, intermediate_size=28672, num_layers=80,
        num_heads=64, num_kv_heads=8, head_dim=128, max_position=4096,
    ),
}


def model_named(name: str) -> ModelConfig:
    """A model of `MODELS`.

    Raises:
      ConfigError: there is none of that name.
    """
    if name not in MODELS:
        raise ConfigError("model", name, "a directory or one of " + ", ".join(MODELS))
    return MODELS[name]
