"""An engine that writes down its steps and its scheduler's calls, for the simulator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from aqua_jax.config import EngineConfig
from aqua_jax.engine.engine import Engine
from aqua_jax.engine.outputs import RequestOutput
from aqua_jax.engine.runner import StepRecord
from aqua_jax.scheduling.plan import Plan
from aqua_jax.scheduling.recording import Recorder, limits_of


class RecordedEngine(Engine):
    """An `Engine` with a log.

    Attributes:
      limits: what its scheduler was built from.
      recorder: the scheduler's calls, in order.
      observe: told every step's plan and seconds on the device, when its tokens have come; None:
        nobody is.
    """

    def __init__(
        self, config: EngineConfig, *, progress: Callable[[int, int], None] | None = None
    ) -> None:
        super().__init__(config, progress=progress)
        self.limits = limits_of(self._scheduler)
        self.recorder = Recorder(self._scheduler)
        self.observe: Callable[[Plan, float], None] | None = None
        self._plans: dict[int, Plan] = {}
        self._taking_in = -1
        # The engine tells its planner what a step took; we listen.
        self._measured = self._scheduler.costs.observe_step
        self._scheduler.costs.observe_step = self._observed  # type: ignore[method-assign]

    @property
    def page_bytes(self) -> int:
        """Of a page of keys and values."""
        kv = self._runner.kv
        return kv.nbytes // kv.shape[0]

    def _count_plan(self, plan: Any) -> None:
        super()._count_plan(plan)
        if plan.chunks:
            self._plans[plan.step_id] = plan

    def _take_in(self, record: StepRecord) -> list[RequestOutput]:
        self._taking_in = record.step_id
        return super()._take_in(record)

    def _observed(self, prefill: int, decodes: int, seconds: float) -> None:
        self._measured(prefill, decodes, seconds)
        plan = self._plans.pop(self._taking_in)
        if self.observe is not None:
            self.observe(plan, seconds)
