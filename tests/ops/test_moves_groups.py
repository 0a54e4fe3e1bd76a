"""Which moves are copied as one."""

from __future__ import annotations

import numpy as np
import pytest

from aqua_jax.ops import moves
from aqua_jax.ops.moves import MoveBatch, MovePool, Segment
from tests.ops.test_moves import PAGE, as_bytes, full_pool, only_moves


@pytest.mark.parametrize(("pages", "places"), [
    ([4, 5, 6, 7, 8], [6, 1, 2, 0, 4]), ([9, 2, 3, 0, 7], [3, 4, 5, 6, 7]),
    ([4, 5, 6, 8, 9], [0, 1, 2, 3, 4]), ([7, 6, 5, 4, 3], [4, 3, 2, 1, 0]),
], ids=["pages", "places", "both", "backwards"])
def test_neighbours_at_one_end_only_are_no_neighbours(pages, places):
    """What is copied as one has to follow at both ends."""
    kv = full_pool(14)
    before = as_bytes(kv)
    memory = np.zeros(8 * PAGE, np.uint8)
    with Segment(memory) as segment, MovePool.of(kv) as pool:
        out = MoveBatch(5, pool)
        out.copy_out(pages, segment, np.multiply(places, PAGE))
        kv = only_moves(kv, out)
        assert moves.drain(30)
        wanted = np.zeros_like(memory).reshape(8, PAGE)
        wanted[places] = before[pages]
        np.testing.assert_array_equal(memory.reshape(8, PAGE), wanted)
        back, targets = MoveBatch(5, pool), [page + 10 for page in pages]
        back.copy_in(targets, segment, np.multiply(places, PAGE))
        kv = only_moves(kv, back)
        assert moves.drain(30)
    before[targets] = before[pages]
    np.testing.assert_array_equal(as_bytes(kv), before)
