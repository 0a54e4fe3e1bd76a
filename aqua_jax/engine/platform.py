"""Chooses the platform, and what XLA's allocator may take of a GPU, before jax's backend starts.

Both are fixed with the first use of a device in a process. Where that has happened already, what
was asked for is compared with what is there, and a difference is an error rather than ignored.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from typing import Any

import jax
from absl import logging

from aqua_jax.config import EngineConfig
from aqua_jax.errors import ConfigError
from aqua_jax.ops import device_arena, library

DEFAULT_FRACTION = 0.9
# By how much of the device the allocator's limit may miss what was asked for: it counts its share
# of what the driver calls total, rounded to its own units.
_TOLERANCE = 0.03
_VARIABLES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
_PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")


@dataclasses.dataclass(frozen=True)
class DeviceMemory:
    """A device's memory now, in bytes. None: not known, or without meaning (CPUs).

    Attributes:
      limit: what XLA's allocator may take in all.
      in_use: what arrays and running programs have of it.
      held: what it has taken from the device so far, `in_use` included.
      free: what nobody has taken from the device.
      total: of the device.
    """

    limit: int | None = None
    in_use: int = 0
    held: int = 0
    free: int | None = None
    total: int | None = None

    @property
    def claimed(self) -> int:
        """What XLA's allocator may still take from the device."""
        return max(0, (self.limit or 0) - self.held)

    @property
    def for_arenas(self) -> int | None:
        """What arenas outside XLA's allocator can take without starving it."""
        return None if self.free is None else max(0, self.free - self.claimed)

    @property
    def available(self) -> int | None:
        """What arrays can still take: within the limit, and really there."""
        if self.limit is None:
            return None
        room = self.limit - self.in_use
        if self.free is not None:
            room = min(room, self.held - self.in_use + self.free)
        return max(0, room)


def start(config: EngineConfig) -> str:
    """Starts jax's backend as configured; returns the platform, `cpu` or `cuda` mostly.

    Raises:
      ConfigError: the platform isn't there, or the process already uses another one, or another
        share of the GPU's memory.
    """
    before = getattr(jax.config, "jax_platforms", None)  # not in jax's type stubs
    if config.platform != "auto":
        # `cpu` stays available beside a GPU: host arrays are made there.
        jax.config.update("jax_platforms", "cpu" if config.platform == "cpu" else "cuda,cpu")
    fraction = None if config.platform == "cpu" else _choose_fraction(config)
    if fraction is not None and any(importlib.util.find_spec(name) for name in _PLUGINS):
        jax.config.update("jax_pjrt_client_create_options", _with_fraction(fraction))
    try:
        jax.default_backend()
        found = library.platform()
        if config.platform not in ("auto", found):
            raise ConfigError(
                "platform", config.platform,
                f"auto or {found}: jax already runs on that in this process, or has no other "
                "(for GPUs: pip install 'aqua-jax[cuda12]' or [cuda13])",
            )
    except (RuntimeError, ConfigError) as error:
        jax.config.update("jax_platforms", before)
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            "platform", config.platform, f"one that jax can use here: {error}"
        ) from error
    device = jax.local_devices()[0]
    if found == "cuda":
        _check_fraction(config.device_memory_fraction, device_memory(device))
    elif config.device_memory_fraction is not None:
        logging.info("device_memory_fraction has no meaning on the platform %s", found)
    logging.info(
        "platform %s%s: %d x %s", found, " (chosen by jax)" if config.platform == "auto" else "",
        jax.local_device_count(), device.device_kind,
    )
    return found


def _choose_fraction(config: EngineConfig) -> float | None:
    """The share to ask for; None: the environment has said so."""
    if config.device_memory_fraction is not None:
        return config.device_memory_fraction
    return None if any(os.environ.get(name) for name in _VARIABLES) else DEFAULT_FRACTION


def _with_fraction(fraction: float) -> dict[str, Any]:
    """jax's options for making a client, the share added to what is set already."""
    options = getattr(jax.config, "jax_pjrt_client_create_options", None) or {}
    if isinstance(options, str):
        options = dict(option.split(":", 1) for option in options.split(";") if option)
    return {**options, "memory_fraction": fraction}


def _check_fraction(asked: float | None, memory: DeviceMemory) -> None:
    if asked is None or memory.limit is None or not memory.total:
        return
    actual = memory.limit / memory.total
    if abs(actual - asked) > _TOLERANCE:
        raise ConfigError(
            "device_memory_fraction", asked,
            f"{actual:.2f} in this process: XLA's allocator was started with that before; use no "
            f"device earlier, and don't set {_VARIABLES[0]}",
        )


def device_memory(device: Any) -> DeviceMemory:
    """What a device's allocator and its driver say now; empty on platforms that say nothing."""
    stats = device.memory_stats() if device.platform != "cpu" else None
    free, total = None, None
    if device.platform == "gpu":
        found = device_arena.memory(device.local_hardware_id or 0)
        free, total = found or (None, None)
    if not stats or "bytes_limit" not in stats:
        return DeviceMemory(free=free, total=total)
    in_use = int(stats.get("bytes_in_use", 0))
    return DeviceMemory(
        int(stats["bytes_limit"]), in_use, max(in_use, int(stats.get("pool_bytes", in_use))),
        free, total,
    )
