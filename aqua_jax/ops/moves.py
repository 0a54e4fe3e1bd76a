"""Moves of KV pages between the pool and other memory, carried out beside the running step.

`enqueue_moves` stands at the head of a step's program. It hands a list of page copies to a native
worker and returns at once; the step runs on while they are copied, and the host asks by ticket what
has become of each copy. On CPUs the worker copies (AQUA_COPY_THREADS of them, default 1, at the
process's niceness plus AQUA_COPY_NICE, default 5). With CUDA it puts copies onto streams of its
own: copy engines from AQUA_COPY_ENGINE_BYTES on (default: 256 KiB to the host, 2 MiB to another
GPU), kernels below that and within a GPU. A separate program for copies would not do: a pending
read of the pool holds back the next step that donates it, and a program of only an FFI call runs
inline in the thread that calls it.

The worker and the step share the pool without a lock. Who makes plans keeps these rules; nothing
here can check them (`set_delay` makes tests that notice, tests/faults/test_ordering_rules.py):

1. A page that is copied out was written by the step before or earlier, and is *pinned*: not
   written, nor given to anybody else, until its ticket has ended.
2. A page that is copied into stands in no page table of a dispatched step until its ticket is done.
3. A page or segment range freed by a plan isn't used again while a dispatched step, or a move that
   has not ended, still names it.
4. No order holds among moves, not even within a batch: what depends on a move waits for its ticket.
5. Before a pool is dropped or replaced: `MovePool.close`. Before segment memory is unmapped or is
   somebody else's: `Segment.retire`. If pages of steps lie in it (`ops.spaces`), wait for the steps
   first.

Both wait for the moves that were handed over, and neither for a head that has yet to run. That one
finds another *generation*, and its moves are POOL_STALE or SEGMENT_STALE: it is this check that
keeps late heads off memory with a new owner, not the order of things, and nobody needs to wait for
steps on their account. Nor would tickets tell: before its step has run its head a batch is PENDING,
one whose step was never dispatched for ever, and `drain` knows nothing of either. (With CUDA a
step's moves are taken up a moment after its head has run; `drain`, `retire` and `close` see to that
first.)

What goes wrong at run time (a segment retired meanwhile, a range out of bounds, a checksum that
differs) is a status of that one page, never an error of the step: an error would cost the donated
pool and every sequence in it. A page that didn't arrive is recomputed.

`aqua_jax.ops.moves_reference` is the same in NumPy, for tests.
"""

from __future__ import annotations

import array
import ctypes
import dataclasses
import enum
import struct
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from aqua_jax.errors import StaleHandleError
from aqua_jax.ops.segments import Segment, handle, native
from aqua_jax.ops.spaces import Spaces

# One move; ffi/common/moves.h says what the fields mean.
MOVE = np.dtype([
    ("flags", "<i4"), ("page", "<i4"), ("segment", "<i4"), ("generation", "<u4"),
    ("offset", "<u8"), ("begin", "<i4"), ("bytes", "<i4"), ("runs", "<i4"), ("stride", "<i4"),
    ("ticket", "<u8"), ("checksum", "<u8"),
])
# The same, written one by one: few moves are there sooner so than by column.
_MOVE = struct.Struct("<iiiIQiiiiQQ")
_HEAD = struct.Struct("<III")
MOVE_WORDS = MOVE.itemsize // 4  # K of moves i32[N, K]
FLAG_IN, FLAG_CHECKSUM = 1, 2
# How many of the newest tickets keep their result.
RESULTS = 1 << 16


