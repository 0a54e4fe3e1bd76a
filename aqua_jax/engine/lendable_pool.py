"""The memory behind an engine that lends: how its pages lie, and all that has to be opened for it.

What the user asked for and can't be had is an error that names the field, before anything is
compiled.
"""

from __future__ import annotations

import ctypes
import dataclasses
import math
import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import jax
from absl import logging

from aqua_jax.config import EngineConfig
from aqua_jax.engine.lending import EngineLender
from aqua_jax.engine.request import Request, Sample
from aqua_jax.errors import AquaError, ConfigError
from aqua_jax.memory.arena import PAGE
from aqua_jax.memory.lendable import LendableMemory
from aqua_jax.ops.moves import Segment
from aqua_jax.ops.spaces import Space
from aqua_jax.paging.pages import Evictable
from aqua_jax.paging.withdrawal import WithdrawablePool

if TYPE_CHECKING:
    from aqua_jax.memory.client import Client

# Extents: so many, or more where they would be larger than this.
_EXTENTS, _LARGEST = 16, 256 << 20
_SHARE = 0.75  # of all pages, that may be lent if nobody says how many


@dataclasses.dataclass(frozen=True)
class Split:
    """How the pages of a pool lie.

    Attributes:
      reserve: in the array that is never lent.
      extents: runs that may be lent.
      extent_pages: pages of each.
    """

    reserve: int
    extents: int
    extent_pages: int


def split(pages: int, page_bytes: int, lendable: int, unit: int = PAGE) -> Split | None:
    """Divides a pool of `pages` pages.

    Args:
      pages: in all.
      page_bytes: of each.
      lendable: bytes that may be lent at most.
      unit: bytes that an extent must be a multiple of.

    Returns:
      None when not even one extent fits beside a reserve of one page.
    """
    step = unit // math.gcd(unit, page_bytes)  # pages that are whole units together
    most = min(lendable // page_bytes, pages - 1) // step
    if most < 1:
        return None
    extents = min(most, max(_EXTENTS, -(-most * step * page_bytes // _LARGEST)))
    length = most // extents * step
    extents = most * step // length
    return Split(pages - extents * length, extents, length)


class LendablePool:
    """Memory, its registration for the device's handlers, and the way to the coordinator."""

    def __init__(self, config: EngineConfig, pages: int, page_bytes: int, attention: str) -> None:
        """
        Args:
          config: with `lend`.
          pages: of keys and values, in all.
          page_bytes: of each.
          attention: the implementation in use.

        Raises:
          ConfigError: the coordinator doesn't answer, the memory isn't there, or this platform
            can't lend.
        """
        from aqua_jax.memory.producer import Producer  # needs gRPC, which only lenders have

        if jax.default_backend() != "cpu":
            raise ConfigError("lend", config.lend, "off: only memory of the host can be lent yet")
        if attention != "ffi":
            raise ConfigError("lend", config.lend, f"off with attention {attention}, which can't "
                              "reach memory of ours")
        lendable = config.lend_kv_memory
        if lendable is None:
            lendable = int(pages * _SHARE) * page_bytes
        found = split(pages, page_bytes, lendable)
        if found is None:
            raise ConfigError(
                "lend_kv_memory", config.lend_kv_memory,
                f"a part of the KV memory, {pages} pages of {page_bytes} bytes, in whole pages of "
                f"the system, of {PAGE}",
            )
        self.split, self._config = found, config
        try:
            self._memory = LendableMemory(found.extents, found.extent_pages * page_bytes)
        except ConfigError as error:
            raise ConfigError("kv_cache_memory", pages * page_bytes, error.allowed) from error
        self._segment = Segment(
            # By address: a view that the segment kept alive would outlive the mapping.
            (ctypes.c_uint8 * self._memory.size).from_address(self._memory.base)
        )
        self.space = Space(self._segment, found.extents * found.extent_pages)
        try:
            self._producer = Producer(
                config.coordinator, self._memory.extents, name=f"engine {os.getpid()}",
                unit=page_bytes, cap=config.lend_bandwidth, deadline_s=config.lend_deadline_s,
            )
        except AquaError as error:
            self._segment.retire()
            self._memory.close()
            raise ConfigError(
                "coordinator", config.coordinator,
                f"the socket of a coordinator that runs (aqua-jax coordinator): {error}",
            ) from error
        logging.info(
            "%d of %d pages may be lent, in extents of %d",
            pages - found.reserve, pages, found.extent_pages,
        )

    @property
    def client(self) -> Client:
        """The connection to the coordinator."""
        return self._producer.client

    def pages(self, page_tokens: int, evictable: Evictable) -> WithdrawablePool:
        """The allocator of these pages."""
        found = self.split
        return WithdrawablePool(
            found.reserve, found.extents, found.extent_pages, page_tokens, evictable
        )

    def lender(
        self, pool: WithdrawablePool, live: Callable[[], Iterable[tuple[Request, Sample]]]
    ) -> EngineLender:
        """Decides what of them is lent."""
        config = self._config
        return EngineLender(
            pool, self._producer, live,
            reserve=math.ceil(config.lend_reserve * pool.num_pages), hold_s=config.lend_hold_s,
            horizon_s=config.lend_deadline_s, close=self.close,
        )

    def close(self) -> None:
        """Takes back what it can, leaves, unmaps the memory. Steps have ended. Repeatable."""
        if self._memory.closed:
            return
        self._producer.close()
        self._segment.retire()
        self._memory.close()
