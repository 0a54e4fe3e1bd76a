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

from aqua_jax.memory.split import SplitStore
from aqua_jax.memory.stores import HostStore, PeerStore
from aqua_jax.ops import moves as copy_queue
from aqua_jax.ops.moves import Copy, MoveBatch, MovePool, Segment, Status
from aqua_jax.ops.spaces import Spaces

OwnedStore = HostStore | PeerStore | SplitStore

_PENDING, _DONE = int(Status.PENDING), int(Status.DONE)
_DIGIT = 2**64 - 1


class SlotMemory:
    """A store's memory as the copy queue knows it, and where in it each device's part of a slot is.

    By address: a view that a segment kept alive would keep lent memory mapped after its store is
    closed. It is retired before that.

    Attributes:
      alone: the segment that all of it is, if each slot is one device's; None: it isn't so.
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
        segment, stride, place = self._layout[0]
        alone = devices == 1 and (stride, place) == (self._slot_bytes, 0)
        self.alone = segment if alone else None

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


class Tickets:
    """Of moves under way, N each, in the order in which the moves were added."""

    def __init__(self, devices: int) -> None:
        """`devices`: N."""
        self._each = [copy_queue.Tickets() for _ in range(devices)]

    def __len__(self) -> int:
        return len(self._each[0])

    def add(self, tickets: Sequence[range]) -> None:
        """More of them, as `Batch.add` gave them."""
        for own, more in zip(self._each, tickets, strict=True):
            own.add(more)

    def keep(self, indices: Sequence[int]) -> None:
        """Forgets all but the moves at these places."""
        self._each = [own.chosen(indices) for own in self._each]

    def wait(self, indices: Sequence[int], timeout: float) -> bool:
        """Waits until none of these moves is PENDING; False after `timeout` seconds."""
        asked = copy_queue.Tickets()
        for own in self._each:
            asked.add(own.chosen(indices))
        return asked.wait(timeout)

    def poll(self) -> list[int]:
        """`Status` of each move: PENDING as long as one of its copies is, then the first one's that
        isn't DONE. Never waits."""
        return _worst([own.poll() for own in self._each])

    def poll_sums(self) -> tuple[list[int], list[int]]:
        """As `poll`, and the checksums, 0 where none was computed: those of N copies as one number
        with N digits of 64 bits."""
        found = [own.poll_sums() for own in self._each]
        sums = found[0][1]
        for device, (_, more) in enumerate(found[1:], 1):
            sums = [low | high << 64 * device for low, high in zip(sums, more, strict=True)]
        return _worst([statuses for statuses, _ in found]), sums


def _worst(each: list[list[int]]) -> list[int]:
    """What becomes of moves whose copies have become that."""
    worst = each[0]
    for later in each[1:]:
        worst = [
            _PENDING if _PENDING in (one, other) else other if one == _DONE else one
            for one, other in zip(worst, later, strict=True)
        ]
    return worst


class Batch:
    """The moves of one step on every device."""

    def __init__(self, batches: list[MoveBatch]) -> None:
        """`batches`: an empty one for each device."""
        self._batches = batches

    def add(self, copies: Sequence[Copy], memory: SlotMemory, *, inward: bool) -> list[range]:
        """Copies pages to slots of a store, or back: tickets for each device.

        Otherwise as `ops.moves.MoveBatch.add`. `offset` of a copy is that of the slot in the store,
        `part` is of one device's page, `checksum` as `Tickets.poll_sums` has it.
        """
        if memory.alone is not None:
            return [self._batches[0].add(copies, memory.alone, inward=inward)]
        places = memory.places([copy.offset for copy in copies])
        return [
            batch.add(
                [
                    Copy(page, place, part, None if sums is None else sums >> 64 * device & _DIGIT)
                    for (page, _, part, sums), place in zip(copies, here, strict=True)
                ],
                segment, inward=inward,
            )
            for device, (batch, (segment, here)) in enumerate(
                zip(self._batches, places, strict=True)
            )
        ]

    def packed(self) -> list[bytes]:
        """For each device what `engine.batch.MoveVector` writes; nothing if nothing moves."""
        return [batch.packed() for batch in self._batches if batch.count]
