"""GPUs' memory that other processes lend, mapped for the GPUs that jax uses here.

A lender names its GPU by UUID. Where this process sees that GPU too, the driver is asked first
whether ours reach it; where it doesn't (`CUDA_VISIBLE_DEVICES` hides it) the driver may refuse the
mapping: choose an engine's GPU by `jax_cuda_visible_devices` instead, which hides nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
from absl import logging

from aqua_jax.errors import ArenaError
from aqua_jax.memory.mapping import Mapper
from aqua_jax.ops import device_arena, library
from aqua_jax.ops.device_arena import DeviceArena


class GpuMapper:
    """Maps lenders' memory for some GPUs of this process; `memory.mapping.Mapper`."""

    def __init__(self, ordinals: Sequence[int]) -> None:
        """
        Args:
          ordinals: of the GPUs that will copy to and from it.
        """
        self._ordinals = tuple(dict.fromkeys(ordinals))

    def map(self, fd: int, size: int, device: str) -> DeviceArena:
        """Maps an arena; the descriptor stays the caller's.

        Raises:
          ArenaError: a GPU of ours can't reach that one without going through the host, or the
            driver refuses.
        """
        ours = ", ".join(f"cuda:{ordinal}" for ordinal in self._ordinals)
        theirs = device_arena.ordinal_of(device)
        how = "a GPU that this process doesn't see"
        if theirs is not None:
            links = [device_arena.link(ordinal, theirs) for ordinal in self._ordinals]
            if not all(link.reaches for link in links):
                raise ArenaError(
                    f"{ours} can't reach {device} (cuda:{theirs}) without going through the host: "
                    "neither NVLink nor PCIe peer access"
                )
            how = ", ".join(
                "the same GPU" if ordinal == theirs else
                f"{link.nvlinks} NVLinks" if link.nvlinks else "PCIe"
                for ordinal, link in zip(self._ordinals, links, strict=True)
            )
        mapped = DeviceArena.map(fd, size, self._ordinals)
        logging.info("mapped %d bytes of %s for %s: %s, by %s", size, device, ours, how, mapped.way)
        return mapped


def mappers(devices: Sequence[int] = (0,)) -> dict[str, Mapper]:
    """By kind of memory, for some of jax's local devices; none on a CPU.

    Args:
      devices: indices into `jax.local_devices()`.
    """
    if library.platform() != "cuda" or jax.default_backend() != "gpu":
        return {}
    found = jax.local_devices()
    return {"cuda": GpuMapper([found[index].local_hardware_id or 0 for index in devices])}


def domain(devices: Sequence[int] = (0,)) -> str:
    """Where the first of these devices is, for the coordinator; empty on a CPU.

    Args:
      devices: indices into `jax.local_devices()`.
    """
    if library.platform() != "cuda" or jax.default_backend() != "gpu":
        return ""
    found = jax.local_devices()[devices[0]]
    return device_arena.identity(found.local_hardware_id or 0).domain