class Status(enum.IntEnum):
    """What has become of a move."""

    PENDING = 0  # not handed over yet, waiting, or being copied
    DONE = 1
    SEGMENT_STALE = 2  # the segment, or the space that the page is in, was retired
    OUT_OF_BOUNDS = 3  # pool page, range in the page, or range in the segment
    MISMATCH = 4  # copied in, but the checksum is not the expected one
    POOL_STALE = 5  # the pool was closed, or has another address than before
    CANCELLED = 6  # the process is ending, or has forked
    FORGOTTEN = 7  # RESULTS newer tickets have been handed over since


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a page: `runs` pieces of `bytes` bytes, `stride` apart, the first at `begin`."""

    begin: int
    bytes: int
    runs: int = 1
    stride: int = 0

    @classmethod
    def of_tokens(cls, kv: jax.Array | jax.ShapeDtypeStruct, start: int, count: int) -> Part:
        """Tokens start to start + count of a page, in all layers.

        Args:
          kv: the pool, [P, L, 2, page_tokens, K, D], or its shape.
          start: first token in the page.
          count: how many, >= 1.
        """
        _, layers, two, page_tokens, heads, dim = kv.shape
        if not (0 <= start < start + count <= page_tokens):
            raise ValueError(f"tokens of a page: got {start} to {start + count}; "
                             f"allowed: within 0 to {page_tokens}, at least one")
        token = heads * dim * np.dtype(kv.dtype).itemsize
        if count == page_tokens:
            return cls(0, token * page_tokens * layers * two)
        return cls(start * token, count * token, layers * two, page_tokens * token)

    @property
    def end(self) -> int:
        """Where in the page it ends, in bytes."""
        return self.begin + (self.runs - 1) * self.stride + self.bytes

    def check(self, page_bytes: int) -> None:
        """Raises ValueError unless a page of so many bytes has it."""
        overlap = self.runs > 1 and self.stride < self.bytes
        if min(self.begin, self.bytes - 1, self.runs - 1) < 0 or overlap or self.end > page_bytes:
            raise ValueError(f"part: got {self}; allowed: runs apart, of at least a byte, within "
                             f"{page_bytes} bytes")


class Copy(NamedTuple):
    """A copy of a page's part, in one direction or the other."""

    page: int
    offset: int  # in the segment, of the page's first byte, in bytes
    part: Part
    checksum: int | None  # computed; inward it must be that of the way out. None: it isn't


class MoveCounters(NamedTuple):
    """Sums over the life of the process."""

    handed_over: int  # moves
    finished: int
    failed: int  # finished with another status than DONE
    bytes_out: int
    bytes_in: int
    busy_ns: int  # time in copies, preemption and injected delays included
    cpu_ns: int  # CPU time of the workers


class MovePool:
    """One KV pool as the native queue knows it: moves of a pool that has moved are refused.

    Its address becomes known with its first move, and must stay the same until `close`.
    """

    def __init__(self, pages: int, page_bytes: int):
        """A pool of `pages` pages of `page_bytes` bytes each, pages in spaces included."""
        self.pages, self.page_bytes = pages, page_bytes
        self.id, self.generation = handle(native().aqua_pool_register(), "pools")
        self._closed = False

    @classmethod
    def of(
        cls, kv: jax.Array | jax.ShapeDtypeStruct, spaces: Spaces | None = None
    ) -> MovePool:
        """The pool kv [P, ...], with the pages of `spaces` behind it."""
        page = int(np.prod(kv.shape[1:], dtype=np.int64)) * np.dtype(kv.dtype).itemsize
        return cls(kv.shape[0] if spaces is None else spaces.end, page)

    @property
    def live(self) -> bool:
        """Whether it has not been closed."""
        return not self._closed

    def check(self) -> None:
        """Raises StaleHandleError if it has been closed."""
        if self._closed:
            raise StaleHandleError(f"pool {self.id} of generation {self.generation} was closed")

    def close(self) -> None:
        """Waits until its moves that were handed over have ended; later ones are POOL_STALE.

        Raises:
          StaleHandleError: it was closed before.
        """
        self.check()
        self._closed = True
        native().aqua_pool_close(self.id, self.generation)

    def __enter__(self) -> MovePool:
        return self

    def __exit__(self, *error: object) -> None:
        if self.live:
            self.close()


_next_ticket = 1
_tickets_lock = threading.Lock()


def _new_tickets(count: int) -> range:
    global _next_ticket
    with _tickets_lock:
        first = _next_ticket
        _next_ticket += count
    return range(first, first + count)


def new_tickets(count: int) -> np.ndarray:
    """u64[count] tickets that nobody had before, consecutive."""
    tickets = _new_tickets(count)
    return np.arange(tickets.start, tickets.stop, dtype=np.uint64)


class Tickets:
    """Tickets in the order in which they were added, asked for all at once. Arrays of the standard
    library: between two steps NumPy's code and its way to an address are out of the caches."""

    def __init__(self, tickets: Iterable[int] = ()) -> None:
        self._tickets = array.array("Q", tickets)

    def __len__(self) -> int:
        return len(self._tickets)

    def __iter__(self) -> Iterator[int]:
        return iter(self._tickets)

    def add(self, tickets: Iterable[int]) -> None:
        """More of them."""
        self._tickets.extend(tickets)

    def chosen(self, indices: Iterable[int]) -> Tickets:
        """Those at these places."""
        tickets = self._tickets
        return Tickets([tickets[index] for index in indices])

    def poll(self) -> list[int]:
        """`Status` of each; never waits. A move's copies are visible to whoever has seen it."""
        address, count = self._tickets.buffer_info()
        statuses = array.array("i", bytes(4 * count))
        native().aqua_moves_poll(address, count, statuses.buffer_info()[0], None)
        return statuses.tolist()

    def poll_sums(self) -> tuple[list[int], list[int]]:
        """As `poll`, and the checksums: 0 where none was computed."""
        address, count = self._tickets.buffer_info()
        statuses, sums = array.array("i", bytes(4 * count)), array.array("Q", bytes(8 * count))
        native().aqua_moves_poll(
            address, count, statuses.buffer_info()[0], sums.buffer_info()[0]
        )
        return statuses.tolist(), sums.tolist()

    def wait(self, timeout: float) -> bool:
        """Waits until none of them is PENDING; False after `timeout` seconds."""
        return bool(native().aqua_moves_wait(*self._tickets.buffer_info(), int(timeout * 1e6)))


