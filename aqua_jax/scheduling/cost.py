"""What computing and moving cost on this machine, measured while it runs.

Whoever gives way is either copied to a store and back, or recomputed. Copies run beside the steps
and cost them a part of their time, in memory bandwidth and cores; recomputing costs all of it. What
is cheaper depends on the model (bytes and work of a token), the tier, and what is in a store
already, so it is decided from running means of what was measured.

Unit of price: the time of one decode token, so that policies can add it to tokens served.
"""

from __future__ import annotations

import dataclasses
import math

from aqua_jax.errors import ConfigError

_NEWEST = 0.05  # weight of the newest observation in the running means
# A copy counts as so many times the mean at most: a worker that is taken off its core in the middle
# of one takes hundreds of times as long, and pages seemed 15 times as dear for 50 steps after.
_LONGEST_COPY = 4.0
_PATIENCE = 0.25
_UNKNOWN_PAGES = 32
_MIN_PREFILL = 8  # prompt tokens that a step must have to tell what one costs


@dataclasses.dataclass(frozen=True)
class CostConfig:
    """What is assumed before anything is measured.

    Raises:
      ConfigError: a field is out of range.
    """

    prefill_tokens: float = 0.25  # price of one prompt token, in decode tokens
    moved_page: float = 0.5  # price of moving a page once, in decode tokens
    page_s: float = 0.0  # seconds of moving it, for when a decode's are known; 0: no idea
    # The part of a copy's time that the steps beside it lose. Between 0 (their memory and cores are
    # not shared) and 1 (nothing overlaps); `scripts/move_rates.py` measures it.
    interference: float = 0.5
    transit_steps: float = 2.0  # from a sequence's readmission to its first step

    def __post_init__(self) -> None:
        for field in ("prefill_tokens", "moved_page"):
            if not 0 < getattr(self, field) < math.inf:
                raise ConfigError(field, getattr(self, field), "a number > 0")
        if not 0 <= self.page_s < math.inf:
            raise ConfigError("page_s", self.page_s, "seconds >= 0")
        if not 0 <= self.transit_steps < math.inf:
            raise ConfigError("transit_steps", self.transit_steps, "a number >= 0")
        if not 0 <= self.interference <= 1:
            raise ConfigError("interference", self.interference, "from 0 to 1")


class Costs:
    """Running means of step and copy times, and the prices that follow."""

    def __init__(self, page_tokens: int, config: CostConfig | None = None) -> None:
        self.config = config or CostConfig()
        self.page_tokens = page_tokens
        self._decode_step_s = 0.0  # a step without prompts
        self._decode_s = 0.0  # of it, per token
        self._prefill_s = 0.0  # per token
        self._page_s = 0.0  # of one page, one way
        self._delay_s = 0.0  # of a page, by the bandwidth that lenders allow
        self._transit = 0.0  # steps from a sequence's readmission to its first in the batch

    def observe_step(self, prefill: int, decodes: int, seconds: float) -> None:
        """A step of so many prompt tokens and decodes took so long."""
        if seconds <= 0.0:
            return
        if prefill == 0 and decodes:
            self._decode_step_s = _mean(self._decode_step_s, seconds)
            self._decode_s = _mean(self._decode_s, seconds / decodes)
        elif prefill >= _MIN_PREFILL:
            alone = seconds - (self._decode_step_s if decodes else 0.0)
            if alone > 0.0:
                self._prefill_s = _mean(self._prefill_s, alone / prefill)

    def observe_moves(self, pages: float, seconds: float) -> None:
        """Copying so many pages (whole ones, in sum) kept a worker busy for so long."""
        if pages > 0.0 and seconds > 0.0:
            page_s = seconds / pages
            if self._page_s:
                page_s = min(page_s, _LONGEST_COPY * self._page_s)
            self._page_s = _mean(self._page_s, page_s)

    def delay_moves(self, seconds: float) -> None:
        """A page comes and goes no faster than in so many seconds: lenders allow no more."""
        self._delay_s = seconds

    def observe_return(self, steps: int) -> None:
        """So many steps after it was given pages a sequence was in a step again."""
        self._transit = _mean(self._transit, float(steps))

    @property
    def switch_steps(self) -> float:
        """Decode steps that pages are of no use to anybody when they change hands."""
        return self._transit or float(self.config.transit_steps)

    @property
    def patience_s(self) -> float:
        """What the host may wait for copies while a step runs, and still be far ahead of it."""
        return _PATIENCE * self._decode_step_s

    def pages_within(self, share: float) -> int:
        """Pages that can be copied in that share of a decode step; a few if that isn't known."""
        page_s = self._page_s or self.config.page_s
        if not page_s or not self._decode_step_s:
            return _UNKNOWN_PAGES
        return int(share * self._decode_step_s / page_s)

    @property
    def prefill(self) -> float:
        """Price of a prompt token."""
        if not self._prefill_s or not self._decode_s:
            return self.config.prefill_tokens
        return self._prefill_s / self._decode_s

    @property
    def page(self) -> float:
        """Price of moving a page one way."""
        page_s = self._page_s or self.config.page_s
        if not page_s or not self._decode_s:
            return self.config.moved_page
        return self.config.interference * page_s / self._decode_s

    def recompute(self, tokens: int) -> float:
        """Price of computing tokens again."""
        return self.prefill * tokens

    def swap(self, tokens: int, unsaved: int) -> float:
        """Price of copying `unsaved` tokens out and `tokens` back, and, where lenders slow copies
        down, of a place in the batch that stays empty until they are here."""
        delay = self._delay_s / self._decode_step_s if self._decode_step_s else 0.0
        return (self.page + delay) * (tokens + unsaved) / self.page_tokens


def _mean(old: float, new: float) -> float:
    return new if old == 0.0 else old + _NEWEST * (new - old)
