"""Bounds on a configuration before anything is sized by it: broken files must not eat memory."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from aqua_jax.errors import ConfigError, ModelLoadError
from aqua_jax.models.config import ModelConfig

# Far above any model there is (layers 126, width 53,248, vocabulary 262,144 are the largest known).
_LIMITS: Mapping[str, int] = {
    "vocab_size": 1 << 24, "hidden_size": 1 << 20, "intermediate_size": 1 << 22,
    "num_hidden_layers": 4096, "num_attention_heads": 1 << 14, "num_key_value_heads": 1 << 14,
    "head_dim": 1 << 14, "max_position_embeddings": 1 << 30, "sliding_window": 1 << 40,
}


def check_config(raw: Mapping[str, Any], where: str) -> None:
    """Refuses absurd sizes and weights that are stored in ways we don't read.

    Raises:
      ConfigError: a size is beyond any model's.
      ModelLoadError: the weights are quantised in a Hugging Face format (GPTQ, AWQ, FP8, ...).
    """
    for field, limit in _LIMITS.items():
        value = raw.get(field)
        if isinstance(value, (int, float)) and not value <= limit:
            raise ConfigError(field, value, f"at most {limit} (in {where})")
    quantised = raw.get("quantization_config")
    if quantised is not None:
        method = quantised.get("quant_method") if isinstance(quantised, Mapping) else quantised
        raise ModelLoadError(
            f"{where}: quantization_config: weights quantised with {str(method)[:60]!r} are not "
            "supported; use the unquantised model or a GGUF file"
        )


def check_layers(config: ModelConfig, tensors: int, path: str) -> None:
    """Refuses a configuration of more layers than the checkpoint has tensors.

    Raises:
      ModelLoadError: as said.
    """
    if config.num_layers > tensors:
        raise ModelLoadError(
            f"{path}: the configuration has {config.num_layers} layers, the file {tensors} tensors"
        )


def parameter_bytes(config: ModelConfig, dtype: np.dtype) -> int:
    """Bytes of the decoder's matrices in `dtype` (norms and biases are under 0.1% of them)."""
    d = config.hidden_size
    layer = d * (config.query_size + 2 * config.kv_size) + config.query_size * d
    layer += 3 * d * config.intermediate_size
    heads = 1 if config.tied_embeddings else 2
    return (config.num_layers * layer + heads * config.vocab_size * d) * dtype.itemsize


def check_memory(config: ModelConfig, dtype: np.dtype, where: str) -> None:
    """Refuses random weights that are larger than this machine's memory.

    Raises:
      ModelLoadError: with both sizes.
    """
    needed = parameter_bytes(config, dtype)
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > installed:
        raise ModelLoadError(
            f"{where}: {needed / 2**30:.1f} GiB of weights; this machine has "
            f"{math.floor(installed / 2**30)} GiB of memory"
        )
