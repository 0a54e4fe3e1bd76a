"""`load`: a model's configuration, parameters and tokenizer from a directory, a file or a name."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from aqua_jax.errors import ConfigError
from aqua_jax.loading import files, sanity
from aqua_jax.loading.checkpoint import Checkpoint
from aqua_jax.loading.find_tokenizer import load_tokenizer
from aqua_jax.loading.gguf import GGUFCheckpoint
from aqua_jax.loading.gguf_config import hugging_face_config, with_biases
from aqua_jax.loading.resolve import ModelFiles, resolve
from aqua_jax.loading.safetensors import SafetensorsCheckpoint
from aqua_jax.loading.tokenizer import NoTokenizer, Tokenizer
from aqua_jax.models.config import ModelConfig

if TYPE_CHECKING:
    import jax

    from aqua_jax.loading.assemble import Transform
    from aqua_jax.parallel.shards import Shards

_DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model ready for the engine.

    Attributes:
      config: the architecture.
      params: every decoder parameter by dotted name (see `models.parameters`), as transformed.
      tokenizer: a `NoTokenizer` when the model has none.
      eos_token_ids: ids that end a generation, from generation_config.json, config.json and the
        tokenizer together; empty when none is known.
      name: `demo`, or the last part of the path.
      dtype: of matrices.
      shards: the devices that share the model; None: one has all of it.
    """

    config: ModelConfig
    params: dict[str, jax.Array]
    tokenizer: Tokenizer
    eos_token_ids: tuple[int, ...]
    name: str
    dtype: np.dtype
    shards: Shards | None = None


def _config(raw: dict[str, Any], overrides: Mapping[str, Any] | None, where: str) -> ModelConfig:
    from aqua_jax.models.huggingface import config_from_hf

    raw = {**raw, **(overrides or {})}
    sanity.check_config(raw, where)
    return config_from_hf(raw)


def _token_ids(value: Any, vocab_size: int) -> list[int]:
    """An id, a list of ids or null as a list of the valid ones."""
    values = value if isinstance(value, list) else [value]
    return [
        item for item in values
        if isinstance(item, int) and not isinstance(item, bool) and 0 <= item < vocab_size
    ]


def _directory_eos(path: str, config: ModelConfig, tokenizer: Tokenizer) -> tuple[int, ...]:
    generation = files.read_optional_json(os.path.join(path, "generation_config.json"))
    found = _token_ids(generation.get("eos_token_id"), config.vocab_size)
    found += _token_ids(list(config.eos_token_ids), config.vocab_size)
    found += _token_ids(list(tokenizer.eos_token_ids), config.vocab_size)
    return tuple(dict.fromkeys(found))


def _tokenizer(
    found: ModelFiles, tokenizer: str | None, checkpoint: GGUFCheckpoint | None
) -> Tokenizer:
    """The named tokenizer, or the model's own (from the header that is already parsed)."""
    if tokenizer is not None:
        try:
            path = resolve(tokenizer).path
        except ConfigError as error:
            raise ConfigError("tokenizer", error.value, error.allowed) from None
        return load_tokenizer(path)
    if checkpoint is not None:
        from aqua_jax.loading import gguf_tokenizer

        words = gguf_tokenizer.build(found.path, checkpoint.header.metadata)
        return words if words is not None else NoTokenizer(found.name)
    return load_tokenizer(found.path, missing_ok=True, name=found.name)


