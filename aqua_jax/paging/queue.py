"""Moves that were asked for and are in no plan yet, those somebody waits for first."""

from __future__ import annotations

import collections
from collections.abc import Callable

from aqua_jax.paging.moves import Move

# Moves passed over in a plan, at most, because their lender's pace allows no more now.
_LOOKS = 256


class MoveQueue:
    """In order, but for what goes to and from lenders whose pace is used up for the moment."""

    def __init__(self, page_tokens: int) -> None:
        """`page_tokens`: tokens of a page."""
        self._page_tokens = page_tokens
        self._inward: collections.deque[Move] = collections.deque()
        self._outward: collections.deque[Move] = collections.deque()

    def put(self, move: Move) -> None:
        """One more."""
        if move.store.pace is not None:
            move.store.pace.ask(move, move.store.slot_bytes * move.count // self._page_tokens)
        (self._inward if move.inward else self._outward).append(move)

    def take(self, limit: int) -> tuple[Move, ...]:
        """The next ones to hand over."""
        taken: list[Move] = []
        for queue in (self._inward, self._outward):
            waiting: list[Move] = []
            while queue and len(taken) < limit and len(waiting) < _LOOKS:
                move = queue.popleft()
                pace = move.store.pace
                (taken if pace is None or pace.admit(move) else waiting).append(move)
            queue.extendleft(reversed(waiting))
        return tuple(taken)

    def withdraw(self, unwanted: Callable[[Move], bool]) -> list[Move]:
        """Takes out what is not wanted any more."""
        found: list[Move] = []
        for queue in (self._inward, self._outward):
            here = [move for move in queue if unwanted(move)]
            for move in here:
                queue.remove(move)
            found += here
        return found

    def ended(self, move: Move) -> None:
        """A move has ended, be it that it was never handed over."""
        if move.store.pace is not None:
            move.store.pace.ended(move)

    def clear(self) -> None:
        """Forgets what is left; each of them has been `ended`."""
        self._inward.clear()
        self._outward.clear()
