"""GGUF header: metadata and tensor table, every count checked against the file before it is used.

The `gguf` package's own reader makes a NumPy view per array element (1.76 s and 100 MB for the
49,152-token vocabulary of SmolLM2, against 0.05 s here) and trusts the counts of a broken file;
so the header is parsed here, and the package only dequantises.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import dataclasses
import mmap
import os
import struct
from typing import Any

import numpy as np

from aqua_jax.errors import ModelLoadError
from aqua_jax.loading import files

MAGIC = b"GGUF"
_SCALARS: dict[int, tuple[str, np.dtype]] = {
    0: ("<B", np.dtype(np.uint8)), 1: ("<b", np.dtype(np.int8)), 2: ("<H", np.dtype("<u2")),
    3: ("<h", np.dtype("<i2")), 4: ("<I", np.dtype("<u4")), 5: ("<i", np.dtype("<i4")),
    6: ("<f", np.dtype("<f4")), 7: ("<?", np.dtype(np.bool_)), 10: ("<Q", np.dtype("<u8")),
    11: ("<q", np.dtype("<i8")), 12: ("<d", np.dtype("<f8")),
}
_STRING, _ARRAY = 8, 9
_MAX_DIMS = 8
_MAX_NAME = 65535  # bytes of a key or tensor name, the format's own limit


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """One tensor of the table. `shape` is NumPy's order (GGUF stores it reversed)."""

    name: str
    shape: tuple[int, ...]
    type_id: int  # GGMLQuantizationType
    offset: int  # bytes from the start of the data section


@dataclasses.dataclass(frozen=True)
class Header:
    """Everything before the data: metadata values (arrays as lists or NumPy arrays), tensors."""

    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]
    data_offset: int  # bytes from the start of the file
    file_size: int


class _Cursor:
    """Bounded little-endian reads over a mapped file; running off the end is ModelLoadError."""

    def __init__(self, data: mmap.mmap, path: str):
        self.data, self.path, self.at, self.size = data, path, 0, len(data)

    def fail(self, why: str) -> ModelLoadError:
        return ModelLoadError(f"{self.path}: GGUF header at byte {self.at}: {why}")

    def need(self, count: int, what: str) -> None:
        if count > self.size - self.at:
            raise self.fail(f"{what}: needs {count} bytes, {self.size - self.at} are left")

    def scalar(self, code: str) -> Any:
        size = struct.calcsize(code)
        self.need(size, "a number")
        value = struct.unpack_from(code, self.data, self.at)[0]
        self.at += size
        return value

    def string(self, limit: int | None = None) -> str:
        length = self.scalar("<Q")
        self.need(length, f"a string of {length} bytes")
        if limit is not None and length > limit:
            raise self.fail(f"a name of {length} bytes; at most {limit} are allowed")
        text = self.data[self.at : self.at + length]
        self.at += length
        return text.decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind][0])
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array()
        raise self.fail(f"unknown value type {kind}")

    def array(self) -> Any:
        kind, count = self.scalar("<I"), self.scalar("<Q")
        if kind in _SCALARS:
            dtype = _SCALARS[kind][1]
            self.need(count * dtype.itemsize, f"an array of {count} numbers")
            values = np.frombuffer(self.data[self.at : self.at + count * dtype.itemsize], dtype)
            self.at += values.nbytes
            return values
        if kind == _STRING:
            self.need(count * 8, f"an array of {count} strings")
            return self._strings(count)
        raise self.fail(f"arrays of type {kind} are not supported")

    def _strings(self, count: int) -> list[str]:
        # The hot loop of the header (two arrays of ~50,000-150,000): no method call per string.
        data, size, at, unpack = self.data, self.size, self.at, struct.Struct("<Q").unpack_from
        values = []
        for _ in range(count):
            if size - at < 8:
                self.at = at
                raise self.fail("the file ends inside an array of strings")
            end = at + 8 + unpack(data, at)[0]
            if end > size:
                self.at = at
                raise self.fail(f"a string of {end - at - 8} bytes runs off the end of the file")
            values.append(data[at + 8 : end].decode("utf-8", errors="replace"))
            at = end
        self.at = at
        return values


def _metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for _ in range(count):
        key = cursor.string(_MAX_NAME)
        if key in metadata:
            raise cursor.fail(f"key {key!r} appears twice")
        metadata[key] = cursor.value(cursor.scalar("<I"))
    return metadata


def _tensors(cursor: _Cursor, count: int) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for _ in range(count):
        name = cursor.string(_MAX_NAME)
        if name in tensors:
            raise cursor.fail(f"tensor {name!r} appears twice")
        dims = cursor.scalar("<I")
        if not 0 <= dims <= _MAX_DIMS:
            raise cursor.fail(f"tensor {name!r} has {dims} dimensions; at most {_MAX_DIMS}")
        sizes = [cursor.scalar("<Q") for _ in range(dims)]
        kind, offset = cursor.scalar("<I"), cursor.scalar("<Q")
        tensors[name] = TensorInfo(name, tuple(reversed(sizes)), kind, offset)
    return tensors


def read_header(fd: int, path: str, size: int) -> Header:
    """Parses the header of an open GGUF file (version 2 or 3, little-endian) of `size` bytes.

    Raises:
      ModelLoadError: not GGUF, another version, or a count or length that the file cannot hold.
    """
    if size < 24:
        raise ModelLoadError(f"{path}: truncated: {size} bytes, no GGUF header")
    with mmap.mmap(fd, size, access=mmap.ACCESS_READ) as data:
        cursor = _Cursor(data, path)
        if data[:4] != MAGIC:
            raise ModelLoadError(f"{path}: not a GGUF file (starts with {data[:4]!r})")
        cursor.at = 4
        version = cursor.scalar("<I")
        if version not in (2, 3):
            raise cursor.fail(f"version {version}; versions 2 and 3, little-endian, can be read")
        num_tensors, num_keys = cursor.scalar("<Q"), cursor.scalar("<Q")
        # A key takes at least 8 (length) + 4 (type) + 1 bytes, a tensor 8 + 4 + 4 + 8.
        cursor.need(num_keys * 13, f"{num_keys} metadata entries")
        cursor.need(num_tensors * 24, f"{num_tensors} tensors")
        metadata = _metadata(cursor, num_keys)
        tensors = _tensors(cursor, num_tensors)
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
            raise ModelLoadError(
                f"{path}: general.alignment: got {alignment!r}; allowed: a power of two"
            )
        start = (cursor.at + alignment - 1) // alignment * alignment
    return Header(metadata, tensors, start, size)


def open_header(path: str) -> tuple[int, Header]:
    """Opens `path` and parses its header; the caller closes the descriptor.

    Raises:
      ModelLoadError: as `read_header`, or the file cannot be opened.
    """
    fd, size = files.open_regular(path)
    try:
        return fd, read_header(fd, path, size)
    except BaseException:
        os.close(fd)
        raise
