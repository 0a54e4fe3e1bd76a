"""A move of several devices ends with the last of its copies and is as good as the worst."""

from __future__ import annotations

import numpy as np

from aqua_jax.engine.copies import Tickets
from aqua_jax.ops import moves
from aqua_jax.ops.moves import Copy, MoveBatch, MovePool, Part, Segment, Status
from tests.ops.test_moves import PAGE, full_pool, only_moves


def test_a_move_is_what_its_copies_are():
    kv = full_pool()
    good = np.zeros(2 * PAGE, np.uint8)
    with MovePool.of(kv) as pool, Segment(good) as segment:
        gone = Segment(np.zeros(PAGE, np.uint8))
        batch, late = MoveBatch(3, pool), MoveBatch(1, pool)
        whole = Part(0, PAGE)
        done = batch.add([Copy(1, 0, whole, 0), Copy(2, PAGE, whole, 0)], segment, inward=False)
        stale = batch.add([Copy(3, 0, whole, 0)], gone, inward=False)
        pending = late.add([Copy(4, 0, whole, 0)], segment, inward=False)
        gone.retire()
        only_moves(kv, batch)
        assert moves.drain(30)
        kinds = {Status.DONE: done[:1], Status.SEGMENT_STALE: stale, Status.PENDING: pending}
        tickets, wanted = Tickets(2), []
        for first in kinds:
            for second in kinds:
                tickets.add([kinds[first], kinds[second]])
                among = {first, second}
                wanted.append(next(kind for kind in reversed(kinds) if kind in among))
        assert tickets.poll() == wanted and len(tickets) == 9
        assert not tickets.wait([2], 0.001) and tickets.wait([0, 1, 3, 4], 30)
        tickets.keep([8, 1])
        assert tickets.poll() == [Status.PENDING, Status.SEGMENT_STALE]

        pair = Tickets(2)
        pair.add([done[:1], done[1:]])
        sums = moves.poll(np.arange(done.start, done.stop, dtype=np.uint64))[1].tolist()
        assert pair.poll_sums() == ([Status.DONE], [sums[0] | sums[1] << 64])
