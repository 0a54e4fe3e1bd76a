"""The lender's books against a model that knows the state and the content of every page."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from aqua_jax.errors import ConfigError, ProtocolError, StaleHandleError
from aqua_jax.memory.arena import PAGE
from aqua_jax.memory.grants import Grants
from tests.scale import scaled

PAGES = 12
OWNERS = st.integers(1, 3)


class GrantsMachine(RuleBasedStateMachine):
    """Every page is free, dirty, withheld, or held by a generation; free pages are zero."""

    def __init__(self):
        super().__init__()
        self.grants = Grants(PAGES * PAGE)
        self.state: list = ["free"] * PAGES
        self.zero = [True] * PAGES
        self.owners: dict[int, int] = {}  # generation -> owner, of all grants ever
        self.quarantined: set[int] = set()  # generations
        self.keep: dict[int, int] = {}  # what owners were last told

    def _held(self, generation):
        return [page for page in range(PAGES) if self.state[page] == generation]

    @rule(owner=OWNERS, pages=st.integers(1, 7), odd=st.integers(0, PAGE - 1))
    def grant(self, owner, pages, odd):
        runs = [
            start for start in range(PAGES - pages + 1)
            if self.state[start : start + pages] == ["free"] * pages
        ]
        grant = self.grants.grant(owner, pages * PAGE - odd)
        assert (grant is None) == (not runs)
        if grant is None:
            return
        assert grant.offset == runs[0] * PAGE and grant.size == pages * PAGE
        assert grant.generation not in self.owners
        self.owners[grant.generation] = owner
        for page in range(runs[0], runs[0] + pages):
            assert self.zero[page], "somebody else's bytes"
            self.state[page], self.zero[page] = grant.generation, False

    @rule(owner=OWNERS, generation=st.integers(0, 12), start=st.integers(0, PAGES),
          pages=st.integers(1, 4), odd=st.sampled_from([0, 0, 0, 100]))
    def give_back(self, owner, generation, start, pages, odd):
        wanted = list(range(start, start + pages))
        ours = self.owners.get(generation) == owner
        if ours and set(wanted) <= set(self._held(generation)) and not odd:
            self.grants.give_back(owner, generation, start * PAGE, pages * PAGE)
            for page in wanted:
                self.state[page] = "dirty"
            return
        gone = generation in self.owners and not self._held(generation)
        with pytest.raises(StaleHandleError if gone else ProtocolError):
            self.grants.give_back(owner, generation, start * PAGE + odd, pages * PAGE)

    @rule(owner=OWNERS)
    def exits(self, owner):
        pages = [p for g, o in self.owners.items() if o == owner for p in self._held(g)]
        assert self.grants.exited(owner) == len(pages) * PAGE
        for page in pages:
            self.state[page] = "dirty"

    @rule(owner=OWNERS)
    def cannot_be_reached(self, owner):
        held = {g for g, o in self.owners.items() if o == owner and self._held(g)}
        assert self.grants.quarantine(owner) == sum(len(self._held(g)) for g in held) * PAGE
        self.quarantined |= held

    @rule(most=st.integers(1, PAGES))
    def scrub(self, most):
        taken = self.grants.next_dirty(most * PAGE)
        assert (taken is None) == ("dirty" not in self.state)
        if taken:
            for page in range(taken[0] // PAGE, taken[1] // PAGE):
                assert self.state[page] == "dirty"
                self.state[page], self.zero[page] = "free", True
            self.grants.scrubbed(*taken)

    @rule(limit=st.integers(0, PAGES), fails=st.booleans())
    def resize(self, limit, fails):
        self.grants.resize(limit * PAGE)
        while (taken := self.grants.next_to_withhold()) is not None:
            for page in range(taken[0] // PAGE, taken[1] // PAGE):
                assert self.state[page] in ("dirty", "free")
                self.state[page], self.zero[page] = "withheld", True
        while (taken := self.grants.next_to_restore()) is not None:
            if fails:
                self.grants.not_restored(*taken)
                continue
            for page in range(taken[0] // PAGE, taken[1] // PAGE):
                assert self.state[page] == "withheld"
                self.state[page] = "free"
            self.grants.restored(*taken)
        if not fails:
            assert self.state.count("withheld") <= PAGES - limit
            spare = self.state.count("free") + self.state.count("dirty")
            assert not spare or self.state.count("withheld") == PAGES - limit

    @precondition(lambda self: self.owners)
    @rule()
    def ask(self):
        for grant in self.grants.ask():
            assert not grant.quarantined
            self.keep[grant.generation] = grant.keep
        wanted = {g.generation: g.wanted for g in self.grants.all() if not g.quarantined}
        for grant in self.grants.all():
            if not grant.quarantined:
                assert grant.keep == self.keep.get(grant.generation, grant.size)
        spare = PAGE * sum(state in ("free", "dirty", "withheld") for state in self.state)
        need = max(0, PAGES * PAGE - self.grants.limit - spare)
        reachable = sum(g.held.total for g in self.grants.all() if not g.quarantined)
        assert sum(wanted.values()) == min(need, reachable)
        # The newest first: at most one grant is asked for a part, all newer ones for everything.
        order = [g for g in reversed(self.grants.all()) if not g.quarantined]
        partly = [0 < g.wanted < g.held.total for g in order]
        asked = [g.wanted > 0 for g in order]
        assert sum(partly) <= 1 and asked == sorted(asked, reverse=True)

    @invariant()
    def books_are_true(self):
        grants = self.grants
        for name, ranges in (
            ("free", grants.free), ("dirty", grants.dirty), ("withheld", grants.withheld)
        ):
            pages = {p for a, b in ranges for p in range(a // PAGE, b // PAGE)}
            assert pages == {p for p in range(PAGES) if self.state[p] == name}
        seen = {g.generation: g for g in grants.all()}
        assert set(seen) == {g for g in self.owners if self._held(g)}
        for generation, grant in seen.items():
            pages = [p for a, b in grant.held for p in range(a // PAGE, b // PAGE)]
            assert pages == self._held(generation)
            assert grant.quarantined == (generation in self.quarantined)
        total = grants.free.total + grants.dirty.total + grants.withheld.total + grants.held
        assert total == grants.size


GrantsMachine.TestCase.settings = settings(
    max_examples=scaled(60), stateful_step_count=40, deadline=None
)
TestGrantsMachine = GrantsMachine.TestCase


def test_limits_beyond_the_arena_are_refused():
    grants = Grants(4 * PAGE)
    for limit in (-1, 4 * PAGE + 1):
        with pytest.raises(ConfigError):
            grants.resize(limit)
    assert grants.limit == 4 * PAGE
