"""Moves that are handed over together, and which of them are copied as one."""

from __future__ import annotations

import numpy as np
import pytest

from aqua_jax.ops import moves
from aqua_jax.ops.moves import Copy, MoveBatch, MovePool, Part, Segment, Status, Tickets
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


def test_parts_of_all_kinds_in_one_call():
    """Whole pages, among them neighbours, and parts with and without checksums."""
    kv = full_pool(15)
    before = as_bytes(kv)
    memory = np.zeros(6 * PAGE, np.uint8)
    whole, some = Part(0, PAGE), Part.of_tokens(kv, 1, 2)
    copies = [
        Copy(4, 0, whole, None), Copy(5, PAGE, whole, None), Copy(6, 2 * PAGE, some, 0),
        Copy(7, 3 * PAGE, whole, 0), Copy(8, 4 * PAGE, whole, None), Copy(9, 5 * PAGE, some, None),
    ]
    with Segment(memory) as segment, MovePool.of(kv) as pool:
        out, back = MoveBatch(6, pool), MoveBatch(9, pool)
        tickets = Tickets(out.add(copies, segment, inward=False))
        assert out.packed() == out.head().tobytes() + out.moves().tobytes()
        assert tickets.poll() == [Status.PENDING] * 6 and not tickets.wait(0.001)
        kv = only_moves(kv, out)
        assert tickets.wait(30)
        statuses, sums = tickets.poll_sums()
        assert statuses == tickets.poll() == [Status.DONE] * 6
        assert [number for number, total in enumerate(sums) if total] == [2, 3]
        wrong = [copy._replace(page=copy.page + 10) for copy in copies]
        wrong[2] = wrong[2]._replace(checksum=sums[2])
        wrong[3] = wrong[3]._replace(checksum=sums[3] ^ 1)
        tickets.add(back.add(wrong, segment, inward=True))
        for spoilt in (
            Copy(24, 0, whole, None), Copy(0, 5 * PAGE + 1, whole, None),
            Copy(0, 0, Part(1, PAGE), None), Copy(0, -1, some, None),
        ):
            with pytest.raises(ValueError, match="allowed"):
                back.add([copies[0], spoilt], segment, inward=True)
        assert back.count == 6  # nothing of a call that was refused
        kv = only_moves(kv, back)
        assert tickets.wait(30)
        statuses = tickets.poll()
        assert statuses[6:] == [Status.DONE] * 3 + [Status.MISMATCH] + [Status.DONE] * 2
        assert tickets.chosen([9, 0]).poll() == [Status.MISMATCH, Status.DONE]
    after, pages = as_bytes(kv), before.reshape(24, 2, 2, 4, -1)
    np.testing.assert_array_equal(after[[14, 15, 17, 18]], before[[4, 5, 7, 8]])
    parts = after.reshape(24, 2, 2, 4, -1)
    np.testing.assert_array_equal(parts[[16, 19], :, :, 1:3], pages[[6, 9], :, :, 1:3])
    np.testing.assert_array_equal(parts[[16, 19], :, :, [0, 3]], pages[[16, 19], :, :, [0, 3]])
