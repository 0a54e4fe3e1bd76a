"""Small checkpoints on disk: Hugging Face directories and GGUF files of random weights."""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import safetensors.numpy

from aqua_jax.models.huggingface import config_from_hf, hf_tensor_map
from tests.tiny import CONFIG

# 64-wide rows and heads, so that blocks of 32 divide them.
GGUF_CONFIG: dict[str, Any] = {
    **CONFIG, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 40,
}


def random_tensors(config: Mapping[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """f32 tensors under Hugging Face's names that fit a config.json, from N(0, 1)."""
    rng = np.random.default_rng(seed)
    return {
        name: rng.standard_normal(shape).astype(np.float32)
        for source in hf_tensor_map(config_from_hf(config)).values()
        for name, shape in zip(source.names, source.shapes, strict=True)
    }


def write_directory(
    path: pathlib.Path,
    config: Mapping[str, Any] = CONFIG,
    tensors: Mapping[str, np.ndarray] | None = None,
    *,
    dtype: Any = np.float32,
    shards: int = 1,
) -> dict[str, np.ndarray]:
    """Writes config.json and weights; returns the tensors as stored."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    stored = {
        name: np.ascontiguousarray(value.astype(dtype))
        for name, value in (random_tensors(config) if tensors is None else tensors).items()
    }
    if shards == 1:
        safetensors.numpy.save_file(stored, path / "model.safetensors")
        return stored
    weight_map = {}
    names = list(stored)
    for index in range(shards):
        part = {name: stored[name] for name in names[index::shards]}
        file = f"model-{index + 1:05d}-of-{shards:05d}.safetensors"
        safetensors.numpy.save_file(part, path / file)
        weight_map |= dict.fromkeys(part, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return stored


def _gguf_name(name: str) -> str:
    """llama.cpp's name of a Hugging Face tensor, from the `gguf` package's own table."""
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, 8)
    found = table.get_name(name, try_suffixes=(".weight", ".bias"))
    assert found is not None, name
    return found


def interleave(matrix: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to q and k of llama (`LlamaModel.permute`)."""
    shape = (heads, 2, matrix.shape[0] // heads // 2, *matrix.shape[1:])
    return matrix.reshape(shape).swapaxes(1, 2).reshape(matrix.shape)


def add_metadata(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    """The keys that describe the decoder."""
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])


def write_gguf(
    path: pathlib.Path,
    config: Mapping[str, Any] = GGUF_CONFIG,
    *,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    seed: int = 0,
    extra: Any = None,
) -> dict[str, np.ndarray]:
    """Writes a GGUF file as llama.cpp's converter would.

    Args:
      path: of the file.
      config: Hugging Face fields; model_type is the architecture.
      kind: of matrices; vectors are F32.
      seed: of the weights.
      extra: called with the writer, to add metadata or tensors.

    Returns:
      The exact f32 values that the file stands for, under Hugging Face's names, in their order.
    """
    architecture = config["model_type"]
    writer = gguf.GGUFWriter(str(path), architecture)
    add_metadata(writer, config)
    values: dict[str, np.ndarray] = {}
    for name, tensor in random_tensors(config, seed).items():
        quantised = kind if tensor.ndim == 2 else gguf.GGMLQuantizationType.F32
        raw = gguf.quants.quantize(tensor, quantised)
        values[name] = gguf.quants.dequantize(raw, quantised).astype(np.float32)
        match = re.search(r"self_attn\.([qk])_proj\.", name)
        if match and architecture == "llama":
            key = "num_attention_heads" if match[1] == "q" else "num_key_value_heads"
            raw = interleave(raw, config[key])
        stored = None if quantised in (0, 1) else quantised
        writer.add_tensor(_gguf_name(name), np.ascontiguousarray(raw), raw_dtype=stored)
    if extra is not None:
        extra(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def as_parameters(
    config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], dtype: Any = np.float32
) -> dict[str, np.ndarray]:
    """What `load` must return for these tensors: joined, matrices in `dtype`, the rest f32."""
    joined = {
        name: source.join([tensors[part] for part in source.names])
        for name, source in hf_tensor_map(config_from_hf(config)).items()
    }
    return {
        name: value.astype(dtype if value.ndim == 2 else np.float32)
        for name, value in joined.items()
    }


BF16 = ml_dtypes.bfloat16
