"""Memory of a GPU as a tier, taken by the engine itself: `--peer=cuda:1`.

For a GPU that nobody uses, where a lender of its own would be a process for nothing. Pages go there
over NVLink or PCIe, through a mapping for our GPU. On our own GPU (`cuda:0` beside `cuda:0`) it is
memory outside XLA's allocator: a stand-in for a peer, for tests and measurements.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

import jax
from absl import logging

from aqua_jax.engine.platform import device_memory
from aqua_jax.errors import ArenaError, ConfigError
from aqua_jax.memory.lease import Lease
from aqua_jax.memory.mapping import DeviceRange
from aqua_jax.ops import device_arena, library
from aqua_jax.ops.device_arena import DeviceArena

# Left to contexts and libraries on a GPU whose memory is all asked for.
_MARGIN = 1 << 30


def gpu_of(peer: str) -> int | None:
    """The ordinal in `cuda:N`; None if `peer` says something else."""
    found = re.fullmatch(r"cuda:(\d{1,3})", peer)
    return None if found is None else int(found[1])


class MappedRange(DeviceRange):
    """A device arena as `Lease` wants its memory: with an address that only GPUs can use."""

    def __init__(self, arena: DeviceArena, owner: DeviceArena) -> None:
        """
        Args:
          arena: mapped for the GPU that copies.
          owner: the same memory where it was made; may be the same object.
        """
        self._arena, self._owner = arena, owner
        self.size, self.address, self.closed = arena.nbytes, arena.address, False

    def close(self) -> None:
        """Unmaps it and gives it back to the GPU. No copy may be under way."""
        if not self.closed:
            self.closed = True
            self._arena.close()
            self._owner.close()


class DeviceSource:
    """One lease of a GPU's memory, all that was asked for, made when it is first wanted.

    Raises:
      ConfigError: there is no such GPU, or ours can't reach it.
    """

    def __init__(self, peer: str, ordinal: int, device: int = 0, share: int = 1) -> None:
        """
        Args:
          peer: what the configuration says, for messages.
          ordinal: of the GPU whose memory is used.
          device: which of this process's devices uses it.
          share: how many such sources, this one included, are still to take memory there.
        """
        if library.platform() != "cuda":
            raise ConfigError(
                "peer", peer, f"a lender's socket: the platform is {library.platform()}, not cuda"
            )
        self._ours = jax.local_devices()[device].local_hardware_id or 0
        self._ordinal, self._share = ordinal, share
        try:
            link = device_arena.link(self._ours, ordinal)
        except ArenaError as error:
            raise ConfigError("peer", peer, f"a GPU of this machine: {error}") from error
        if not link.reaches:
            raise ConfigError(
                "peer", peer, f"a GPU that cuda:{self._ours} reaches without going through the "
                "host; without --peer pages go to the host's memory (--host_kv_memory)",
            )
        logging.info(
            "peer cuda:%d: %s, nominally %d MB/s one way", ordinal,
            "the same GPU" if ordinal == self._ours else
            f"{link.nvlinks} NVLinks" if link.nvlinks else "PCIe", link.nominal_mb_s,
        )
        self._lease: Lease | None = None

    def borrow(self, size: int) -> Sequence[Lease]:
        """The one lease, of at most `size` bytes: nothing while it is there.

        Raises:
          ArenaError: the driver refuses.
        """
        if self._lease is not None and not self._lease.closed:
            return ()
        # What XLA may still take there, if it is a GPU of this process.
        claimed = sum(
            device_memory(one).claimed for one in jax.local_devices()
            if one.local_hardware_id == self._ordinal
        )
        found = device_arena.memory(self._ordinal)
        room = 0 if found is None else max(0, found[0] - claimed - _MARGIN)
        size = min(size, room // self._share)
        if size < 1:
            return ()
        owner = DeviceArena.create(size, self._ordinal, claimed=claimed)
        try:
            arena = owner
            if self._ordinal != self._ours:
                arena = DeviceArena.map(owner.fd, owner.nbytes, self._ours)
        except ArenaError:
            owner.close()
            raise
        finally:
            os.close(owner.fd)
        memory = MappedRange(arena, owner)
        self._lease = Lease(
            memory, 0, lambda lease, offset, nbytes: None, kind="cuda", way=arena.way
        )
        return (self._lease,)

    def close(self) -> None:
        """Nothing more to do: the lease has its memory."""
