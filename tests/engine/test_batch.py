"""Packed vectors: what the host writes is what a program reads."""

from __future__ import annotations

import numpy as np
import pytest

from aqua_jax.engine.batch import (
    BANNED_TOKENS,
    SAMPLE_COLUMNS,
    SAMPLE_WORDS,
    ForwardBatch,
    MoveVector,
    SampleBatch,
    VectorLayout,
)
from aqua_jax.ops.moves import MOVE_WORDS


def test_lists_fill_the_first_fields_and_zeros_the_rest():
    layout = VectorLayout({"a": (2,), "b": (3,), "c": (2, 2), "d": (1,)})
    vector = np.full(layout.size, 9, np.int32)
    layout.fill(vector, [1], [2, 3, 4], [])
    assert vector.tolist() == [1, 0, 2, 3, 4, 0, 0, 0, 0, 9]
    with pytest.raises(ValueError, match="b: got 4; allowed: 3"):
        layout.fill(vector, [1, 2], [3, 4, 5, 6])


def test_a_programs_fields_are_the_hosts():
    layout = ForwardBatch.layout(4, 3, 5, 2)
    vector = np.zeros(layout.size, np.int32)
    names = list(layout.slices)
    layout.fill(vector, *([place] for place in range(1, 8)))
    layout.view(vector, "page_table")[2] = range(5)
    moves = np.arange(MOVE_WORDS, dtype=np.int32)[None]
    head = np.array([1, 2, 3], np.int32).tobytes()
    MoveVector.write(layout, vector, head + moves.tobytes())
    batch = ForwardBatch.unpack(vector, layout)  # type: ignore[arg-type]
    for place, name in enumerate(names[:7], 1):
        assert getattr(batch, name)[0] == place
    assert batch.page_table.shape == (3, 5) and batch.page_table[2].tolist() == [0, 1, 2, 3, 4]
    assert batch.move_head.tolist() == [1, 2, 3]
    np.testing.assert_array_equal(batch.moves, np.concatenate([moves, 0 * moves]))
    with pytest.raises(ValueError, match="page moves: got 3"):
        MoveVector.write(layout, vector, head + 3 * moves.tobytes())


def test_rows_of_sampling_go_as_they_are_by_slot():
    layout = SampleBatch.layout(3)
    vector = np.zeros(layout.size, np.int32)
    rows = layout.view(vector, "rows")
    columns = SampleBatch.columns(rows)
    rng = np.random.default_rng(0)
    wanted = {}
    for name, view in columns.items():
        wanted[name] = rng.uniform(1, 100, view.shape).astype(view.dtype)
        view[:] = wanted[name]
    vector[0] = 2
    batch = SampleBatch.unpack(vector, layout)  # type: ignore[arg-type]
    assert batch.counts.tolist() == [2]
    for name, values in wanted.items():
        np.testing.assert_array_equal(getattr(batch, name), values)
    used = [
        word for place in SAMPLE_COLUMNS.values()
        for word in np.atleast_1d(np.arange(SAMPLE_WORDS)[place]).tolist()
    ]
    assert sorted(used) == list(range(SAMPLE_WORDS)) and batch.banned.shape == (3, BANNED_TOKENS)
