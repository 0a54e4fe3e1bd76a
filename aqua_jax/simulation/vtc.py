"""VTC: fair between users by counted tokens, without taking anything off the machine.

Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024, algorithm 2: a counter per
user, charged with what the user was served (a prompt token 1, an output token 2, over the user's
weight); the next request admitted is of the waiting user with the least counter, its oldest first.
A user who comes back is lifted to the least counter of those who wait, or, where nobody does, of
the last one served. What runs goes on; where pages run out the latest admitted is recomputed, as in
the engine that VTC was built into. The policy belongs to this room: it is a baseline.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from aqua_jax.paging.pages import PagePool
from aqua_jax.scheduling.bounds import WaitingBound
from aqua_jax.scheduling.limits import SchedulerConfig
from aqua_jax.scheduling.sequence import Sequence, Standing

PROMPT_COST, OUTPUT_COST = 1.0, 2.0  # the paper's w_p and w_q


class VirtualTokenCounter:
    """Implements `scheduling.policies.Policy`. O(users waiting) to find the head."""

    growth_steps = 0.0
    timeless = False

    def __init__(self, user_weights: Mapping[str, float] | None = None) -> None:
        """`user_weights`: above 0; users not named weigh 1."""
        self._weights = user_weights or {}
        self._queues: dict[str, deque[Sequence]] = {}  # users with waiting requests
        self._counters: dict[str, float] = {}
        self._last = ""  # the user admitted last
        self._admissions: dict[Sequence, int] = {}  # running: in which order they were admitted
        self._charged: dict[Sequence, int] = {}  # tokens counted before: recomputing is free
        self._seen: dict[Sequence, int] = {}
        self._length = 0
        self._number = 0

    def bind(
        self, costs: Any, price: Callable[[Sequence], float],
        keeps: Callable[[], bool] | None, guard: Any,
    ) -> None:
        """Tokens are counted at fixed prices."""

    def push(self, sequence: Sequence) -> None:
        """Queues; a user without waiting requests is lifted first."""
        user = sequence.user
        if user not in self._queues:
            if sequence not in self._charged:
                self._lift(user)
            self._queues[user] = deque()
        queue = self._queues[user]
        if sequence in self._charged:
            self._seen[sequence] = 0
            self._admissions.pop(sequence, None)
            queue.appendleft(sequence)
        else:
            self._charged[sequence] = self._seen[sequence] = 0
            queue.append(sequence)
        self._length += 1

    def _lift(self, user: str) -> None:
        if self._queues:
            least = min(self._counters[other] for other in self._queues)
        else:
            least = self._counters.get(self._last, 0.0)
        self._counters[user] = max(self._counters.get(user, 0.0), least)

    def remove(self, sequence: Sequence) -> None:
        """Unqueues; KeyError or ValueError if it isn't queued."""
        queue = self._queues[sequence.user]
        queue.remove(sequence)
        if not queue:
            del self._queues[sequence.user]
        self._length -= 1

    def head(self, now: float) -> Sequence | None:
        """The oldest request of the waiting user with the least counter."""
        if not self._queues:
            return None
        user = min(self._queues, key=lambda name: (self._counters[name], name))
        return self._queues[user][0]

    def __len__(self) -> int:
        return self._length

    def begin(self, now: float, running: int) -> None:
        """Time doesn't count."""

    def admitted(self, sequence: Sequence) -> None:
        """Notes who was served last."""
        self._last = sequence.user
        self._admissions[sequence] = self._number
        self._number += 1

    def yielding(self, head: Sequence, running: Iterable[Sequence]) -> list[Sequence]:
        """Nobody."""
        return []

    def running_order(self, running: Iterable[Sequence], now: float) -> list[Sequence]:
        """As admitted."""
        return sorted(running, key=self._admissions.__getitem__)

    def victim(self, candidates: Iterator[Sequence]) -> Sequence:
        """The latest admitted."""
        return next(candidates)

    def leaving_next(self, running: Iterable[Sequence]) -> list[Sequence]:
        """Nobody leaves if it can be helped."""
        return []

    def on_service(self, sequence: Sequence, *, tokens: int = 0, price: float = 0.0) -> None:
        """Counts tokens that were not counted before."""
        done = self._seen[sequence] + tokens
        self._seen[sequence] = done
        before = self._charged[sequence]
        if done <= before:
            return
        prompt = max(0, min(done, sequence.prompt_len) - before)
        amount = PROMPT_COST * prompt + OUTPUT_COST * (done - before - prompt)
        self._counters[sequence.user] += (
            amount / sequence.weight / self._weights.get(sequence.user, 1.0)
        )
        self._charged[sequence] = done

    def on_finish(self, sequence: Sequence) -> None:
        """Forgets the request; its user's counter stays."""
        for table in (self._charged, self._seen, self._admissions):
            table.pop(sequence, None)

    def waiting_bound(
        self, limits: SchedulerConfig, pool: PagePool, run_ahead: int = 1,
        dearest: Callable[[int, int], float] | None = None,
    ) -> WaitingBound | None:
        """None: others may run for as long as they like."""
        return None

    def standing(self, sequence: Sequence) -> Standing | None:
        """None: its counters are of users."""
        return None
