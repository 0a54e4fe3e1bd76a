"""A GGUF file's metadata as a Hugging Face configuration, so that one parser validates both.

Key names: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from aqua_jax.errors import ModelLoadError
from aqua_jax.loading.gguf import GGUFCheckpoint, uniform
from aqua_jax.models.config import ModelConfig

_MODEL_CLASS = {
    "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
# Trained contexts that llama3 rotary factors were made for; the factors do not state it.
_LLAMA3_CONTEXTS = (8192, 4096, 16384, 32768)


class _Metadata:
    """Typed access to the keys of one architecture."""

    def __init__(self, checkpoint: GGUFCheckpoint):
        self.path, self.values = checkpoint.path, checkpoint.header.metadata
        self.architecture = checkpoint.architecture

    def _raw(self, key: str) -> Any:
        return self.values.get(f"{self.architecture}.{key}")

    def _bad(self, key: str, value: Any, allowed: str) -> ModelLoadError:
        shown = repr(value)[:120]
        return ModelLoadError(
            f"{self.path}: {self.architecture}.{key}: got {shown}; allowed: {allowed}"
        )

    def integer(self, key: str, default: int | None = None) -> int:
        """A positive integer, or an array of equal ones."""
        value = uniform(self._raw(key))
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise self._bad(key, value, "an integer > 0")
        return value

    def number(self, key: str, default: float) -> float:
        """A finite number; a float32 as its shortest decimal (1e-05, not 9.99e-6)."""
        value = self._raw(key)
        if value is None:
            return default
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise self._bad(key, value, "a finite number")
        return float(str(np.float32(value)))

    def text(self, key: str, default: str) -> str:
        """A string."""
        value = self._raw(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self._bad(key, value, "a string")
        return value


def llama3_factors(
    head_dim: int, theta: float, factor: float, original: int, low: float = 1.0, high: float = 4.0
) -> np.ndarray:
    """Divisors of the rotary frequencies under llama3 scaling, f64[head_dim // 2].

    As llama.cpp's converter writes them to rope_freqs.weight (there rounded to float32).
    """
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = (original / wavelengths - low) / (high - low)
    divisors = np.ones_like(wavelengths)
    middle = (wavelengths >= original / high) & (wavelengths <= original / low)
    divisors[middle] = 1 / ((1 - smooth[middle]) / factor + smooth[middle])
    divisors[wavelengths > original / low] = factor
    return divisors


def _llama3_scaling(
    checkpoint: GGUFCheckpoint, head_dim: int, theta: float
) -> dict[str, Any] | None:
    """The `rope_scaling` whose factors rope_freqs.weight holds; None without that tensor."""
    if "rope_freqs.weight" not in checkpoint.header.tensors:
        return None
    stored = checkpoint.get("rope_freqs.weight").astype(np.float64).reshape(-1)
    where = f"{checkpoint.path}: rope_freqs.weight"
    if stored.shape != (head_dim // 2,) or not np.isfinite(stored).all():
        raise ModelLoadError(f"{where}: shape {stored.shape}; expected {head_dim // 2} numbers")
    if np.array_equal(stored, np.ones_like(stored)):
        return None
    factor = float(str(np.float32(stored.max())))
    for original in _LLAMA3_CONTEXTS:
        if np.allclose(stored, llama3_factors(head_dim, theta, factor, original), rtol=1e-4):
            return {
                "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": original,
            }
    raise ModelLoadError(
        f"{where}: factors up to {factor} that are not llama3 scaling of a context among "
        f"{_LLAMA3_CONTEXTS} (low_freq_factor 1, high_freq_factor 4); no other kind is supported"
    )


def _rope_scaling(
    checkpoint: GGUFCheckpoint, keys: _Metadata, head_dim: int, theta: float
) -> dict[str, Any] | None:
    llama3 = _llama3_scaling(checkpoint, head_dim, theta)
    if llama3 is not None:
        return llama3
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 1.0))
    kind = keys.text("rope.scaling.type", "linear" if factor != 1.0 else "none")
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        scaling: dict[str, Any] = {"rope_type": "yarn", "factor": factor}
        original = keys.integer("rope.scaling.original_context_length", 0)
        if original:
            scaling["original_max_position_embeddings"] = original
        for theirs, ours in (("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")):
            value = keys.number(f"rope.scaling.{theirs}", 0.0)
            if value:
                scaling[ours] = value
        if keys.number("rope.scaling.attn_factor", 1.0) != 1.0:
            raise ModelLoadError(
                f"{checkpoint.path}: {keys.architecture}.rope.scaling.attn_factor: allowed: 1"
            )
        return scaling
    raise ModelLoadError(
        f"{checkpoint.path}: {keys.architecture}.rope.scaling.type: got {kind!r}; "
        "allowed: none, linear, yarn"
    )


def token_id(metadata: dict[str, Any], key: str) -> int | None:
    """A token id under `tokenizer.ggml.{key}_token_id`, or None."""
    value = metadata.get(f"tokenizer.ggml.{key}_token_id")
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def eos_ids(metadata: dict[str, Any]) -> tuple[int, ...]:
    """Ids that end a generation: end of sequence, of turn and of message, without repeats."""
    found = [token_id(metadata, key) for key in ("eos", "eot", "eom")]
    return tuple(dict.fromkeys(i for i in found if i is not None))


def hugging_face_config(checkpoint: GGUFCheckpoint) -> dict[str, Any]:
    """The config.json that the converted model had, as far as the decoder needs it.

    Raises:
      ModelLoadError: a key is missing or out of range, or names something unsupported (experts,
        partial rotary embedding, unknown rotary scaling).
    """
    keys = _Metadata(checkpoint)
    names = set(checkpoint.names())
    if "model.embed_tokens.weight" not in names:
        raise ModelLoadError(f"{checkpoint.path}: no tensor 'token_embd.weight'")
    embedding = checkpoint.shape("model.embed_tokens.weight")
    if len(embedding) != 2:
        raise ModelLoadError(
            f"{checkpoint.path}: tensor 'token_embd.weight': got {embedding}, expected 2 dimensions"
        )
    if checkpoint.header.metadata.get(f"{keys.architecture}.expert_count", 0):
        raise ModelLoadError(
            f"{checkpoint.path}: {keys.architecture}.expert_count: mixtures of experts are not "
            "supported"
        )
    hidden, heads = keys.integer("embedding_length"), keys.integer("attention.head_count")
    head_dim = keys.integer("attention.key_length", max(1, hidden // heads))
    for key in ("attention.value_length", "rope.dimension_count"):
        if keys.integer(key, head_dim) != head_dim:
            raise ModelLoadError(
                f"{checkpoint.path}: {keys.architecture}.{key}: got {keys.integer(key)}; "
                f"allowed: the head dimension, {head_dim}"
            )
    theta = keys.number("rope.freq_base", 10000.0)
    # Mistral is written as llama; a window then is its sliding window on every layer.
    window = keys.integer("attention.sliding_window", 0) if keys.architecture == "llama" else 0
    family = "mistral" if window else keys.architecture
    config: dict[str, Any] = {
        "model_type": family,
        "architectures": [_MODEL_CLASS[family]],
        "vocab_size": embedding[0],
        "hidden_size": hidden,
        "intermediate_size": keys.integer("feed_forward_length"),
        "num_hidden_layers": keys.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": keys.integer("context_length"),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon", 1e-5),
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(checkpoint, keys, head_dim, theta),
        "tie_word_embeddings": "lm_head.weight" not in names,
        "hidden_act": "silu",
        "bos_token_id": token_id(checkpoint.header.metadata, "bos"),
        "eos_token_id": list(eos_ids(checkpoint.header.metadata)),
    }
    if window:
        config["sliding_window"] = window
    return config


def with_biases(config: ModelConfig, checkpoint: GGUFCheckpoint) -> ModelConfig:
    """`config` with the biases that the file has: no metadata key states them."""
    names = set(checkpoint.names())
    return dataclasses.replace(
        config,
        qkv_bias="model.layers.0.self_attn.q_proj.bias" in names,
        o_bias="model.layers.0.self_attn.o_proj.bias" in names,
        mlp_bias="model.layers.0.mlp.down_proj.bias" in names,
    )
