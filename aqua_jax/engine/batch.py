"""The arrays that cross jit with a step, packed into one int32 vector per program.

A step has two programs (`runner`), so two vectors: `ForwardBatch` for the forward pass and
`SampleBatch` for sampling. Each is a frozen pytree whose fields are views cut out of the vector
inside the program, and each has a writer that fills a fresh NumPy vector on the host. One
vector is one transfer, where six small `device_put`s measured 128 us.

A fresh vector per step is not waste but a rule: JAX on CPU aliases NumPy input, and the device
may still be reading the vector of the step before.

Letters: T flat tokens, S sequence capacity, M page-table width, R rows that want a token, N page
moves.
"""

from __future__ import annotations

import array
import dataclasses
import functools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from aqua_jax.ops.moves import MOVE_WORDS

BANNED_TOKENS = 16  # token ids a row may forbid (end of sequence and stops before min_tokens)


class VectorLayout:
    """Names and shapes of the int32 fields of one packed vector, in order."""

    def __init__(self, fields: dict[str, tuple[int, ...]]):
        self.slices: dict[str, tuple[slice, tuple[int, ...]]] = {}
        offset = 0
        for name, shape in fields.items():
            size = math.prod(shape)
            self.slices[name] = (slice(offset, offset + size), shape)
            offset += size
        self.size = offset

    def views(self, vector: np.ndarray) -> dict[str, np.ndarray]:
        """Writable views of a host vector, by field name."""
        return {name: self.view(vector, name) for name in self.slices}

    def view(self, vector: np.ndarray, name: str) -> np.ndarray:
        """A writable view of one field of a host vector."""
        place, shape = self.slices[name]
        return vector[place].reshape(shape)

    def fill(self, vector: np.ndarray, *values: list[int]) -> None:
        """Writes the first fields of a host vector, padded with zeros: one conversion in all, and
        not NumPy's, for between two steps its code is out of the caches and takes some 8 us a call.

        Raises:
          ValueError: a list is longer than its field.
        """
        flat: list[int] = []
        for (name, (place, _)), value in zip(self.slices.items(), values, strict=False):
            flat += value
            if len(flat) > place.stop:
                raise ValueError(f"{name}: got {len(value)}; allowed: {place.stop - place.start}")
            flat += [0] * (place.stop - len(flat))
        vector.data[: len(flat)] = array.array("i", flat)

    def put(self, vector: np.ndarray, name: str, packed: bytes) -> None:
        """Writes bytes into a host vector, from a field's beginning on.

        Raises:
          ValueError: there are more than the vector has.
        """
        start = 4 * self.slices[name][0].start
        vector.data.cast("B")[start : start + len(packed)] = packed

    def unpack(self, vector: jax.Array) -> Iterator[tuple[str, jax.Array]]:
        """Fields of a device vector, by name (traced slices)."""
        for name, (s, shape) in self.slices.items():
            yield name, vector[s].reshape(shape)


