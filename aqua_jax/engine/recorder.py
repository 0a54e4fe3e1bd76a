"""An engine that writes down its scheduler's calls, for the simulator."""

from __future__ import annotations

from collections.abc import Callable

from aqua_jax.config import EngineConfig
from aqua_jax.engine.engine import Engine
from aqua_jax.scheduling.recording import Recorder, limits_of


class RecordedEngine(Engine):
    """An `Engine` with a log.

    Attributes:
      limits: what its scheduler was built from.
      recorder: the scheduler's calls, in order.
    """

    def __init__(
        self, config: EngineConfig, *, progress: Callable[[int, int], None] | None = None
    ) -> None:
        super().__init__(config, progress=progress)
        self.limits = limits_of(self.scheduler)
        self.recorder = Recorder(self.scheduler)
