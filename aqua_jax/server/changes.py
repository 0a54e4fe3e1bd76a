"""Values by key and the versions in which they changed, so that what is new costs no comparison."""

from __future__ import annotations

import collections
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Changes(Generic[K, V]):
    """A dictionary that knows what is newer than a version. Versions only rise.

    Args:
      kept: versions for which is remembered what has gone since.
    """

    def __init__(self, kept: int) -> None:
        self._kept = kept
        self._values: dict[K, V] = {}  # in the order in which the keys came
        self._changed: collections.OrderedDict[K, int] = collections.OrderedDict()
        self._came: dict[K, tuple[int, int]] = {}  # version, and which key it was of all
        self._keys = 0  # that ever came
        self._gone: collections.deque[tuple[int, K, int]] = collections.deque()  # went, key, came

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: K) -> V | None:
        """The present value."""
        return self._values.get(key)

    def put(self, key: K, value: V, version: int) -> None:
        """A key has a new value."""
        if key not in self._values:
            self._came[key] = (version, self._keys)
            self._keys += 1
        self._values[key] = value
        self._changed[key] = version
        self._changed.move_to_end(key)

    def drop(self, key: K, version: int) -> None:
        """A key has gone; nothing happens if it isn't there."""
        if key in self._values:
            del self._values[key], self._changed[key]
            self._gone.append((version, key, self._came.pop(key)[0]))
        while self._gone and self._gone[0][0] <= version - self._kept:
            self._gone.popleft()

    def since(self, version: int | None) -> Iterator[tuple[K, V]]:
        """Keys whose values are newer, those that came first before others; None: all."""
        if version is None:
            return iter(self._values.items())
        newer = []
        for key in reversed(self._changed):
            if self._changed[key] <= version:
                break
            newer.append(key)
        newer.sort(key=self._came.__getitem__)
        return ((key, self._values[key]) for key in newer)

    def gone(self, version: int | None) -> list[K]:
        """Keys of that version that have gone since; some may have come again. No older version
        than the latest that are kept."""
        if version is None:
            return []
        found = []
        for went, key, came in reversed(self._gone):
            if went <= version:
                break
            if came <= version:
                found.append(key)
        return found
