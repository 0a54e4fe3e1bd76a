"""Safetensors: one file or a directory of shards, read lazily, tensor by tensor.

The header is checked against the file's size before anything is allocated: a JSON object of
{name: {dtype, shape, data_offsets}} after a little-endian u64 length, then the tensors' bytes.
Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from aqua_jax.errors import ModelLoadError
from aqua_jax.loading import files
from aqua_jax.loading.checkpoint import TableOfContents

HEADER_LIMIT = 100_000_000  # bytes; the reference implementation's own limit
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")

_DTYPES: Mapping[str, np.dtype] = {
    "F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16), "I64": np.dtype(np.int64), "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16), "I8": np.dtype(np.int8), "U8": np.dtype(np.uint8),
    "U16": np.dtype(np.uint16), "U32": np.dtype(np.uint32), "U64": np.dtype(np.uint64),
    "BOOL": np.dtype(np.bool_), "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}


@dataclasses.dataclass(frozen=True)
class _Entry:
    fd: int
    path: str
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _entry(fd: int, path: str, name: str, raw: Any, base: int, size: int) -> tuple[_Entry, int]:
    """Checks one header entry; returns it and where its data ends, relative to `base`."""

    def bad(why: str) -> ModelLoadError:
        return ModelLoadError(f"{path}: tensor {name!r}: {why}")

    if not isinstance(raw, dict):
        raise bad("its header entry is not an object")
    dtype = _DTYPES.get(str(raw.get("dtype")))
    if dtype is None:
        raise bad(f"dtype {raw.get('dtype')!r}; known: {', '.join(_DTYPES)}")
    shape, offsets = raw.get("shape"), raw.get("data_offsets")
    if not isinstance(shape, list) or len(shape) > 8 or not all(map(_is_count, shape)):
        raise bad(f"shape {shape!r} is not a list of at most 8 sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise bad(f"data_offsets {offsets!r} are not two positions")
    begin, end = offsets
    if not begin <= end <= size - base:
        raise bad(f"data_offsets {offsets} lie outside the file's {size - base} bytes of data")
    needed = math.prod(shape) * dtype.itemsize
    if needed != end - begin:
        raise bad(f"shape {shape} of {raw['dtype']} needs {needed} bytes, has {end - begin}")
    return _Entry(fd, path, dtype, tuple(shape), base + begin), end


def _read_header(fd: int, path: str, size: int) -> dict[str, _Entry]:
    if size < 8:
        raise ModelLoadError(f"{path}: truncated: {size} bytes, no safetensors header")
    prefix = np.empty(1, "<u8")
    files.read_into(fd, path, 0, prefix)
    length = int(prefix[0])
    if length > min(HEADER_LIMIT, size - 8):
        raise ModelLoadError(
            f"{path}: header length {length}; at most {min(HEADER_LIMIT, size - 8)} fits the file"
        )
    content = np.empty(length, np.uint8)
    files.read_into(fd, path, 8, content)
    header = files.parse_json_object(content.tobytes(), f"{path}: header")
    header.pop("__metadata__", None)
    entries: dict[str, _Entry] = {}
    spans = []
    for name, raw in header.items():
        entries[name], end = _entry(fd, path, name, raw, 8 + length, size)
        spans.append((entries[name].offset - 8 - length, end, name))
    spans.sort()
    for (_, end, first), (start, _, second) in itertools.pairwise(spans):
        if start < end:
            raise ModelLoadError(f"{path}: tensors {first!r} and {second!r} overlap")
    return entries


class SafetensorsCheckpoint(TableOfContents[_Entry]):
    """`Checkpoint` over one .safetensors file, or over a directory with one or with an index.

    Raises:
      ModelLoadError: nothing loadable there, or a broken file, header or index.
    """

    def __init__(self, path: str):
        self.path = path
        self._fds: list[int] = []
        self._entries = {}
        try:
            if os.path.isdir(path):
                self._open_directory(path)
            else:
                self._entries = self._open_file(path)
        except BaseException:
            self.close()
            raise

    def _open_file(self, path: str) -> dict[str, _Entry]:
        fd, size = files.open_regular(path)
        self._fds.append(fd)
        return _read_header(fd, path, size)

    def _open_directory(self, path: str) -> None:
        index = os.path.join(path, INDEX_NAME)
        single = os.path.join(path, SINGLE_NAME)
        if os.path.lexists(index):
            self._open_index(path, index)
        elif os.path.lexists(single):
            self._entries = self._open_file(single)
        else:
            self._open_lone_file(path)

    def _open_lone_file(self, path: str) -> None:
        listing = sorted(os.listdir(path))
        found = [name for name in listing if name.endswith(".safetensors")]
        if len(found) == 1:
            self._entries = self._open_file(os.path.join(path, found[0]))
            return
        if found:
            raise ModelLoadError(
                f"{path}: {len(found)} .safetensors files but no {INDEX_NAME} that names them"
            )
        pickles = [name for name in listing if name.endswith(_PICKLES)]
        if pickles:
            raise ModelLoadError(
                f"{path}: only pickled weights ({pickles[0]}), which can run code and are never "
                "loaded: convert to safetensors (transformers: model.save_pretrained(directory))"
            )
        raise ModelLoadError(f"{path}: no {SINGLE_NAME}, {INDEX_NAME} or .gguf file")

    def _open_index(self, path: str, index: str) -> None:
        weight_map = files.read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelLoadError(f"{index}: weight_map is missing, empty or not an object")
        shards: dict[str, dict[str, _Entry]] = {}
        for name, shard in weight_map.items():
            if (
                not isinstance(shard, str) or not shard.endswith(".safetensors")
                or os.path.basename(shard) != shard or "\\" in shard or "\0" in shard
            ):
                raise ModelLoadError(
                    f"{index}: weight_map[{name!r}] = {shard!r}; allowed: the name of a "
                    ".safetensors file in the same directory"
                )
            if shard not in shards:
                shards[shard] = self._open_file(os.path.join(path, shard))
            if name not in shards[shard]:
                raise ModelLoadError(f"{index}: tensor {name!r} is not in {shard}")
            self._entries[name] = shards[shard][name]
        for shard, entries in shards.items():
            for name in entries:
                if weight_map.get(name) != shard:
                    self._entries.setdefault(name, entries[name])

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows `start:stop` (elements of a vector) as a new array; raises ModelLoadError."""
        entry = self._find(name)
        out = np.empty((stop - start, *entry.shape[1:]), entry.dtype)
        row_bytes = math.prod(entry.shape[1:]) * entry.dtype.itemsize
        files.read_into(entry.fd, entry.path, entry.offset + start * row_bytes, out)
        return out

    def get(self, name: str) -> np.ndarray:
        """The whole tensor; raises ModelLoadError."""
        entry = self._find(name)
        out = np.empty(entry.shape, entry.dtype)
        files.read_into(entry.fd, entry.path, entry.offset, out)
        return out

    def close(self) -> None:
        """Closes the shards; idempotent."""
        while self._fds:
            os.close(self._fds.pop())
