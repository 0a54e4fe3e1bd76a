"""Sets of bytes as few ranges: which part of an arena is free, held, or waiting to be scrubbed."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator

from aqua_jax.errors import StoreError


class Intervals:
    """Half-open ranges [start, end) of integers, apart from each other and sorted.

    Adding what is there already, or removing what isn't, raises `StoreError` and changes nothing:
    that is how double frees and overlapping grants are found.
    """

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        self.total = 0
        for start, end in ranges:
            self.add(start, end)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(list(zip(self._starts, self._ends, strict=True)))

    def __len__(self) -> int:
        return len(self._starts)

    def contains(self, start: int, end: int) -> bool:
        """Whether all of [start, end) is in the set."""
        at = bisect_right(self._starts, start) - 1
        return start < end and at >= 0 and end <= self._ends[at]

    def add(self, start: int, end: int) -> None:
        """Puts in [start, end), none of which may be there."""
        at = bisect_left(self._starts, start)
        if (
            not 0 <= start < end
            or (at > 0 and self._ends[at - 1] > start)
            or (at < len(self._starts) and self._starts[at] < end)
        ):
            raise StoreError(f"cannot add [{start}, {end}): empty, or there already")
        self.total += end - start
        low, high = at, at
        if at > 0 and self._ends[at - 1] == start:
            low, start = at - 1, self._starts[at - 1]
        if at < len(self._starts) and self._starts[at] == end:
            high, end = at + 1, self._ends[at]
        self._starts[low:high], self._ends[low:high] = [start], [end]

    def remove(self, start: int, end: int) -> None:
        """Takes out [start, end), all of which must be there."""
        if not self.contains(start, end):
            raise StoreError(f"cannot remove [{start}, {end}): empty, or not all there")
        at = bisect_right(self._starts, start) - 1
        low, high = self._starts[at], self._ends[at]
        rest = [(a, b) for a, b in ((low, start), (end, high)) if a < b]
        self._starts[at : at + 1] = [a for a, _ in rest]
        self._ends[at : at + 1] = [b for _, b in rest]
        self.total -= end - start

    def take(self, size: int) -> int | None:
        """Takes out the lowest run of `size`; returns its start, None if no range is so long."""
        for start, end in zip(self._starts, self._ends, strict=True):
            if end - start >= size:
                self.remove(start, start + size)
                return start
        return None

    def take_some(self, most: int) -> tuple[int, int] | None:
        """Takes out up to `most` from the end of the highest range; None if the set is empty."""
        if not self._starts or most < 1:
            return None
        start, end = self._starts[-1], self._ends[-1]
        start = max(start, end - most)
        self.remove(start, end)
        return start, end

    @property
    def longest(self) -> int:
        """Length of the longest range."""
        return max((b - a for a, b in zip(self._starts, self._ends, strict=True)), default=0)