class MoveBatch:
    """The moves of one step, in the layout that crosses jit. Filled once, for one dispatch.

    Attributes:
      count: moves in it.
    """

    def __init__(self, capacity: int, pool: MovePool):
        """An empty batch for at most `capacity` (N) moves of `pool`."""
        self._records = bytearray(capacity * _MOVE.size)
        self._capacity, self.count = capacity, 0
        self._pool = pool

    @property
    def room(self) -> int:
        """How many more moves fit."""
        return self._capacity - self.count

    def add(self, copies: Sequence[Copy], segment: Segment, *, inward: bool) -> range:
        """Copies pages to a segment, or from it to the pool.

        Args:
          copies: of pages of the pool or of a space.
          segment: where to, or from.
          inward: from the segment to the pool.

        Returns:
          Their tickets.

        Raises:
          StaleHandleError: segment or pool is gone.
          ValueError: no room, or a page or range that doesn't exist. Nothing is added then.
        """
        segment.check()
        self._pool.check()
        if len(copies) > self.room:
            raise ValueError(f"moves: got {len(copies)} pages; allowed: at most {self.room}")
        tickets = _new_tickets(len(copies))
        pages, identity, generation = self._pool.pages, segment.id, segment.generation
        records, pack, size = self._records, _MOVE.pack_into, _MOVE.size
        at = self.count * size
        plain, summed = FLAG_IN * inward, FLAG_IN * inward | FLAG_CHECKSUM
        known: Part | None = None
        for ticket, (page, offset, part, checksum) in zip(tickets, copies, strict=True):
            if part is not known:  # as for most
                part.check(self._pool.page_bytes)
                known, last = part, segment.nbytes - part.end
                begin, length, runs, stride = part.begin, part.bytes, part.runs, part.stride
            if not 0 <= page < pages:
                raise ValueError(f"page: got {page}; allowed: 0 to {pages - 1}")
            if not 0 <= offset <= last:
                raise ValueError(f"offset: got {offset}; allowed: 0 to {last}")
            flags, total = (plain, 0) if checksum is None else (summed, checksum)
            pack(records, at, flags, page, identity, generation, offset, begin, length, runs,
                 stride, ticket, total)
            at += size
        self.count += len(copies)
        return tickets

    def copy_out(
        self, pages: Sequence[int] | np.ndarray, segment: Segment,
        offsets: Sequence[int] | np.ndarray, *, part: Part | None = None, checksum: bool = False,
    ) -> np.ndarray:
        """Copies pool pages to a segment, all alike.

        Args:
          pages: [n] pages of the pool or of a space.
          segment: where to.
          offsets: [n] byte offsets in the segment, of the page's first byte (also with `part`).
          part: what of each page; None: all.
          checksum: compute one, for `poll` to return.

        Returns:
          u64[n] tickets.

        Raises:
          StaleHandleError, ValueError: as `add`; or there isn't one offset for each page.
        """
        sums = [0 if checksum else None] * len(pages)
        return self._add_all(pages, segment, offsets, part, sums, inward=False)

    def copy_in(
        self, pages: Sequence[int] | np.ndarray, segment: Segment,
        offsets: Sequence[int] | np.ndarray, *, part: Part | None = None,
        checksums: np.ndarray | None = None,
    ) -> np.ndarray:
        """Copies from a segment to pool pages, all alike.

        Args:
          pages: [n] pages of the pool or of a space.
          segment: where from.
          offsets: [n] byte offsets in the segment, of the page's first byte (also with `part`).
          part: what of each page; None: all.
          checksums: u64[n], what `poll` returned for the same parts; a page that differs is
            MISMATCH. None: not compared.

        Returns:
          u64[n] tickets.

        Raises:
          StaleHandleError, ValueError: as `add`; or there isn't one offset for each page.
        """
        sums = [None] * len(pages) if checksums is None else checksums.tolist()
        return self._add_all(pages, segment, offsets, part, sums, inward=True)

    def _add_all(
        self, pages: Sequence[int] | np.ndarray, segment: Segment,
        offsets: Sequence[int] | np.ndarray, part: Part | None, sums: Sequence[int | None],
        *, inward: bool,
    ) -> np.ndarray:
        at, ids = _numbers(offsets), _numbers(pages)
        if len(at) != len(ids):
            raise ValueError(f"moves: got {len(ids)} pages at {len(at)} offsets; "
                             "allowed: one offset each")
        part = part or Part(0, self._pool.page_bytes)
        copies = [
            Copy(page, offset, part, checksum)
            for page, offset, checksum in zip(ids, at, sums, strict=True)
        ]
        tickets = self.add(copies, segment, inward=inward)
        return np.arange(tickets.start, tickets.stop, dtype=np.uint64)

    def moves(self) -> np.ndarray:
        """i32[N, MOVE_WORDS], a copy (jax keeps what it is given)."""
        return np.frombuffer(bytes(self._records), np.int32).reshape(-1, MOVE_WORDS)

    def packed(self) -> bytes:
        """`head`, and those of `moves` that there are, as bytes."""
        pool = self._pool
        head = _HEAD.pack(self.count, pool.id, pool.generation)
        return head + self._records[: self.count * _MOVE.size]

    def head(self) -> np.ndarray:
        """i32[3]: count, and the pool's id and generation."""
        pool = self._pool
        return np.array([self.count, pool.id, pool.generation], np.uint32).view(np.int32)


