"""`save`: a model directory with its parameters as an Orbax checkpoint."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from typing import Any

import numpy as np

from aqua_jax.errors import ConfigError, ModelLoadError
from aqua_jax.loading.orbax import BIAS_FIELDS, BIASES, quiet, tensor_map, with_biases
from aqua_jax.models.config import ModelConfig
from aqua_jax.models.huggingface import config_from_hf, config_to_hf

TREE = "params"  # the folder that the tree goes into


def _checked_config(
    config: ModelConfig | Mapping[str, Any], params: Mapping[str, Any]
) -> dict[str, Any]:
    """What config.json is to say, after `params` were compared with it."""
    if isinstance(config, ModelConfig):
        ours, raw = config, config_to_hf(config)
        said = config_from_hf(raw)
        if any(getattr(said, field) != getattr(ours, field) for field in BIAS_FIELDS):
            raw[BIASES] = [field for field in BIAS_FIELDS if getattr(ours, field)]
    else:
        raw = dict(config)
        ours = with_biases(config_from_hf(raw), raw, "config")
    expected = {name: source.shapes[0] for name, source in tensor_map(ours).items()}
    wrong = sorted(expected.keys() ^ params.keys())
    if wrong:
        raise ModelLoadError(f"parameters missing or unknown: {', '.join(wrong[:8])}")
    for name, shape in expected.items():
        if tuple(params[name].shape) != shape:
            raise ModelLoadError(
                f"parameter {name!r}: got shape {tuple(params[name].shape)}, expected {shape} "
                "(unpacked)"
            )
    raw.pop("torch_dtype", None)
    return {**raw, "dtype": str(np.dtype(params["embed.embedding"].dtype))}


def _sync(folder: str) -> None:
    """Asks the system to have everything below `folder` on the disk."""
    for path, _, names in os.walk(folder):
        for entry in (*(os.path.join(path, name) for name in names), path):
            descriptor = os.open(entry, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def save(
    directory: str | os.PathLike[str],
    config: ModelConfig | Mapping[str, Any],
    params: Mapping[str, Any],
    extra_files: Mapping[str, bytes] | None = None,
) -> None:
    """Writes a model directory that `load` reads: all of it or, when something fails, nothing.

    Orbax copies what it is about to write, up to 1 GB at a time, or the largest parameter where
    that is more (rounded up to whole GB).

    Args:
      directory: where; must not exist, or be empty.
      config: the architecture, or the contents of a config.json.
      params: jax or NumPy arrays by dotted name, kernels `[in, out]`: `load(...).params`, or
        `models.parameters.parameters(model)` of a trained `Decoder`.
      extra_files: contents of further files by name, such as those of
        `find_tokenizer.tokenizer_files`.

    Raises:
      ConfigError: `directory` is taken, or an architecture that config.json cannot say.
      ModelLoadError: parameters that don't fit the configuration.
      OSError: the disk is full, or the parent directory isn't there or isn't ours.
    """
    target = os.path.abspath(os.path.expanduser(os.fspath(directory)))
    if os.path.lexists(target) and (not os.path.isdir(target) or os.listdir(target)):
        raise ConfigError("directory", target, "a directory that doesn't exist yet or is empty")
    raw = _checked_config(config, params)
    contents = {**(extra_files or {}), "config.json": json.dumps(raw, indent=2).encode()}
    import orbax.checkpoint as ocp

    largest = max(value.nbytes for value in params.values())
    unfinished = f"{target}.unfinished-{os.getpid()}"
    os.mkdir(unfinished)
    try:
        for name, content in contents.items():
            if os.path.basename(name) != name:
                raise ConfigError("extra_files", name, "file names without a directory")
            with open(os.path.join(unfinished, name), "wb") as file:
                file.write(content)
        with quiet():
            handler = ocp.StandardCheckpointHandler(save_concurrent_gb=max(1, -(-largest // 10**9)))
            with ocp.Checkpointer(handler) as writer:
                tree = os.path.join(unfinished, TREE)
                writer.save(tree, args=ocp.args.StandardSave(dict(params)))
        _sync(unfinished)
        os.rename(unfinished, target)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
