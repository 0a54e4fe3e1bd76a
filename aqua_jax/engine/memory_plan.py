"""How an engine's memory is divided: weights, KV pool, a step's temporaries, what others get.

On a GPU the KV pool gets what weights and the peak of a step leave of the allocator's share. The
peak is measured: the compiler says what each program needs besides its arguments
(`memory_analysis`). It hardly depends on the pool's size, which must be known to compile, so sizing
begins with a guess and compiles again only if the guess was off by more than it may waste.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
from absl import logging

from aqua_jax.engine.platform import DeviceMemory
from aqua_jax.engine.programs import Programs
from aqua_jax.errors import ConfigError
from aqua_jax.models.config import ModelConfig

# Left free: fragments of the allocator, and what libraries take on their first call.
_MARGIN, _MARGIN_SHARE = 256 << 20, 0.02
# Of the memory that is free a guess may leave so much unused before it is made again.
_WASTE = 0.02
_ATTEMPTS = 4
# Steps whose results may be on the device at once: the one that runs and the one behind it.
_STEPS = 2


@dataclasses.dataclass(frozen=True)
class Share:
    """What one of the devices that share a model has of it: bytes of weights and of KV pool."""

    device: str
    weights: int
    pool: int

    @classmethod
    def of(cls, device: Any, weights: Iterable[jax.Array], kv: jax.Array) -> Share:
        """The share of `device`."""
        return cls(str(device), bytes_on(weights, device), bytes_on([kv], device))


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one device, or on each of those that share the model.

    Attributes:
      platform: `cpu`, `cuda`.
      device: what it is called.
      weights: parameters.
      pool: keys and values.
      temporaries: most that a step needs besides them, by the compiler's analysis.
      others: what the process had in use there besides.
      margin: left free on purpose.
      memory: the device's memory when the plan was made, the pool not yet there.
      shares: what each device has in fact.
    """

    platform: str
    device: str
    weights: int
    pool: int
    temporaries: int
    others: int
    margin: int
    memory: DeviceMemory
    shares: tuple[Share, ...] = ()

    @property
    def unplanned(self) -> int | None:
        """What XLA's allocator may take and nothing here needs; negative: it may not suffice."""
        room = self.memory.available
        return None if room is None else room - self.pool - self.temporaries - self.margin

    def as_dict(self) -> dict[str, Any]:
        """For `stats`: all figures by name; what isn't known is left out."""
        found = {
            "weights": self.weights, "pool": self.pool, "temporaries": self.temporaries,
            "others": self.others, "margin": self.margin, "unplanned": self.unplanned,
            "limit": self.memory.limit, "total": self.memory.total,
            "for_arenas": self.memory.for_arenas,
        }
        known = {name: value for name, value in found.items() if value is not None}
        return {**known, "devices": [dataclasses.asdict(share) for share in self.shares]}

    def table(self) -> str:
        """For the log: a line a figure."""
        names = {
            "weights": "weights", "pool": "KV pool", "temporaries": "a step's temporaries",
            "others": "other arrays", "margin": "margin", "unplanned": "not planned",
            "limit": "XLA's allocator may take", "total": "the device has",
            "for_arenas": "left to arenas outside XLA",
        }
        each = f", each of {len(self.shares)}" if len(self.shares) > 1 else ""
        lines = [f"memory of {self.device} ({self.platform}{each})"]
        figures = self.as_dict()
        for name in [name for name in names if name in figures]:
            lines.append(f"  {names[name]:<28}{figures[name] / 2**20:>12,.1f} MiB")
        return "\n".join(lines)


def bytes_on(arrays: Iterable[jax.Array], device: Any) -> int:
    """Bytes that arrays have on one device, each buffer counted once."""
    return sum(
        shard.data.nbytes
        for array in {id(array): array for array in arrays}.values()
        for shard in array.addressable_shards if shard.device == device
    )


def peak_bytes(programs: Programs) -> int:
    """Most that one of the programs compiled so far needs besides its arguments.

    Temporaries of one, and the results of as many steps as may be under way.
    """
    most = 0
    for analysis in programs.memory_analyses():
        results = max(0, analysis.output_size_in_bytes - analysis.alias_size_in_bytes)
        most = max(most, analysis.temp_size_in_bytes + _STEPS * results)
    return most


def guessed_peak(model: ModelConfig, tokens: int, rows: int) -> int:
    """A bound on the peak to begin with: widest activations of a layer, and logits, in f32."""
    width = 3 * model.hidden_size + 3 * model.intermediate_size + 2 * (
        model.num_heads * model.head_dim + 2 * model.kv_size
    )
    return 4 * (tokens * width + 4 * rows * model.vocab_size)


def margin_of(memory: DeviceMemory) -> int:
    """Bytes to leave free on a device with a limit."""
    return 0 if memory.limit is None else max(_MARGIN, int(memory.limit * _MARGIN_SHARE))


@dataclasses.dataclass(frozen=True)
class SizedPool:
    """How many pages fit, and programs compiled for that many to find out."""

    pages: int
    programs: Programs


def size_pool(
    memory: DeviceMemory, page_bytes: int, guess: int, compile_for: Callable[[int], Programs],
    *, least_pages: int = 1,
) -> SizedPool:
    """Pages of a KV pool that fills what weights and the measured peak leave.

    Args:
      memory: the device's, with the weights in use.
      page_bytes: of one page on this device.
      guess: of the peak.
      compile_for: compiles the programs with the largest peak for so many pages.
      least_pages: that must fit.

    Raises:
      ConfigError: there isn't room for them.
    """
    room = memory.available
    assert room is not None, "sizing needs a device that says how much it has"
    usable = room - margin_of(memory)

    def fit(peak: int) -> int:
        return max(0, usable - peak) // page_bytes

    pages = max(least_pages, fit(guess))
    for attempt in range(_ATTEMPTS):
        programs = compile_for(pages)
        peak = peak_bytes(programs)
        better = fit(peak)
        if better < least_pages:
            raise ConfigError(
                "device_memory_fraction", _share(memory),
                f"enough for {least_pages} pages of {page_bytes} bytes: {room} bytes are free "
                f"beside the weights, and a step needs {peak}; fewer max_step_tokens or "
                "max_num_seqs need less",
            )
        if 0 <= (better - pages) * page_bytes <= max(page_bytes, _WASTE * usable):
            return SizedPool(pages, programs)
        logging.info("a step needs %d bytes: room for %d pages, not %d", peak, better, pages)
        # The peak grows a little with the pool, whose page tables are wider: the last time take
        # what is known to fit.
        pages = better if attempt < _ATTEMPTS - 2 else min(better, pages)
    return SizedPool(pages, programs)


def _share(memory: DeviceMemory) -> float | None:
    return round((memory.limit or 0) / memory.total, 3) if memory.total else None
