"""A page's move as copies, one for each device that shares the model.

Each of N devices has its kv heads of every page, a pool of its own for the copy queue, and its own
part of every slot. A slot is N parts, one after the other, or apart, in several lenders' memory
(`memory.split`); however slots come and go, the devices' parts go together. A move is N copies with
a ticket each. It has ended when all of them have, and is done when all are; one device's failure is
the move's.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from aqua_jax.memory.split import SplitStore
from aqua_jax.memory.stores import HostStore, PeerStore
from aqua_jax.ops import moves as copy_queue
from aqua_jax.ops.moves import MoveBatch, MovePool, Part, Segment, Status
from aqua_jax.ops.spaces import Spaces

OwnedStore = HostStore | PeerStore | SplitStore


class SlotMemory:
    """A store's memory as the copy queue knows it, and where in it each device's part of a slot is.

    By address: a view that a segment kept alive would keep lent memory mapped after its store is
    closed. It is retired before that.
    """

    def __init__(self, store: OwnedStore, devices: int) -> None:
        """
        Args:
          store: whose slots are N devices' parts.
          devices: N.
        """
        parts = store.parts if isinstance(store, SplitStore) else (store,)
        homes = (
            store.homes if isinstance(store, SplitStore)
            else tuple((0, device) for device in range(devices))
        )
        self._segments = [
            Segment((ctypes.c_uint8 * (part.capacity * part.slot_bytes)).from_address(part.base))
            for part in parts
        ]
        self._slot_bytes, each = store.slot_bytes, store.slot_bytes // devices
        # For each device: its segment, bytes from one slot to the next there, and from a slot's
        # first byte there to the device's.
        self._layout = [
            (self._segments[home], parts[home].slot_bytes, place * each) for home, place in homes
        ]
        _, stride, place = self._layout[0]
        self._alone = devices == 1 and (stride, place) == (self._slot_bytes, 0)

    @property
    def live(self) -> bool:
        """Whether it has not been retired."""
        return self._segments[0].live

    def check(self) -> None:
        """Raises StaleHandleError if it has been retired."""
        self._segments[0].check()

    def retire(self, *, abandon: bool = False) -> None:
        """As `ops.moves.Segment.retire`, of all of it."""
        for segment in self._segments:
            segment.retire(abandon=abandon)

    def places(self, offsets: Sequence[int]) -> Iterator[tuple[Segment, list[int]]]:
        """For each device: its segment, and where in it are its parts of the slots that start at
        `offsets` of the store."""
        if self._alone:
            yield self._segments[0], list(offsets)
            return
        slots = [offset // self._slot_bytes for offset in offsets]
        for segment, stride, place in self._layout:
            yield segment, [slot * stride + place for slot in slots]


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
          spaces: memory of ours that holds pages behind the pool's.
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
        return Batch([MoveBatch(capacity, pool) for pool in self._pools])

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
        sums = sums.reshape(tickets.shape)
        if tickets.shape[1] == 1:
            return each, sums
        statuses, *others = each.reshape(tickets.shape).T
        for later in others:
            pending = (statuses == Status.PENDING) | (later == Status.PENDING)
            worse = np.where(statuses == Status.DONE, later, statuses)
            statuses = np.where(pending, Status.PENDING, worse)
        return statuses, sums


class Batch:
    """The moves of one step on every device."""

    def __init__(self, batches: list[MoveBatch]) -> None:
        """`batches`: an empty one for each device."""
        self._batches = batches

    def copy_out(
        self, pages: Sequence[int], memory: SlotMemory, offsets: Sequence[int], part: Part,
        *, checksum: bool,
    ) -> np.ndarray:
        """Copies pages to slots at `offsets` of the store: u64[n, N] tickets.

        Otherwise as `ops.moves.MoveBatch.copy_out`; `part` is of one device's page.
        """
        return _side_by_side([
            batch.copy_out(pages, segment, places, part=part, checksum=checksum)
            for batch, (segment, places) in zip(
                self._batches, memory.places(offsets), strict=True
            )
        ])

    def copy_in(
        self, pages: Sequence[int], memory: SlotMemory, offsets: Sequence[int], part: Part,
        *, checksums: Sequence[int] | None,
    ) -> np.ndarray:
        """The way back, compared with `numbers` of the checksums of the way out, if given."""
        return _side_by_side([
            batch.copy_in(
                pages, segment, places, part=part,
                checksums=None if checksums is None else _digits(checksums, device),
            )
            for device, (batch, (segment, places)) in enumerate(
                zip(self._batches, memory.places(offsets), strict=True)
            )
        ])

    def packed(self) -> tuple[np.ndarray, np.ndarray]:
        """i32[n, MOVE_WORDS] and a head i32[3]; for N > 1 devices [N, n, MOVE_WORDS] and [N, 3]."""
        moves = [batch.moves()[: batch.count] for batch in self._batches]
        heads = [batch.head() for batch in self._batches]
        return (moves[0], heads[0]) if len(moves) == 1 else (np.stack(moves), np.stack(heads))


def _side_by_side(tickets: list[np.ndarray]) -> np.ndarray:
    """u64[n, N] of N times u64[n]."""
    return tickets[0][:, None] if len(tickets) == 1 else np.stack(tickets, axis=1)


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
