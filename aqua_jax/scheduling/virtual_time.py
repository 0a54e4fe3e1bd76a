"""Weighted fair queueing in virtual time: who has had the least, and where a newcomer joins.

Every member of a queue has a *vruntime*: the service it was charged, divided by its weight. The
queue has a *clock*: the vruntime of a member that got exactly its share,

    clock += charge / (sum of the members' weights),   clock = max(clock, least vruntime waiting).

This is the virtual time of WF2Q+ (Bennett and Zhang, 1996). A newcomer starts at the clock, not at
the least vruntime as in Linux' CFS: where most members are short-lived, the least vruntime is
always that of a newcomer who has had nothing yet, it never advances, and a stream of newcomers
starves everybody older. The clock advances with every charge, whoever pays it.
"""

from __future__ import annotations

import heapq
from typing import Generic, TypeVar


class Member:
    """Someone who competes in one queue."""

    __slots__ = ("tie", "vruntime", "weight")

    def __init__(self, weight: float, tie: tuple[float, int]) -> None:
        """`tie` orders members of equal vruntime; it must be unique in the queue."""
        self.vruntime = 0.0
        self.weight = weight
        self.tie = tie


M = TypeVar("M", bound=Member)


class VirtualTimeQueue(Generic[M]):
    """Members, some of them waiting. All operations are O(log n), amortised."""

    def __init__(self) -> None:
        self.clock = 0.0
        self.weight = 0.0  # of all members
        self._members = 0
        self._heap: list[tuple[float, tuple[float, int], int, M]] = []
        self._entries: dict[M, int] = {}  # waiting member -> number of its valid heap entry
        self._next = 0

    @property
    def mean_weight(self) -> float:
        """Of all members; there must be one."""
        return self.weight / self._members

    def join(self, member: M, head_start: float = 0.0) -> None:
        """A member begins to compete: at the clock less its head start, in charged units, or
        where it was before if that is later."""
        self.weight += member.weight
        self._members += 1
        member.vruntime = max(member.vruntime, self.clock - head_start / member.weight)

    def leave(self, member: M) -> None:
        """A member stops competing; it must not be waiting."""
        self._members -= 1
        self.weight = self.weight - member.weight if self._members else 0.0

    def charge(self, member: M, amount: float) -> None:
        """Service for a member; a negative amount takes back what was charged in advance."""
        member.vruntime += amount / member.weight
        self.clock += amount / self.weight
        if member in self._entries:
            self._push(member)

    def catch_up(self, member: M, lag: float) -> None:
        """Forgets what a member is behind the clock beyond `lag`: it asked for no more."""
        least = self.clock - lag / member.weight
        if member.vruntime < least:
            member.vruntime = least
            if member in self._entries:
                self._push(member)

    def forgive(self, member: M, lead: float) -> None:
        """Forgets what a member that isn't waiting is ahead of the clock beyond `lead`."""
        member.vruntime = min(member.vruntime, self.clock + lead / member.weight)

    def wait(self, member: M) -> None:
        """A member wants service that it doesn't get."""
        self._push(member)

    def unwait(self, member: M) -> None:
        """It no longer does; KeyError if it wasn't waiting."""
        del self._entries[member]

    def __contains__(self, member: M) -> bool:
        """Whether a member is waiting."""
        return member in self._entries

    def __len__(self) -> int:
        """Members that wait."""
        return len(self._entries)

    def first(self) -> M | None:
        """The waiting member of least vruntime, who is served now; the clock is no less."""
        member = self.peek()
        if member is not None:
            self.clock = max(self.clock, member.vruntime)
        return member

    def peek(self) -> M | None:
        """The waiting member of least vruntime; changes nothing."""
        while self._heap:
            _, _, number, member = self._heap[0]
            if self._entries.get(member) == number:
                return member
            heapq.heappop(self._heap)  # left or re-entered since
        return None

    def _push(self, member: M) -> None:
        self._next += 1
        self._entries[member] = self._next
        heapq.heappush(self._heap, (member.vruntime, member.tie, self._next, member))
        if len(self._heap) > 2 * len(self._entries) + 64:
            self._heap = [e for e in self._heap if self._entries.get(e[3]) == e[2]]
            heapq.heapify(self._heap)
