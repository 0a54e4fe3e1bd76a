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
from aqua_jax.engine import device_mapping
from aqua_jax.engine.device_lending import LendableGpuMemory
from aqua_jax.engine.lending import EngineLender
from aqua_jax.engine.platform import device_memory
from aqua_jax.engine.request import Request, Sample
from aqua_jax.errors import AquaError, ConfigError
from aqua_jax.memory.arena import PAGE
from aqua_jax.memory.lendable import LendableMemory
from aqua_jax.ops import device_arena
from aqua_jax.ops.moves import Segment
from aqua_jax.ops.spaces import Space
from aqua_jax.paging.pages import Evictable
from aqua_jax.paging.withdrawal import WithdrawablePool

if TYPE_CHECKING:
    from aqua_jax.memory.client import Client

# Extents: so many, or more where they would be larger than this.
_EXTENTS, _LARGEST = 16, 256 << 20
_SHARE = 0.75  # of all pages, that may be lent if nobody says how many
# Of what a GPU has free outside XLA's share, left to contexts, libraries and XLA's own needs there.
_GPU_MARGIN = 1 << 30


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


def _on_host(
    config: EngineConfig, pages: int, page_bytes: int
) -> tuple[Split, LendableMemory]:
    """A part of the pool's memory."""
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
    try:
        return found, LendableMemory(found.extents, found.extent_pages * page_bytes)
    except ConfigError as error:
        raise ConfigError("kv_cache_memory", pages * page_bytes, error.allowed) from error


def _on_gpu(
    config: EngineConfig, pages: int, page_bytes: int
) -> tuple[Split, LendableGpuMemory]:
    """Memory outside XLA's share of the GPU, beside the pool's."""
    if config.tensor_parallel > 1:
        raise ConfigError(
            "lend", config.lend, "off on several GPUs: a page lies on all of them, and is lent of "
            "one"
        )
    device = jax.local_devices()[0]
    ordinal = device.local_hardware_id or 0
    room = max(0, (device_memory(device).for_arenas or 0) - _GPU_MARGIN)
    lendable = room if config.lend_kv_memory is None else config.lend_kv_memory
    allowed = (
        f"at least a few pages of {page_bytes} bytes, and at most {room}: what is free beside "
        "XLA's share of the GPU (device_memory_fraction), less a margin"
    )
    extra = lendable // page_bytes
    unit = device_arena.unit(ordinal)
    found = split(pages + extra, page_bytes, extra * page_bytes, unit)
    if found is None or lendable > room:
        raise ConfigError("lend_kv_memory", config.lend_kv_memory, allowed)
    # What is left over by rounding is no page: XLA's array keeps the size that fits there.
    found = dataclasses.replace(found, reserve=pages)
    try:
        return found, LendableGpuMemory(found.extents, found.extent_pages * page_bytes, ordinal)
    except ConfigError as error:
        raise ConfigError("lend_kv_memory", lendable, error.allowed) from error


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

        backend = jax.default_backend()
        if backend not in ("cpu", "gpu"):
            raise ConfigError("lend", config.lend, f"off on the platform {backend}")
        if attention != "ffi":
            raise ConfigError("lend", config.lend, f"off with attention {attention}, which can't "
                              "reach memory of ours")
        self._config = config
        self._memory: LendableMemory | LendableGpuMemory
        domain = ""
        if backend == "cpu":
            self.split, self._memory = _on_host(config, pages, page_bytes)
        else:
            self.split, self._memory = _on_gpu(config, pages, page_bytes)
            domain = device_mapping.domain()
        found = self.split
        self._segment = Segment(
            # By address: a view that the segment kept alive would outlive the mapping.
            (ctypes.c_uint8 * self._memory.size).from_address(self._memory.base)
        )
        self.space = Space(self._segment, found.extents * found.extent_pages)
        try:
            self._producer = Producer(
                config.coordinator, self._memory.extents, name=f"engine {os.getpid()}",
                domain=domain, unit=page_bytes, cap=config.lend_bandwidth,
                deadline_s=config.lend_deadline_s,
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
            found.extents * found.extent_pages,
            found.reserve + found.extents * found.extent_pages, found.extent_pages,
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
