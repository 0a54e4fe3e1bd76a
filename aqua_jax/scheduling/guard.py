"""The thrash guard: how much of the machine's time changing places may take.

Whoever gives way is copied to a store and back, or computed again. Neither brings a token, so with
short slices, a slow link or a pool that is far too small, a scheduler could do little else:
recomputing over slices of 5 steps, a burst of 64 x (256 in, 256 out) with a pool for 8 spends 97%
of its tokens on it, and is 12 times slower (modelled: scripts/admission.py --policies). The guard
keeps budgets. Every token computed for the first time earns a part of its time, `share / (1 -
share)` in all; every change of places spends what it costs. So `share` of all time goes into
changing places, at most, and what some thousand tokens take, once.

There are two budgets, for neither may use up the other's.

- *Turns* are a choice, and get a third of it. `fair` takes those that the budget affords, so slices
  get longer with what a switch costs; `priority`, for which waiting is worse, those that it bears
  with some slack.
- *Shortages* are none: pages run short, and somebody has to go. While the budget is overdrawn,
  admissions leave room to grow even where stores make giving way cheap as a rule; when it is by
  more than some slack, they leave room for all that those who run may ever ask for, and nobody has
  to go again (`Room.growth`). (Without the slack, a burst of 64 x (64 in, 512 out) lost 4% of its
  throughput under `fcfs`: batches got smaller as soon as a few had given way in a row.)

Unit: the time of one decode token, as in `cost.py`.
"""

from __future__ import annotations

import math

from aqua_jax.scheduling.cost import Costs
from aqua_jax.scheduling.sequence import Sequence

# What so many decodes earn is
_FIRST = 1_000.0  # a budget at the start,
_MOST = 100_000.0  # at most, and
_SLACK = 10_000.0  # what it may be overdrawn by.


class Budget:
    """What changing places may cost, for one reason."""

    def __init__(self, rate: float) -> None:
        """`rate`: what a decode earns; infinite: no bound."""
        self.rate = rate
        self.left = _FIRST * rate  # negative: overdrawn
        self._most, self._slack = _MOST * rate, _SLACK * rate

    @property
    def overdrawn(self) -> float:
        """What was spent beyond what was earned."""
        return max(0.0, -self.left)

    @property
    def alarming(self) -> bool:
        """Whether that is more than some slack."""
        return self.left < -self._slack

    @property
    def bounds(self) -> bool:
        """Whether `affords` may ever say no."""
        return self.rate < math.inf

    def earn(self, worth: float) -> None:
        """Tokens were computed for the first time, which took so long."""
        if worth and self.left < self._most:
            self.left = min(self.left + self.rate * worth, self._most)

    def spend(self, price: float) -> None:
        """A change of places costs so much (negative: less than was charged before)."""
        self.left -= price

    def affords(self, price: float) -> bool:
        """Whether it may cost so much. What is dearer than all that can be saved up, such as the
        longest contexts recomputed, full savings afford."""
        return price <= self.left or self.left >= self._most

    def bears(self, price: float) -> bool:
        """Whether it may, if the slack is used."""
        return self.affords(price - self._slack)


class Guard:
    """The budgets.

    Attributes:
      turns: of changes that a policy chooses.
      shortages: of those that it doesn't.
    """

    def __init__(self, share: float, costs: Costs) -> None:
        """
        Args:
          share: of all time, above 0; 1: no bound.
          costs: what was measured so far.
        """
        self._costs = costs
        rate = share / (1.0 - share) if share < 1.0 else math.inf
        self.turns, self.shortages = Budget(rate / 3.0), Budget(rate * 2.0 / 3.0)

    def earn(self, prompt_tokens: int, decodes: int) -> None:
        """Tokens were computed for the first time."""
        worth = self._costs.prefill * prompt_tokens + decodes
        self.turns.earn(worth)
        self.shortages.earn(worth)

    def stats(self) -> dict[str, float | None]:
        """What may be spent now, in decode tokens; None: without end."""
        budgets = {"turn_budget": self.turns, "shortage_budget": self.shortages}
        return {name: one.left if one.bounds else None for name, one in budgets.items()}

    def gave_way(self, sequence: Sequence, turn: bool) -> None:
        """A sequence gives way, which is to cost its `switch_price`; or it did, and less arrived
        than was to."""
        self._budget(turn).spend(sequence.switch_price)
        sequence.gave_turn = turn
        sequence.num_dropped = sequence.num_computed
        sequence.num_reached = max(sequence.num_reached, sequence.num_computed)

    def came_back(self, sequence: Sequence) -> int:
        """A sequence, new or not, has its place. Where all was to be lost, what isn't was paid for;
        where nothing was, what is was not.

        Returns:
          Tokens that will be computed again.
        """
        dropped = sequence.num_dropped
        if not dropped:
            return 0
        lost = max(0, dropped - sequence.num_computed)
        owed = sequence.switch_price * (lost / dropped - 1.0)
        if sequence.swapped:
            owed = self._costs.recompute(lost)
        self._budget(sequence.gave_turn).spend(owed)
        sequence.num_lost += lost
        sequence.num_dropped = 0
        return lost

    def _budget(self, turn: bool) -> Budget:
        return self.turns if turn else self.shortages
