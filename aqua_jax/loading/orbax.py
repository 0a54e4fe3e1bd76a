"""Orbax checkpoints of a decoder's parameters, read leaf by leaf.

A model directory in this format is config.json, optional tokenizer files and a tree that Orbax
saved, in the directory itself or in one folder directly in it. The tree's leaves are the decoder's
parameters as `models.parameters` names them: `save.py` writes a flat dictionary of dotted names.
What a researcher saved from a Flax model (`nnx.state(model)`, or its pure dictionary) is read as
well: nested keys joined by dots are the same names.

A leaf's bytes carry no checksum, as in safetensors: missing and shortened files are noticed, and
values that are no numbers, but not every flipped bit.

Orbax takes 0.3 s to import and is imported by the functions that need it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from aqua_jax.errors import ModelLoadError
from aqua_jax.loading.checkpoint import TableOfContents
from aqua_jax.loading.resolve import orbax_trees
from aqua_jax.models.config import ModelConfig
from aqua_jax.models.huggingface import ParamSource, hf_tensor_map

BIASES = "aqua_jax_biases"  # in config.json, where Hugging Face's fields cannot say which there are
BIAS_FIELDS = ("qkv_bias", "o_bias", "mlp_bias")
# Leaves restored by one call, which costs 5 to 12 ms however little it reads.
_BATCH_BYTES = 16 << 20


class _WithoutOrbax(logging.Filter):
    """Drops Orbax's progress reports, several lines for every call."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.WARNING or f"{os.sep}orbax{os.sep}" not in record.pathname


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without Orbax's progress reports; its warnings stay."""
    logger, dropped = logging.getLogger("absl"), _WithoutOrbax()
    logger.addFilter(dropped)
    try:
        yield
    finally:
        logger.removeFilter(dropped)


def _why(error: BaseException) -> str:
    """The first line of an error of Orbax or TensorStore, which may be long."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:400]


def tensor_map(config: ModelConfig) -> dict[str, ParamSource]:
    """As `hf_tensor_map`, for parameters stored under our names in our orientation."""
    table = {}
    for name, source in hf_tensor_map(config).items():
        shape = (sum(part[0] for part in source.shapes), *source.shapes[0][1:])
        table[name] = ParamSource((name,), False, (shape[::-1] if source.transpose else shape,))
    return table


def with_biases(config: ModelConfig, raw: Mapping[str, Any], where: str) -> ModelConfig:
    """`config` with the biases that `save` noted in config.json, where it did.

    Raises:
      ModelLoadError: the note isn't a list of known names.
    """
    noted = raw.get(BIASES)
    if noted is None:
        return config
    if not isinstance(noted, list) or not all(name in BIAS_FIELDS for name in noted):
        allowed = ", ".join(BIAS_FIELDS)
        raise ModelLoadError(f"{where}: {BIASES}: got {noted!r}; allowed: a list of {allowed}")
    qkv, o, mlp = (field in noted for field in BIAS_FIELDS)
    return dataclasses.replace(config, qkv_bias=qkv, o_bias=o, mlp_bias=mlp)


@dataclasses.dataclass(frozen=True)
class _Leaf:
    keys: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def _leaves(tree: Any, path: str, keys: tuple[str, ...] = ()) -> Iterator[tuple[str, _Leaf]]:
    """(dotted name, leaf) of a tree of metadata: nested dictionaries down to arrays."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            if not isinstance(key, str):
                raise ModelLoadError(f"{path}: key {key!r} of the saved tree is not text")
            yield from _leaves(value, path, (*keys, key))
        return
    # An nnx.State keeps each array as the `value` of its variable.
    name = ".".join(keys[:-1] if keys[1:] and keys[-1] == "value" else keys)
    shape, dtype = getattr(tree, "shape", None), getattr(tree, "dtype", None)
    if not keys or shape is None or dtype is None:
        raise ModelLoadError(
            f"{path}: {name or 'the saved tree'}: got {type(tree).__name__}; allowed: nested "
            "dictionaries of arrays"
        )
    yield name, _Leaf(keys, tuple(shape), np.dtype(dtype))


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts layers.10 after layers.9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


