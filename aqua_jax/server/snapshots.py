"""Looks inside the running engine, seldom enough that the step loop doesn't notice."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from aqua_jax.engine.async_engine import AsyncEngine
from aqua_jax.errors import EngineDeadError

T = TypeVar("T")


class Snapshot(Generic[T]):
    """The result of a function of the engine, taken between two steps, at most so often.

    Args:
      engine: looked into.
      function: run by the engine's thread; must be short.
      max_age_s: a younger result is handed out again, however many ask.
      patience_s: how long to wait for the step to end (it may be compiling) before an older
        result will do.
    """

    def __init__(
        self, engine: AsyncEngine, function: Callable[[Any], T], max_age_s: float = 0.2,
        patience_s: float = 2.0,
    ) -> None:
        self._engine, self._function = engine, function
        self._max_age_s, self._patience_s = max_age_s, patience_s
        self._taken_at = -float("inf")
        self._value: T | None = None
        self._lock = asyncio.Lock()

    async def get(self) -> T | None:
        """The result, or None when there never was one: the engine is dead or very busy."""
        async with self._lock:
            if time.monotonic() - self._taken_at > self._max_age_s:
                try:
                    async with asyncio.timeout(self._patience_s):
                        self._value = await self._engine.call(self._function)
                except (EngineDeadError, TimeoutError):
                    pass
                self._taken_at = time.monotonic()
            return self._value
