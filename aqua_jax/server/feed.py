"""The state of the engine for those who watch: whole at first, then what has changed.

Of two thousand live requests a hundred change between two looks. Sending only those makes a look
cheap for the watcher, who needn't parse the others again, and for the event loop, which needn't
encode them, nor find out which they are.
"""

from __future__ import annotations

import collections
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

from aqua_jax.engine.async_engine import AsyncEngine
from aqua_jax.engine.inspect import COLUMNS, Inspector, Key, Look, Row
from aqua_jax.server.answers import compact
from aqua_jax.server.changes import Changes
from aqua_jax.server.snapshots import Snapshot

_KEPT = 600  # versions that a watcher may have seen last: two minutes at the very least
_BRIEF = 256  # of one version, TTFTs handed on
_TTFT = COLUMNS.index("ttft_s")


def _clean(value: Any) -> Any:
    """Short numbers, and null for what JSON can't write."""
    if isinstance(value, float):
        return round(value, 4) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _clean(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_clean(inner) for inner in value]
    return value


class StateFeed:
    """Versions of what an `Inspector` says.

    Args:
      engine: looked into.
      more: further entries of each answer.
      max_age_s: a younger look is handed out again.
    """

    def __init__(
        self, engine: AsyncEngine, more: Callable[[], Mapping[str, Any]], *, max_age_s: float = 0.2
    ) -> None:
        self._more = more
        # A watcher of the process before this one has seen no version of ours.
        self._first = self._version = int(time.time() * 1000)
        self._rows: Changes[Key, Row] = Changes(_KEPT)
        self._users: Changes[str, float] = Changes(_KEPT)
        self._ended: list[float] = []  # TTFTs that no look has seen
        self._brief: collections.deque[tuple[int, float]] = collections.deque(maxlen=8 * _BRIEF)
        self._encoded: dict[int | None, bytes] = {}  # of the latest version, by what it starts from
        inspector, self._taken = Inspector(), 0
        self._look: Look | None = None
        self._snapshot = Snapshot(
            engine, lambda inner: inspector.look(inner, self._taken), self._take,
            max_age_s=max_age_s,
        )

    def ended(self, request_id: str, ttft_s: float) -> None:
        """A request has; counts if it came and went between two looks."""
        row = self._rows.get((request_id, 0))
        if (row is None or row[_TTFT] is None) and len(self._ended) < _BRIEF:
            self._ended.append(ttft_s)

    async def get(self, since: int | None) -> tuple[int, bytes] | None:
        """The latest version and its state as JSON, or None when the engine doesn't answer.

        Args:
          since: version that the asker has seen last. If it is still known, "rows" holds only the
            rows that are new or have changed, "gone" the [request, sample] of those that have
            ended (first; one may have come again), "users" only those whose vruntime has changed,
            null where nothing of them is alive, "brief" the TTFTs of requests that came and went
            between two looks, and "since" repeats it; else "since" is null and everything is there.
        """
        if await self._snapshot.get() is None:
            return None
        start = since
        if since is None or not max(self._first, self._version - _KEPT) < since <= self._version:
            start = None
        if start not in self._encoded:
            self._encoded[start] = self._encode(start)
        return self._version, self._encoded[start]

    def _take(self, look: Look) -> int:
        """A new version."""
        self._version += 1
        version, self._taken, self._look = self._version, look.number, look
        for key in look.gone:
            self._rows.drop(key, version)
        for key, row in look.rows.items():
            self._rows.put(key, row, version)
        for user, vruntime in look.users.items():
            if vruntime is None:
                self._users.drop(user, version)
            else:
                self._users.put(user, vruntime, version)
        self._brief.extend((version, ttft) for ttft in self._ended)
        self._ended.clear()
        self._encoded.clear()
        return version

    def _encode(self, start: int | None) -> bytes:
        look = self._look
        assert look is not None
        users: dict[str, float | None] = dict.fromkeys(self._users.gone(start))
        users.update(self._users.since(start))
        return compact({
            "version": self._version,
            "since": start,
            "columns": COLUMNS,
            "stats": _clean(look.stats),
            "time": round(look.time, 4),
            **self._more(),
            "users": users,
            "rows": [row for _, row in self._rows.since(start)],
            "gone": self._rows.gone(start),
            "brief": [
                round(ttft, 4) for version, ttft in self._brief
                if start is not None and version > start
            ],
        }).encode()