class OrbaxCheckpoint(TableOfContents[_Leaf]):
    """`Checkpoint` over a tree that Orbax saved: our names, our orientation `[in, out]`.

    Orbax reads a leaf as a whole, so that what is in memory beside the parameters is the leaf that
    is being read, or a batch of small ones.

    Raises:
      ModelLoadError: no tree, several of them, an unfinished or a broken one.
    """

    def __init__(self, path: str):
        # Orbax refuses relative paths.
        self.path = os.path.abspath(path)
        try:
            found = orbax_trees(self.path)
        except OSError as error:
            raise ModelLoadError(f"{path}: cannot be listed: {error}") from error
        if len(found) != 1:
            raise ModelLoadError(
                f"{path}: {len(found)} Orbax checkpoints; expected one, in the directory itself "
                f"or in one folder directly in it{': ' if found else ''}"
                + ", ".join(os.path.basename(entry) for entry in found[:8])
            )
        self._tree = found[0]
        import orbax.checkpoint

        self._ocp = orbax.checkpoint
        self._pending: dict[str, np.ndarray] = {}
        with quiet():
            handler = self._ocp.PyTreeCheckpointHandler()
            self._reader = self._ocp.Checkpointer(handler)
        try:
            with quiet():
                # From the handler: `Checkpointer.metadata` turns errors into None and a warning.
                tree = handler.metadata(pathlib.Path(self._tree)).tree
            self._entries = {}
            for name, leaf in _leaves(tree, self._tree):
                if name in self._entries:
                    raise ModelLoadError(f"{self._tree}: two leaves are named {name!r}")
                self._entries[name] = leaf
        except BaseException as error:
            self._reader.close()
            if isinstance(error, ModelLoadError) or not isinstance(error, Exception):
                raise
            raise ModelLoadError(f"{self._tree}: unreadable metadata: {_why(error)}") from error
        self._batches = self._in_batches()

    def _in_batches(self) -> dict[str, tuple[str, ...]]:
        """For every name those that are restored with it: neighbours of few bytes together."""
        batches: dict[str, tuple[str, ...]] = {}
        batch: list[str] = []
        size = 0
        for name in sorted(self._entries, key=_natural):
            leaf = self._entries[name].size
            if batch and size + leaf > _BATCH_BYTES:
                batches |= dict.fromkeys(batch, tuple(batch))
                batch, size = [], 0
            batch.append(name)
            size += leaf
        return batches | dict.fromkeys(batch, tuple(batch))

    def _restore(self, names: tuple[str, ...]) -> dict[str, np.ndarray]:
        from aqua_jax.loading.assemble import trim_heap

        arguments = self._ocp.RestoreArgs(restore_type=np.ndarray)
        item: dict[str, Any] = {}
        wanted: dict[str, Any] = {}
        for name in names:
            _place(item, self._entries[name].keys, 0)
            _place(wanted, self._entries[name].keys, arguments)
        try:
            with quiet():
                restored = self._reader.restore(
                    self._tree,
                    args=self._ocp.args.PyTreeRestore(
                        item=item, restore_args=wanted, partial_restore=True
                    ),
                )
            found = {name: _at(restored, self._entries[name].keys) for name in names}
        except Exception as error:  # TensorStore's, of several kinds
            what = repr(names[0]) if len(names) == 1 else f"one of {names[0]!r} to {names[-1]!r}"
            raise ModelLoadError(f"{self._tree}: tensor {what}: {_why(error)}") from error
        # What TensorStore's threads read and decompressed lies freed in heaps of their own.
        trim_heap()
        for name, value in found.items():
            leaf = self._entries[name]
            if not isinstance(value, np.ndarray) or value.shape != leaf.shape:
                raise ModelLoadError(
                    f"{self._tree}: tensor {name!r}: got {type(value).__name__} of shape "
                    f"{np.shape(value)}, expected an array of {leaf.shape}"
                )
        return found

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows `start:stop`; with the last ones the leaf leaves memory.

        Raises:
          ModelLoadError: unknown name, or files missing, cut short or damaged.
        """
        rows = self._find(name).shape[0]
        if name not in self._pending:
            self._pending |= self._restore(self._batches[name])
        value = self._pending.pop(name) if stop >= rows else self._pending[name]
        return value[start:stop]

    def get(self, name: str) -> np.ndarray:
        """The whole leaf."""
        return self.read_rows(name, 0, self._find(name).shape[0])

    def close(self) -> None:
        """Ends Orbax's reader; idempotent."""
        self._pending.clear()
        self._reader.close()


def _place(tree: dict[str, Any], keys: tuple[str, ...], value: Any) -> None:
    for key in keys[:-1]:
        tree = tree.setdefault(key, {})
    tree[keys[-1]] = value


def _at(tree: Any, keys: tuple[str, ...]) -> Any:
    for key in keys:
        tree = tree[key]
    return tree
