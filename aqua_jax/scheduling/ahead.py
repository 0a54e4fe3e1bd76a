"""Copies begun before they are needed: of who comes next, and of those who leave next.

Who causes a copy pays for it, as for those made when somebody gives way or comes back: otherwise a
user whose sequences always find their copies made would be served for less than others.
"""

from __future__ import annotations

from collections.abc import Collection

from aqua_jax.scheduling.cost import Costs
from aqua_jax.scheduling.holdings import Found, Holdings
from aqua_jax.scheduling.limits import SchedulerConfig
from aqua_jax.scheduling.policies import Policy
from aqua_jax.scheduling.room import Room
from aqua_jax.scheduling.sequence import Sequence


class Ahead:
    """Decides what is copied ahead of need, and charges for it."""

    def __init__(
        self, config: SchedulerConfig, policy: Policy, holdings: Holdings, costs: Costs, room: Room
    ) -> None:
        """
        Args:
          config: limits.
          policy: who comes first, and whom service is charged to.
          holdings: of a pool with stores below it.
          costs: what copies cost.
          room: what is left to spare.
        """
        self._config, self._policy, self._holdings = config, policy, holdings
        self._costs, self._room = costs, room

    def begin(
        self, head: Sequence | None, found: Found | None, running: Collection[Sequence]
    ) -> None:
        """Begins copies, for the plan that is about to take them.

        Args:
          head: of the queue, after all admissions of this plan.
          found: its pages, if anybody has looked.
          running: all sequences with a slot.
        """
        costs, pool = self._costs, self._holdings.pool
        if head is not None:
            begun = self._holdings.prefetch(head, self._room.spare(running), found)
            if begun:
                self._policy.on_service(head, price=costs.swap(begun * pool.page_tokens, 0))
        wanted = self._room.reserve(head) - pool.available
        if wanted <= 0:
            return
        limit = min(
            self._config.write_behind_pages, costs.pages_within(self._config.write_behind_share)
        )
        leaving = self._policy.leaving_next(running)
        for sequence, begun in self._holdings.write_behind(leaving, wanted, limit):
            self._policy.on_service(sequence, price=costs.swap(0, begun * pool.page_tokens))
