"""How long a slice is.

A slice is the number of decode steps that an admitted sequence may count on. After them it goes on
until somebody who has had less needs its place, and the switch is paid for (`guard.py`). Short
slices give early first tokens and short gaps; each switch costs copies to a store and back, or
without one a recomputation of everything the sequence knows (`cost.py`).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from aqua_jax.errors import ConfigError

_SMOOTHING = 0.1  # weight of the newest step in the running mean of step times
_LONGEST_STEP_S = 1.0  # longer pauses between plans are idleness, not steps


@dataclasses.dataclass(frozen=True)
class SliceConfig:
    """The length of slices.

    Raises:
      ConfigError: a field is out of range.
    """

    slice_steps: int | float | Literal["auto"] = "auto"  # decode steps; math.inf: no slices
    tbt_slo_s: float = 0.0  # auto: longest gap aimed at, in seconds; 0: as short as it goes
    min_slice_steps: int = 16  # auto
    idle_share: float = 0.05  # auto: of pages' time, what they spend changing hands
    max_slice_steps: int = 256  # auto

    def __post_init__(self) -> None:
        steps = self.slice_steps
        valid = steps == "auto" or (
            isinstance(steps, (int, float)) and not isinstance(steps, bool) and steps >= 1
            and (steps == math.inf or steps == int(steps))
        )
        if not valid:
            raise ConfigError("slice_steps", steps, '"auto", an integer >= 1, or infinity')
        if not 0 <= self.tbt_slo_s < math.inf:
            raise ConfigError("tbt_slo_s", self.tbt_slo_s, "seconds >= 0")
        if not 0 < self.idle_share < 1:
            raise ConfigError("idle_share", self.idle_share, "between 0 and 1")
        if not 1 <= self.min_slice_steps <= self.max_slice_steps:
            raise ConfigError(
                "min_slice_steps", self.min_slice_steps,
                f"from 1 to max_slice_steps ({self.max_slice_steps})",
            )


class Slices:
    """The length of the next slice.

    Automatic slices adapt in two ways. Where pages are kept in a store, a switch makes them
    useless for as long as copies take, `switch_steps`; slices are long enough for that to be
    `idle_share` of the time. They follow `tbt_slo_s`: a sequence that gave way comes back after the
    others' slices, about `live / running` of them, so slices as long as `slo * running / live` keep
    the gap and switch no more than they must. The slices that really happen get longer, whatever
    their length is to be, where the guard doesn't afford the switches.
    """

    def __init__(self, config: SliceConfig) -> None:
        self.config = config
        self._auto = config.slice_steps == "auto"
        self._steps = (
            float(config.min_slice_steps) if config.slice_steps == "auto"
            else float(config.slice_steps)
        )
        self._step_s = 0.0
        self._planned_at: float | None = None

    @property
    def steps(self) -> float:
        """Decode steps of a slice granted now; infinite when there are no slices."""
        return self._steps

    def observe(self, now: float, live: int, running: int, switch_steps: float = 0.0) -> None:
        """Called once per plan; adapts the length to the time a step takes and to the load.

        Args:
          now: seconds.
          live: sequences.
          running: of these, those with pages.
          switch_steps: steps that pages are of no use when they change hands.
        """
        if not self._auto:
            return
        limits = self.config
        least = switch_steps * (1.0 / limits.idle_share - 1.0)
        least = float(round(min(max(least, limits.min_slice_steps), limits.max_slice_steps)))
        if limits.tbt_slo_s == 0.0:
            self._steps = least
            return
        if self._planned_at is not None and 0.0 < now - self._planned_at < _LONGEST_STEP_S:
            passed = now - self._planned_at
            old = self._step_s or passed
            self._step_s = old + _SMOOTHING * (passed - old)
        self._planned_at = now
        if self._step_s > 0.0:
            others = max(1.0, live / max(1, running) - 1.0)  # slices until one comes back
            steps = int(self.config.tbt_slo_s / (self._step_s * others))
            self._steps = float(min(max(steps, least), limits.max_slice_steps))
