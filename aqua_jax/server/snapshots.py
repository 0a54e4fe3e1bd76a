"""Looks inside the running engine, seldom enough that the step loop doesn't notice."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from aqua_jax.engine.async_engine import AsyncEngine
from aqua_jax.errors import EngineDeadError

T = TypeVar("T")

_SHARE = 0.02  # of the time, that looking may take


class Snapshot(Generic[T]):
    """The result of a function of the engine, taken between two steps, at most so often.

    Args:
      engine: looked into.
      function: run by the engine's thread, which it holds up.
      convert: run on the event loop once a result; what it returns is handed out.
      max_age_s: a younger result is handed out again, however many ask. Results that took long
        are kept for longer, so that taking them costs a fiftieth of the time at most.
      patience_s: how long to wait for the step to end (it may be compiling) before an older
        result will do.
    """

    def __init__(
        self, engine: AsyncEngine, function: Callable[[Any], Any],
        convert: Callable[[Any], T] = lambda result: result, *, max_age_s: float = 0.2,
        patience_s: float = 2.0,
    ) -> None:
        self._engine, self._function, self._convert = engine, function, convert
        self._max_age_s, self._patience_s = max_age_s, patience_s
        self._taken_at = -float("inf")
        self._cost_s = 0.0  # of the last one
        self._value: T | None = None
        self._lock = asyncio.Lock()

    async def get(self) -> T | None:
        """The result, or None when there never was one: the engine is dead or very busy."""
        async with self._lock:
            age = time.monotonic() - self._taken_at
            if age > max(self._max_age_s, self._cost_s / _SHARE):
                try:
                    async with asyncio.timeout(self._patience_s):
                        result, spent = await self._engine.call(self._timed)
                except (EngineDeadError, TimeoutError):
                    pass
                else:
                    started = time.thread_time()
                    self._value = self._convert(result)
                    self._cost_s = spent + time.thread_time() - started
                self._taken_at = time.monotonic()
            return self._value

    def _timed(self, inner: Any) -> tuple[Any, float]:
        started = time.thread_time()
        return self._function(inner), time.thread_time() - started
