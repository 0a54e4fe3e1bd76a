"""What every checkpoint format offers: named tensors in Hugging Face's names and orientation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar

import numpy as np

from aqua_jax.errors import ModelLoadError

BLOCK_BYTES = 4 << 20  # of decoded rows at a time: fits the second-level cache with its source


class Checkpoint(Protocol):
    """Tensors by Hugging Face name, `[out, in]` for matrices, read in blocks of rows.

    Rows are the first axis (single elements for vectors). A checkpoint holds descriptors of open
    files until `close`.
    """

    def names(self) -> list[str]:
        """Names of all tensors, in file order."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor. Raises ModelLoadError for an unknown name."""
        ...

    def dtype(self, name: str) -> np.dtype:
        """Dtype that `read_rows` returns: float32 for quantised tensors."""
        ...

    def is_full_precision(self, name: str) -> bool:
        """Whether the tensor is stored with 32 bits or more: `dtype='auto'` then keeps float32."""
        ...

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows `start:stop` as a new array of `dtype(name)`; raises ModelLoadError."""
        ...

    def get(self, name: str) -> np.ndarray:
        """The whole tensor."""
        ...

    def close(self) -> None:
        """Closes the files; idempotent."""
        ...


class Entry(Protocol):
    """A tensor in a format's table of contents."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""

    @property
    def dtype(self) -> np.dtype:
        """Of what is read of it."""


E = TypeVar("E", bound=Entry)


class TableOfContents(Generic[E]):
    """The part of a checkpoint that its table of contents answers.

    Attributes:
      path: of the checkpoint, for errors.
    """

    path: str
    _entries: dict[str, E]

    def _find(self, name: str) -> E:
        entry = self._entries.get(name)
        if entry is None:
            raise ModelLoadError(f"{self.path}: no tensor {name!r}")
        return entry

    def names(self) -> list[str]:
        """Names of all tensors, in the table's order."""
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor. Raises ModelLoadError for an unknown name."""
        return self._find(name).shape

    def dtype(self, name: str) -> np.dtype:
        """Dtype of what is read (bfloat16 and float8 are ml_dtypes')."""
        return self._find(name).dtype

    def is_full_precision(self, name: str) -> bool:
        """Whether stored as float32 or float64."""
        return self._find(name).dtype in (np.float32, np.float64)


def row_blocks(
    checkpoint: Checkpoint, name: str, block_bytes: int = BLOCK_BYTES
) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (first row, rows) over a tensor, each block about `block_bytes` when decoded."""
    shape = checkpoint.shape(name)
    row_bytes = checkpoint.dtype(name).itemsize
    for size in shape[1:]:
        row_bytes *= size
    step = max(1, block_bytes // max(1, row_bytes))
    for start in range(0, shape[0], step):
        stop = min(shape[0], start + step)
        yield start, checkpoint.read_rows(name, start, stop)
