"""A page's move as copies, one for each device that shares the model.

Each of N devices has its kv heads of every page, a pool of its own for the copy queue, and its own
part of every slot: a slot is N parts, one after the other, so that however slots come and go the
devices' parts go together. A move is N copies with a ticket each. It has ended when all of them
have, and is done when all are; one device's failure is the move's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import jax
import numpy as np

from aqua_jax.ops import moves as copy_queue
from aqua_jax.ops.moves import MoveBatch, MovePool, Part, Segment, Status
from aqua_jax.ops.spaces import Spaces


class PoolCopies:
    """The pool of N devices as the copy queue knows it. Belongs to the engine's thread.

    Attributes:
      kv: shape of one device's part of the pool, [P, L, 2, page_tokens, K / N, D].
      devices: N.
      page_bytes: of a page, on all devices together.
    """

    def __init__(
        self, kv: jax.Array | jax.ShapeDtypeStruct, devices: int = 1, spaces: Spaces | None = None
    ) -> None:
        """
        Args:
          kv: the whole pool, [P, L, 2, page_tokens, K, D], or its shape.
          devices: N.
          spaces: memory of ours that holds pages behind the pool's; for one device.
        """
        *pages, heads, dim = kv.shape
        self.kv = jax.ShapeDtypeStruct((*pages, heads // devices, dim), kv.dtype)
        self.devices, self._spaces = devices, spaces
        self._pools: list[MovePool] = []
        self.open()
        self.page_bytes = devices * self._pools[0].page_bytes

    def open(self) -> None:
        """Ready for a new pool after `close`."""
        self._pools = [MovePool.of(self.kv, self._spaces) for _ in range(self.devices)]

    def close(self) -> None:
        """Waits until copies that were handed over have ended; later ones fail. Repeatable."""
        for pool in self._pools:
            if pool.live:
                pool.close()

    def batch(self, capacity: int) -> Batch:
        """An empty batch for at most so many moves."""
        batches = [MoveBatch(capacity, pool) for pool in self._pools]
        return Batch(batches, self._pools[0].page_bytes)

    @staticmethod
    def poll(tickets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What has become of moves; never waits.

        Args:
          tickets: u64[n, N], as `Batch` gave them.

        Returns:
          i32[n] `Status` of each move: PENDING as long as one of its copies is, then the first
          one's that isn't DONE; and u64[n, N] checksums (0 where none was computed).
        """
        each, sums = copy_queue.poll(tickets.reshape(-1))
        each, sums = each.reshape(tickets.shape), sums.reshape(tickets.shape)
        statuses, *others = each.T
        for later in others:
            pending = (statuses == Status.PENDING) | (later == Status.PENDING)
            worse = np.where(statuses == Status.DONE, later, statuses)
            statuses = np.where(pending, Status.PENDING, worse)
        return statuses, sums


class Batch:
    """The moves of one step on every device."""

    def __init__(self, batches: list[MoveBatch], part_bytes: int) -> None:
        """`batches`: an empty one for each device; `part_bytes`: of its part of a slot."""
        self._batches, self._part_bytes = batches, part_bytes

    def copy_out(
        self, pages: Sequence[int], segment: Segment, offsets: Sequence[int], part: Part,
        *, checksum: bool,
    ) -> np.ndarray:
        """Copies pages to slots at `offsets` of the segment: u64[n, N] tickets.

        Otherwise as `ops.moves.MoveBatch.copy_out`; `part` is of one device's page.
        """
        return np.stack([
            batch.copy_out(pages, segment, places, part=part, checksum=checksum)
            for batch, places in self._places(offsets)
        ], axis=1)

    def copy_in(
        self, pages: Sequence[int], segment: Segment, offsets: Sequence[int], part: Part,
        *, checksums: Sequence[int] | None,
    ) -> np.ndarray:
        """The way back, compared with `numbers` of the checksums of the way out, if given."""
        return np.stack([
            batch.copy_in(
                pages, segment, places, part=part,
                checksums=None if checksums is None else _digits(checksums, device),
            )
            for device, (batch, places) in enumerate(self._places(offsets))
        ], axis=1)

    def _places(self, offsets: Sequence[int]) -> Iterator[tuple[MoveBatch, np.ndarray]]:
        places = np.asarray(offsets, np.int64)
        for batch in self._batches:
            yield batch, places
            places = places + self._part_bytes

    def packed(self) -> tuple[np.ndarray, np.ndarray]:
        """i32[n, MOVE_WORDS] and a head i32[3]; for N > 1 devices [N, n, MOVE_WORDS] and [N, 3]."""
        moves = [batch.moves()[: batch.count] for batch in self._batches]
        heads = [batch.head() for batch in self._batches]
        return (moves[0], heads[0]) if len(moves) == 1 else (np.stack(moves), np.stack(heads))


def numbers(checksums: np.ndarray) -> list[int]:
    """Checksums u64[n, N] as one number a move, with N digits of 64 bits."""
    found = checksums[:, 0].tolist()
    for device in range(1, checksums.shape[1]):
        more = checksums[:, device].tolist()
        found = [low | high << 64 * device for low, high in zip(found, more, strict=True)]
    return found


def _digits(numbers: Sequence[int], device: int) -> np.ndarray:
    """A device's checksums, u64[n]: the inverse of `numbers`."""
    return np.array([number >> 64 * device & 2**64 - 1 for number in numbers], np.uint64)
