"""The copy queue under a virtual clock: moves of a link one after another, links side by side."""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Iterable

from aqua_jax.errors import ConfigError
from aqua_jax.paging.moves import Move


@dataclasses.dataclass(frozen=True)
class Link:
    """The way between the pool and one store.

    Attributes:
      store: its name.
      store_bytes: memory at its end.
      bytes_per_s: reached in one direction.
      copy_s: what a copy costs besides its bytes.
      duplex: both directions at once at that rate; False: they share it.

    Raises:
      ConfigError: a field is out of range.
    """

    store: str
    store_bytes: int
    bytes_per_s: float
    copy_s: float = 0.0
    duplex: bool = True

    def __post_init__(self) -> None:
        if self.store_bytes < 1:
            raise ConfigError("store_bytes", self.store_bytes, "bytes above 0")
        if not 0.0 < self.bytes_per_s < math.inf:
            raise ConfigError("bytes_per_s", self.bytes_per_s, "a number > 0")
        if not 0.0 <= self.copy_s < math.inf:
            raise ConfigError("copy_s", self.copy_s, "seconds >= 0")


class CopyQueue:
    """Moves handed over with a step begin when the step does, or when their link is free."""

    def __init__(self, links: Iterable[Link], page_tokens: int) -> None:
        self._links = {link.store: link for link in links}
        self._page_tokens = page_tokens
        self._free_at: dict[tuple[str, bool], float] = {}
        self._under_way: list[tuple[float, int, Move]] = []  # a heap: (end, number, move)
        self._count = 0
        self._last_arrival = 0.0
        self.bytes_out = 0
        self.bytes_in = 0
        self.busy_s = 0.0  # of all links together

    def __len__(self) -> int:
        """Moves that have not been reported."""
        return len(self._under_way)

    def hand_over(self, moves: Iterable[Move], begin: float) -> None:
        """Takes the moves of a step that begins then."""
        free_at, under_way, number = self._free_at, self._under_way, self._count
        for move in moves:
            inward, store = move.inward, move.store
            link = self._links[store.name]
            size = move.count * store.slot_bytes // self._page_tokens
            way = (link.store, inward and link.duplex)
            seconds = link.copy_s + size / link.bytes_per_s
            end = free_at.get(way, 0.0)
            end = (begin if begin > end else end) + seconds
            free_at[way] = end
            self.busy_s += seconds
            if inward:
                if end > self._last_arrival:
                    self._last_arrival = end
                self.bytes_in += size
            else:
                self.bytes_out += size
            heapq.heappush(under_way, (end, number, move))
            number += 1
        self._count = number

    def seconds(self, move: Move) -> float:
        """How long the link is busy with a move."""
        link = self._links[move.store.name]
        size = move.count * move.store.slot_bytes // self._page_tokens
        return link.copy_s + size / link.bytes_per_s

    def ended(self, now: float) -> list[Move]:
        """The moves that have ended and were not reported before, in the order of their ends."""
        done = []
        while self._under_way and self._under_way[0][0] <= now:
            done.append(heapq.heappop(self._under_way)[2])
        return done

    def last_end(self) -> float:
        """When the last move ends that was handed over; 0 before the first."""
        return max(self._free_at.values(), default=0.0)

    def last_arrival(self) -> float:
        """The same of the moves into the pool."""
        return self._last_arrival

    def next_end(self) -> float:
        """When the next move ends; infinite when none is under way."""
        return self._under_way[0][0] if self._under_way else math.inf
