"""Spaces: page ids beyond the pool that XLA owns, for memory of ours.

A page id names a page of the pool `kv [P, ...]` if it is below P. The ids from P on belong to
spaces, in consecutive ranges: memory outside XLA (a memfd, a GPU's virtual memory) that is laid out
as the pool is, page after page, on CPUs perhaps with others' bytes between pages. Ops on pages take
`spaces: Spaces | None`, look an id's address up in its table, and treat all pages alike. Why not
XLA's memory: it can't be exported to another process, and what is imported loses its address at the
first donated step.

The table is an operand, not part of the program: another address compiles nothing, and shards
differ: each finds its own part of the same pages (`on_devices`). Without spaces there is no operand
and nothing to look up.

Handlers write to spaces behind XLA's back. What keeps the order is the pool: each op takes it and
gives it back, so they run one after the other as they stand in the program.

A space's memory is registered (`ops.segments.Segment`), and whoever touches it counts as its user:
page moves until they have ended, on CPUs each handler while it runs. On GPUs a kernel can't be
counted. So, on either: wait for dispatched steps, then `Segment.retire`, then unmap. A CPU's step
that comes too late fails (and costs the donated pool); a move that does is SEGMENT_STALE.

Only the C++ and CUDA handlers reach such memory: jnp references raise when they are given spaces.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from aqua_jax.ops import library
from aqua_jax.ops.segments import Segment

# Most spaces behind a pool, and words of a row of the table (ffi/common/spaces.h).
MAX_SPACES = 8
SPACE_WORDS = 8
# Kernels copy 16 bytes at a time; the pool itself is aligned to this.
_ALIGNMENT = 64


@dataclasses.dataclass(frozen=True)
class Space:
    """Pages in registered memory, one after the other.

    Attributes:
      segment: the memory, registered until no step can touch it.
      pages: how many.
      offset: bytes from the segment's start to the first page.
      stride: bytes from one page to the next; 0: they follow each other. Not on GPUs.
    """

    segment: Segment
    pages: int
    offset: int = 0
    stride: int = 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Spaces:
    """The spaces behind a pool, as handlers see them. Letter: N spaces, 1 to MAX_SPACES."""

    # i32[N, SPACE_WORDS]: first page id, pages, low and high word of the first page's address,
    # id and generation of the segment, bytes from page to page (0: a page's), one unused.
    # Of several devices together: [devices * N, SPACE_WORDS], each has its N.
    table: jax.Array | np.ndarray

    @classmethod
    def behind(cls, kv: jax.Array | jax.ShapeDtypeStruct, *spaces: Space) -> Spaces:
        """Ids for the pages of `spaces`, in this order, behind those of the pool kv [P, ...].

        Raises:
          ValueError: no spaces or too many, pages that don't fit their segment, or memory that
            isn't aligned.
          StaleHandleError: a segment has been retired.
        """
        if not 1 <= len(spaces) <= MAX_SPACES:
            raise ValueError(f"spaces: got {len(spaces)}; allowed: 1 to {MAX_SPACES}")
        page_bytes = int(np.prod(kv.shape[1:], dtype=np.int64)) * np.dtype(kv.dtype).itemsize
        table = np.zeros((len(spaces), SPACE_WORDS), np.uint32)
        first = kv.shape[0]
        for row, space in zip(table, spaces, strict=True):
            stride = space.stride or page_bytes
            end = space.offset + (space.pages - 1) * stride + page_bytes
            if space.pages < 1 or space.offset < 0 or end > space.segment.nbytes:
                raise ValueError(
                    f"space: got {space.pages} pages of {page_bytes} bytes at {space.offset}; "
                    f"allowed: at least one, within {space.segment.nbytes} bytes"
                )
            address = space.segment.address + space.offset
            if address % _ALIGNMENT or (space.pages > 1 and space.stride % _ALIGNMENT):
                raise ValueError(f"address of a space: got {address:#x}, stride {space.stride}; "
                                 f"allowed: multiples of {_ALIGNMENT}")
            on_gpu = space.stride and library.platform() == "cuda"
            if on_gpu or not (space.stride == 0 or page_bytes <= stride < 2**31):
                raise ValueError(f"stride of a space: got {space.stride}; allowed: 0, and on CPUs "
                                 f"{page_bytes}, what a page has, to {2**31 - 1}")
            if first + space.pages > np.iinfo(np.int32).max:
                raise ValueError(f"pages in all: got {first + space.pages}; allowed: below 2^31")
            row[:7] = (
                first, space.pages, address & 0xFFFFFFFF, address >> 32, space.segment.id,
                space.segment.generation, space.stride,
            )
            first += space.pages
        return cls(table.view(np.int32))

    @classmethod
    def on_devices(cls, kv: jax.Array | jax.ShapeDtypeStruct, devices: int, space: Space) -> Spaces:
        """Those of devices that share each page, their parts of it one after the other.

        Args:
          kv: one device's part of the pool.
          devices: how many.
          space: whole pages, of all devices' bytes, without others between them.

        Returns:
          The devices' tables one after the other, to be laid out so.
        """
        part = int(np.prod(kv.shape[1:], dtype=np.int64)) * np.dtype(kv.dtype).itemsize
        return cls(np.concatenate([
            np.asarray(cls.behind(kv, Space(
                space.segment, space.pages, space.offset + device * part,
                devices * part if devices > 1 else 0,
            )).table) for device in range(devices)
        ]))

    @property
    def end(self) -> int:
        """The id behind the last page, from a table on the host."""
        return int(np.asarray(self.table)[-1, :2].sum())

    def operands(self) -> tuple[jax.Array | np.ndarray]:
        """What a handler takes behind its other operands.

        Raises:
          ValueError: the table has another shape or dtype.
        """
        shape = self.table.shape
        good = len(shape) == 2 and 1 <= shape[0] <= MAX_SPACES and shape[1] == SPACE_WORDS
        if not good or self.table.dtype != np.int32:
            raise ValueError(f"table of spaces: got {self.table.dtype}{shape}; allowed: "
                             f"int32[1 to {MAX_SPACES}, {SPACE_WORDS}]")
        return (self.table,)



def require_handlers(name: str, spaces: Spaces | None) -> None:
    """Raises RuntimeError if the jnp reference of op `name` was given spaces."""
    if spaces is not None:
        raise RuntimeError(
            f"{name}: got spaces, whose memory the reference implementation can't reach; allowed: "
            "implementation='ffi', with the compiled handlers of this platform"
        )