def _numbers(values: Sequence[int] | np.ndarray) -> list[int]:
    return values if isinstance(values, list) else np.asarray(values).tolist()


def enqueue_moves(
    kv: jax.Array, moves: jax.Array, head: jax.Array, *, spaces: Spaces | None = None
) -> jax.Array:
    """Hands moves to the native queue and returns at once; put it at the head of a step.

    Args:
      kv: [P, ...] the pool; must be donated to the compiled function, and read after this call
        only through the result.
      moves: i32[N, MOVE_WORDS], `MoveBatch.moves`.
      head: i32[3], `MoveBatch.head`. At most N moves are taken.
      spaces: memory of ours that holds the pages from P on. A move of such a page is a user of the
        space's segment too; SEGMENT_STALE if that has been retired.

    Returns:
      The pool, in place. Use it: a call whose result nobody reads is dropped.

    Raises:
      ValueError: shapes don't fit.
      RuntimeError: the native library is missing; or, when run, the pool is not in place.
    """
    if moves.ndim != 2 or moves.shape[1] != MOVE_WORDS or head.shape != (3,):
        raise ValueError(f"enqueue_moves: shapes of moves, head: got {moves.shape}, {head.shape}; "
                         f"allowed: [N, {MOVE_WORDS}], [3]")
    native()
    call = jax.ffi.ffi_call(
        "aqua_enqueue_moves", jax.ShapeDtypeStruct(kv.shape, kv.dtype),
        input_output_aliases={0: 0},
    )
    return call(kv, moves, head, *(() if spaces is None else spaces.operands()))


def poll(tickets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What has become of moves: i32[n] `Status`, u64[n] checksums (0 where none was computed).

    Never waits. A move's copies are visible to whoever has seen its status.
    """
    statuses, checksums = Tickets(tickets.tolist()).poll_sums()
    return np.array(statuses, np.int32), np.array(checksums, np.uint64)


def finished() -> int:
    """Moves that have ended in the life of the process: as long as that is the same, so is what
    `poll` says."""
    return int(native().aqua_moves_finished())


def wait(tickets: np.ndarray, timeout: float) -> bool:
    """Waits until none of these is PENDING; False after `timeout` seconds."""
    return Tickets(tickets.tolist()).wait(timeout)


def drain(timeout: float | None = None) -> bool:
    """Waits until every move that was handed over has ended; False after `timeout` seconds.

    Moves of steps that have not run their head yet are not waited for: wait for the step first.
    """
    return bool(native().aqua_moves_drain(-1 if timeout is None else int(timeout * 1e6)))


def set_delay(seed: int, max_us: int) -> None:
    """For race checkers: each move is held up twice, by 0 to max_us microseconds. 0: not at all.

    Once before it and once in its middle; the times depend on seed and ticket only.
    """
    native().aqua_moves_set_delay(seed, max_us)


def counters() -> MoveCounters:
    """Moves and bytes so far, and the time they took."""
    numbers = (ctypes.c_uint64 * 7)()
    native().aqua_moves_counters(numbers)
    return MoveCounters(*numbers)