class MoveVector:
    """Page moves in a packed vector: the tail of a step's, or all there is in one of only moves."""

    @staticmethod
    def fields(max_moves: int) -> dict[str, tuple[int, ...]]:
        """Names and shapes for N `max_moves`."""
        return {"move_head": (3,), "moves": (max_moves, MOVE_WORDS)}

    @staticmethod
    @functools.cache
    def layout(max_moves: int) -> VectorLayout:
        """Layout of a vector of only N `max_moves` moves."""
        return VectorLayout(MoveVector.fields(max_moves))

    @staticmethod
    def write(layout: VectorLayout, vector: np.ndarray, packed: bytes) -> None:
        """Puts moves and their head (`ops.moves.MoveBatch.packed`) into a fresh vector.

        Raises:
          ValueError: there are more moves than N.
        """
        most = layout.slices["moves"][1][0]
        found = (len(packed) - 4 * 3) // (4 * MOVE_WORDS)
        if found > most:
            raise ValueError(f"page moves: got {found}; allowed: at most {most} in one step")
        layout.put(vector, "move_head", packed)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "counts", "tokens", "positions", "prompt_lens", "query_starts", "kv_lens",
        "sample_rows", "page_table", "copy_sources", "copy_targets", "move_head", "moves",
    ],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class ForwardBatch:
    """One ragged batch of prompt chunks and decodes, as the forward program sees it."""

    counts: jax.Array  # i32[3]: valid tokens, valid sequences, page copies
    tokens: jax.Array  # i32[T]: token id, or -1 - slot: the slot's last sampled token
    positions: jax.Array  # i32[T]: index of the token in its sequence
    prompt_lens: jax.Array  # i32[T]: prompt length of the token's sequence
    query_starts: jax.Array  # i32[S+1]: first flat row of each sequence; then the total
    kv_lens: jax.Array  # i32[S]: tokens in the cache after this step
    sample_rows: jax.Array  # i32[S]: flat row of each token to sample; 0 past the valid ones
    page_table: jax.Array  # i32[S, M]: pool pages of each sequence, in order
    copy_sources: jax.Array  # i32[S]: pages to copy before anything else (copy on write)
    copy_targets: jax.Array  # i32[S]
    move_head: jax.Array  # i32[3]: `ops.moves.MoveBatch.head`; all 0: nothing moves
    moves: jax.Array  # i32[N, MOVE_WORDS]: pages to hand to the copy queue, before all else

    @staticmethod
    @functools.cache
    def layout(
        tokens: int, sequences: int, table_width: int, max_moves: int = 0
    ) -> VectorLayout:
        """Layout of the packed vector for T `tokens`, S `sequences`, M `table_width`, N moves."""
        return VectorLayout({
            "counts": (3,), "tokens": (tokens,), "positions": (tokens,),
            "prompt_lens": (tokens,), "query_starts": (sequences + 1,),
            "kv_lens": (sequences,), "sample_rows": (sequences,),
            "page_table": (sequences, table_width),
            "copy_sources": (sequences,), "copy_targets": (sequences,),
            **MoveVector.fields(max_moves),
        })

    @staticmethod
    def unpack(vector: jax.Array, layout: VectorLayout) -> ForwardBatch:
        """Cut the fields out of a packed vector, inside jit."""
        return ForwardBatch(**dict(layout.unpack(vector)))


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "counts", "slots", "temperature", "top_k", "top_p", "min_p", "key_data", "sample_index",
        "token_index", "banned", "presence_penalty", "frequency_penalty",
        "repetition_penalty", "history_lens", "prompt_lens",
    ],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class SampleBatch:
    """Sampling parameters of the rows that want a token."""

    counts: jax.Array  # i32[1]: valid rows
    slots: jax.Array  # i32[R]: where the sampled token goes; S: nowhere
    temperature: jax.Array  # f32[R]: 0 is greedy
    top_k: jax.Array  # i32[R]: 0 is all
    top_p: jax.Array  # f32[R]
    min_p: jax.Array  # f32[R]
    key_data: jax.Array  # u32[R, 2]: the request's key
    sample_index: jax.Array  # i32[R]: which of the request's n samples
    token_index: jax.Array  # i32[R]: how many output tokens came before
    banned: jax.Array  # i32[R, BANNED_TOKENS]: ids that may not be chosen; -1: none
    presence_penalty: jax.Array  # f32[R]
    frequency_penalty: jax.Array  # f32[R]
    repetition_penalty: jax.Array  # f32[R]
    history_lens: jax.Array  # i32[R]: known tokens (prompt and output) before this one
    prompt_lens: jax.Array  # i32[R]

    @staticmethod
    @functools.cache
    def layout(rows: int) -> VectorLayout:
        """Layout of the packed vector for R `rows`, row by row: so the host takes the rows it wants
        from a table by slot at once. Floats travel as their bits."""
        return VectorLayout({"counts": (1,), "rows": (rows, SAMPLE_WORDS)})

    @staticmethod
    def columns(rows: np.ndarray) -> dict[str, np.ndarray]:
        """Writable views of i32[N, SAMPLE_WORDS] by field name, with the fields' own dtypes."""
        views = {name: rows[:, place] for name, place in SAMPLE_COLUMNS.items()}
        for name in _SAMPLE_FLOATS:
            views[name] = views[name].view(np.float32)
        views["key_data"] = views["key_data"].view(np.uint32)
        return views

    @staticmethod
    def unpack(vector: jax.Array, layout: VectorLayout) -> SampleBatch:
        """Cut the fields out of a packed vector, inside jit."""
        packed = dict(layout.unpack(vector))
        rows = packed["rows"]
        fields = {name: rows[:, place] for name, place in SAMPLE_COLUMNS.items()}
        for name in _SAMPLE_FLOATS:
            fields[name] = jax.lax.bitcast_convert_type(fields[name], jnp.float32)
        fields["key_data"] = jax.lax.bitcast_convert_type(fields["key_data"], jnp.uint32)
        return SampleBatch(counts=packed["counts"], **fields)


# Where a row of the packed vector has each field of `SampleBatch`: the word, or several.
SAMPLE_COLUMNS: dict[str, int | slice] = {
    "slots": 0, "temperature": 1, "top_k": 2, "top_p": 3, "min_p": 4, "sample_index": 5,
    "token_index": 6, "presence_penalty": 7, "frequency_penalty": 8, "repetition_penalty": 9,
    "history_lens": 10, "prompt_lens": 11, "key_data": slice(12, 14),
    "banned": slice(14, 14 + BANNED_TOKENS),
}
_SAMPLE_FLOATS = (
    "temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
)
SAMPLE_WORDS = 14 + BANNED_TOKENS
