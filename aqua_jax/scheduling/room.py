"""Who has to go so that somebody else fits, and at what cost: arithmetic that changes nothing."""

from __future__ import annotations

from collections.abc import Iterable

from aqua_jax.scheduling.cost import Costs
from aqua_jax.scheduling.guard import Guard
from aqua_jax.scheduling.holdings import Found, Holdings
from aqua_jax.scheduling.limits import SchedulerConfig
from aqua_jax.scheduling.policies import Policy
from aqua_jax.scheduling.sequence import Sequence
from aqua_jax.scheduling.slots import Slots

AHEAD_STEPS = 3  # a copy handed over now has ended, and is known to have, after two or three


class Room:
    """Pages and slots as the scheduler counts them."""

    def __init__(
        self, config: SchedulerConfig, policy: Policy, holdings: Holdings, costs: Costs,
        slots: Slots, guard: Guard,
    ) -> None:
        self._config, self._policy, self._holdings = config, policy, holdings
        self._costs, self._slots, self._guard = costs, slots, guard
        self._pool, self._residency = holdings.pool, holdings.residency
        # In this plan:
        self.bold = self._residency is not None  # running short costs little
        self.careful = False  # running short has cost too much

    def begin(self) -> None:
        """A plan begins."""
        self.careful = self._guard.shortages.alarming
        self.bold = self._guard.shortages.left >= 0.0 and self.keeps()

    @property
    def copies(self) -> int:
        """Page copies inside the pool that one plan has room for."""
        return self._config.max_num_seqs

    # These two sum up over everyone who runs in each plan: plain loops, 0.2 us a sequence.

    def needs(self, sequences: Iterable[Sequence], steps: int = AHEAD_STEPS) -> int:
        """Pages that running sequences will ask for in so many steps; by default, before a copy
        begun now has ended."""
        size, pages = self._pool.page_tokens, 0
        for one in sequences:
            soon = len(one.tokens) + one.num_inflight + steps
            if soon >= one.max_total_tokens:
                soon = one.max_total_tokens - 1
            missing = -(-soon // size) - len(one.pages)
            if missing > 0:
                pages += missing
        return pages

    def spare(self, running: Iterable[Sequence]) -> int:
        """Pages that may be filled for whoever comes next. They can't be had back before they have
        arrived, and room is made a few steps before it is needed: what is fetched ahead must not
        make anybody go. (Simulated, in sum over twelve seeds, this saves 9% of the bytes of
        ShareGPT-like lengths over slices of 1,280 steps, 2% of Azure's, and 0.4% to 5% over slices
        of 5 and 40.)"""
        ahead = AHEAD_STEPS + self._config.move_steps
        return self._pool.available - self.needs(running, ahead)

    def growth(self, sequences: Iterable[Sequence]) -> int:
        """Pages that sequences will ask for soon: in their next `growth_tokens` tokens, or, under a
        policy with slices, in a whole slice if that is longer, counted from the pages they have.
        With room in stores, in their next `swap_growth_tokens`: running short costs little then.
        When that has cost too much, in all that they may ever ask for: nobody has to go again."""
        size, slice_steps, pages = self._pool.page_tokens, int(self._policy.growth_steps), 0
        horizon = max(self._config.growth_tokens, slice_steps)
        if self.bold:
            horizon = self._config.swap_growth_tokens
        elif self.careful:
            horizon = self._config.max_model_len
        for one in sequences:
            known = len(one.tokens) + one.num_inflight
            soon = known + horizon
            if soon >= one.max_total_tokens:
                soon = one.max_total_tokens - 1
            held = len(one.pages) if slice_steps else 0
            missing = -(-soon // size) - (held or -(-known // size))
            if missing > 0:
                pages += missing
        return pages

    def victims(
        self, head: Sequence, found: Found, demand: int, yielding: Iterable[Sequence],
        wishes: tuple[int, ...],
    ) -> list[Sequence]:
        """The first of `yielding`, as many as must go so that `head`, which demands so many pages,
        fits and so many are left as the first of `wishes` that can be had; none if it fits without,
        or not even when all go: then nobody goes, and what comes free is kept for it."""
        parent = head.parent
        if parent is None:
            return self._enough(found, demand, yielding, wishes)
        everyone = list(yielding)
        others = [sequence for sequence in everyone if sequence is not parent]
        for wish in wishes:
            victims = self._enough(found, demand, others, (wish,))
            if not victims and parent in everyone:  # it goes too, and there is nothing to share
                alone = self._pool.pages_for(head.total_len)
                victims = self._enough(Found([], 0), alone, everyone, (wish,))
            if victims:
                return victims
        return []

    def _enough(
        self, found: Found, demand: int, yielding: Iterable[Sequence], wishes: tuple[int, ...]
    ) -> list[Sequence]:
        missing = demand - self._holdings.available
        least = len(wishes)  # wishes from here on are granted by the first `count` of `going`
        going: list[Sequence] = []
        count = 0
        if self._slots.available:
            while least and missing + wishes[least - 1] <= 0:
                least -= 1
        for victim, gain in self._holdings.freed_by(yielding, found.shared) if least else ():
            missing -= gain + self.growth((victim,))
            going.append(victim)
            while least and missing + wishes[least - 1] <= 0:
                least, count = least - 1, len(going)
            if not least:
                break
        return going[:count]

    @property
    def switches(self) -> int:
        """Sequences that may give way in a plan to who comes back; all can within a slice."""
        config, slice_steps = self._config, self._policy.growth_steps
        ending = -(-config.max_num_seqs // int(slice_steps)) if slice_steps else 0
        return max(config.max_switches, ending)

    def headroom(self, sequence: Sequence, growth: int) -> int:
        """Pages an admission must leave: `growth`; for newcomers none while stores have room."""
        return 0 if self.bold and sequence.preemptions == 0 else growth

    def reserve(self, head: Sequence | None) -> int:
        """Pages that should come free at once: those of a step full of prompts, that newcomers may
        bring any moment, and those of the one who waits."""
        waits = 0 if head is None else self._pool.pages_for(head.total_len)
        return 2 * self._pool.pages_for(self._config.max_step_tokens) + waits

    def newcomers(self, head: Sequence, demand: int, count: int) -> int:
        """Pages that the other newcomers, of `count` in all, may need, as far as a step has room
        for their prompts; 0 if the head is none. Nobody looks how long their prompts are; each
        demands what the head does, then. Copying victims out for one newcomer at a time cost the
        last ones of a burst of 64 two steps each."""
        if self._residency is None or head.preemptions:
            return 0
        fitting = self._config.max_step_tokens // head.total_len
        return max(0, min(count, fitting) - 1) * demand

    def swaps(self, computed: int, unsaved: int) -> bool:
        """Whether copying out and back is cheaper than recomputing."""
        return (
            self._residency is not None and computed > 0 and self._residency.usable
            and self._costs.swap(computed, unsaved) <= self._costs.recompute(computed)
        )

    def keeps(self, pages: int = 0) -> bool:
        """Whether stores have room for so many pages; 0: for what a step full of prompts may send
        there."""
        wanted = pages or min(
            self._pool.pages_for(self._config.max_step_tokens), self._pool.num_pages
        )
        for store in () if self._residency is None else self._residency.tiers.stores:
            wanted -= 0 if store.lost else store.free_slots
            if wanted <= 0:
                return True
        return False

    def price(self, sequence: Sequence) -> float:
        """What it costs the others when a sequence gives way, in decode tokens."""
        computed = sequence.num_computed
        unsaved = self._holdings.unsaved(sequence, computed)
        kept = not unsaved or self.keeps(self._pool.pages_for(unsaved))
        if kept and self.swaps(computed, unsaved):
            return self._costs.swap(computed, unsaved)
        return self._costs.recompute(computed)

    def dearest(self, tokens: int, pages: int) -> float:
        """The most that a switch costs, in decode tokens, while stores keep what they took.

        Args:
          tokens: of the longest sequence.
          pages: of all sequences, at their longest; if stores can't hold so many, some are
            recomputed.
        """
        stores = () if self._residency is None else self._residency.tiers.stores
        capacity = sum(store.capacity for store in stores if not store.lost)
        swap, again = self._costs.swap(tokens, tokens), self._costs.recompute(tokens)
        return swap if pages <= capacity and swap <= again else again