def load(
    model: str,
    *,
    load_format: str = "auto",
    dtype: str = "auto",
    tokenizer: str | None = None,
    transform: Transform | None = None,
    config_overrides: Mapping[str, Any] | None = None,
    seed: int = 0,
    tensor_parallel: int = 1,
) -> LoadedModel:
    """Loads a model, parameter by parameter.

    Peak memory is the parameters as returned, plus the largest one, plus a few MiB.

    Args:
      model: a directory (config.json and safetensors or an Orbax checkpoint), a .gguf file, or
        `demo`.
      load_format: `auto`, `safetensors`, `gguf`, `orbax`, or `dummy` for seeded random weights from
        config.json alone.
      dtype: of matrices: `bfloat16`, `float32`, or `auto`: float32 for checkpoints stored in 32
        bits, else bfloat16. Norm scales and biases are float32.
      tokenizer: directory or .gguf file to take the tokenizer from instead.
      transform: called with (dotted name, array) for each finished parameter, or each device's part
        of it; what it returns takes its place, and it must not keep the array. Kernels come as
        `[in, out]`, mostly as a transposed view of `[out, in]` memory.
      config_overrides: entries that replace those of config.json, in Hugging Face's names.
      seed: of dummy weights.
      tensor_parallel: how many devices share the model, see `parallel.shards`.

    Raises:
      ConfigError: an argument or a field of config.json is invalid, or the model can't be cut for
        so many devices.
      ModelLoadError: a file is missing or broken, tensors don't fit the configuration, or a weight
        is NaN or infinite.
      DependencyError: an optional package is needed; the message has the command.
    """
    if dtype not in ("auto", *_DTYPES):
        raise ConfigError("dtype", dtype, "one of auto, bfloat16, float32")
    found = resolve(model, load_format)
    if found.format == "dummy":
        return _load_dummy(
            found, dtype, tokenizer, transform, config_overrides, seed, tensor_parallel
        )
    from aqua_jax.loading import assemble, orbax
    from aqua_jax.models.huggingface import hf_tensor_map

    gguf = found.format == "gguf"
    checkpoint = GGUFCheckpoint(found.path) if gguf else None
    source: Checkpoint | None = checkpoint
    try:
        if checkpoint is not None:
            raw = hugging_face_config(checkpoint)
            config = with_biases(_config(raw, config_overrides, found.path), checkpoint)
        else:
            where = os.path.join(found.path, "config.json")
            raw = files.read_json(where)
            config = _config(raw, config_overrides, where)
            if found.format == "orbax":
                config = orbax.with_biases(config, raw, where)
                source = orbax.OrbaxCheckpoint(found.path)
            else:
                source = SafetensorsCheckpoint(found.path)
        assert source is not None
        sanity.check_layers(config, len(source.names()), found.path)
        table = hf_tensor_map(config) if found.format != "orbax" else orbax.tensor_map(config)
        assemble.check_complete(source, table, found.path, config.tied_embeddings)
        words = _tokenizer(found, tokenizer, checkpoint)
        kind = assemble.auto_dtype(source) if dtype == "auto" else _DTYPES[dtype]
        shards = _shards(config, tensor_parallel)
        params = dict(assemble.stream(source, table, kind, found.path, transform, shards))
        assemble.trim_heap()
    finally:
        if source is not None:
            source.close()
    eos = config.eos_token_ids if gguf else _directory_eos(found.path, config, words)
    return LoadedModel(config, params, words, tuple(eos), found.name, kind, shards)


def _shards(config: ModelConfig, tensor_parallel: int) -> Shards | None:
    from aqua_jax.parallel.shards import Shards

    return None if tensor_parallel == 1 else Shards(config, tensor_parallel)


def _load_dummy(
    found: ModelFiles, dtype: str, tokenizer: str | None, transform: Transform | None,
    overrides: Mapping[str, Any] | None, seed: int, tensor_parallel: int,
) -> LoadedModel:
    """Random weights for `found.path`/config.json; bfloat16 unless its dtype says float32."""
    where = os.path.join(found.path, "config.json")
    raw = files.read_json(where)
    config = _config(raw, overrides, where)
    if dtype == "auto":
        stated = raw.get("dtype", raw.get("torch_dtype"))
        dtype = "float32" if stated == "float32" else "bfloat16"
    kind = _DTYPES[dtype]
    sanity.check_memory(config, kind, where)
    words = _tokenizer(found, tokenizer, None)
    from aqua_jax.loading.assemble import place, take_parts
    from aqua_jax.models.parameters import random_params

    shards = _shards(config, tensor_parallel)
    params = {}
    for name, array in random_params(config, kind, seed):
        parts = take_parts(array, None if shards is None else shards.cuts(name))
        params[name] = place(name, parts, transform, shards)
    eos = _directory_eos(found.path, config, words)
    return LoadedModel(config, params, words, eos, found.name, kind, shards)
