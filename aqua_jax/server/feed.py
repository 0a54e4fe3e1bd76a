"""The state of the engine for those who watch: whole at first, then what has changed.

Of two thousand live requests a few dozen change between two looks. Sending only those makes a look
cheap for the watcher, who needn't parse the others again, and for the event loop, which needn't
encode them.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

from aqua_jax.engine.async_engine import AsyncEngine
from aqua_jax.engine.inspect import inspect
from aqua_jax.server.answers import compact
from aqua_jax.server.snapshots import Snapshot

_KEPT = 16  # versions that a watcher may have seen last

Key = tuple[Any, ...]  # request and sample: the first two columns


@dataclasses.dataclass(frozen=True)
class _Version:
    number: int
    state: Mapping[str, Any]  # all but the rows
    rows: dict[Key, tuple[Any, ...]]


def _rounded(value: Any) -> Any:
    """Short numbers, and null for what JSON can't write."""
    if not isinstance(value, float):
        return value
    return round(value, 4) if math.isfinite(value) else None


class StateFeed:
    """Versions of what `inspect` says, and the differences between them.

    Args:
      engine: looked into.
      more: further entries of each answer.
    """

    def __init__(self, engine: AsyncEngine, more: Callable[[], Mapping[str, Any]]) -> None:
        self._more = more
        # A watcher of the process before this one has seen no version of ours.
        self._next = int(time.time() * 1000)
        self._versions: collections.OrderedDict[int, _Version] = collections.OrderedDict()
        self._encoded: dict[int | None, bytes] = {}  # of the latest version, by what it starts from
        self._snapshot = Snapshot(engine, inspect, self._add)

    async def get(self, since: int | None) -> tuple[int, bytes] | None:
        """The latest version and its state as JSON, or None when the engine doesn't answer.

        Args:
          since: version that the asker has seen last. If it is still known, "rows" holds only the
            rows that are new or have changed, "gone" the [request, sample] of those that have
            ended, and "since" repeats it; else "since" is null and all rows are there.
        """
        latest = await self._snapshot.get()
        if latest is None:
            return None
        base = None if since is None else self._versions.get(since)
        start = None if base is None else base.number
        if start not in self._encoded:
            self._encoded[start] = self._encode(latest, base)
        return latest.number, self._encoded[start]

    def _add(self, state: dict[str, Any]) -> _Version:
        rows = {row[:2]: row for row in state.pop("rows")}
        version = _Version(self._next, state, rows)
        self._next += 1
        self._versions[version.number] = version
        if len(self._versions) > _KEPT:
            self._versions.popitem(last=False)
        self._encoded.clear()
        return version

    def _encode(self, latest: _Version, base: _Version | None) -> bytes:
        before = {} if base is None else base.rows
        return compact({
            "version": latest.number,
            "since": None if base is None else base.number,
            **latest.state,
            **self._more(),
            "users": {name: _rounded(value) for name, value in latest.state["users"].items()},
            "rows": [
                [_rounded(value) for value in row]
                for key, row in latest.rows.items() if before.get(key) != row
            ],
            "gone": [key for key in before if key not in latest.rows],
        }).encode()
