"""A pool of which parts go away and come back, against a model of plain sets."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from aqua_jax.errors import PageError, StaleHandleError
from aqua_jax.paging.pages import FarthestNextUse, PageHandle
from aqua_jax.paging.withdrawal import WithdrawablePool
from tests.scale import scaled

RESERVE, EXTENTS, LENGTH = 3, 3, 2
DIGESTS = [b"a", b"b", b"c", b"d"]


class Machine(RuleBasedStateMachine):
    """Random use of a pool while its extents are withdrawn and restored."""

    handles = Bundle("handles")

    def __init__(self):
        super().__init__()
        self.pool = WithdrawablePool(RESERVE, EXTENTS, LENGTH, 4, FarthestNextUse())
        self.references: dict[PageHandle, int] = {}
        self.digests: dict[PageHandle, bytes] = {}
        self.kept: set[PageHandle] = set()
        self.cached: set[PageHandle] = set()
        self.withdrawn: set[int] = set()
        self.turn = 0

    @property
    def away(self) -> set[int]:
        return self.withdrawn - {handle.id for handle in self.references}

    def free(self) -> set[int]:
        taken = {handle.id for handle in [*self.references, *self.cached]}
        return set(range(self.pool.num_pages)) - taken - self.withdrawn

    def forget(self, handle):
        self.digests.pop(handle, None)
        self.kept.discard(handle)
        self.cached.discard(handle)

    @rule(target=handles, count=st.integers(0, 9))
    def allocate(self, count):
        free, cached = self.free(), set(self.cached)
        pages = self.pool.allocate(count)
        assert (pages is not None) == (count <= len(free) + len(cached))
        if pages is None:
            return ()
        ids = [page.id for page in pages]
        assert len(set(ids)) == count and set(ids) <= free | {handle.id for handle in cached}
        assert not set(ids) & self.withdrawn
        # Zone by zone: what comes first leaves the last extents empty.
        zones = [self.zone(page) for page in ids[: len(free)]]
        assert zones == sorted(zones) and (not zones or max(zones) <= max(map(self.zone, free)))
        for handle in list(self.cached):
            if handle.id in ids:
                self.forget(handle)
        self.references.update((page, 1) for page in pages)
        return tuple(pages)

    @staticmethod
    def zone(page):
        return 0 if page < RESERVE else 1 + (page - RESERVE) // LENGTH

    @rule(handles=handles)
    def retain(self, handles):
        for handle in handles:
            if handle in self.references or handle in self.cached:
                self.pool.retain(handle)
                self.cached.discard(handle)
                self.references[handle] = self.references.get(handle, 0) + 1
            else:
                assert not self.pool.alive(handle)
                with pytest.raises(StaleHandleError):
                    self.pool.retain(handle)

    @rule(handles=handles)
    def release(self, handles):
        for handle in handles:
            if handle not in self.references:
                with pytest.raises((PageError, StaleHandleError)):
                    self.pool.release(handle)
                continue
            self.pool.release(handle)
            self.references[handle] -= 1
            if not self.references[handle]:
                del self.references[handle]
                if handle.id in self.withdrawn:
                    self.forget(handle)
                elif handle in self.digests or handle in self.kept:
                    self.cached.add(handle)

    @rule(handles=handles, digest=st.sampled_from(DIGESTS))
    def identify(self, handles, digest):
        for handle in handles[:1]:
            if handle not in self.references or self.digests.get(handle, digest) != digest:
                continue
            owner = next((h for h, d in self.digests.items() if d == digest), handle)
            assert self.pool.identify(handle, digest) == (owner == handle)
            if owner == handle:
                self.digests[handle] = digest

    @rule(handles=handles)
    def keep(self, handles):
        for handle in handles:
            if handle in self.references:
                self.turn += 1
                self.pool.keep([handle], self.turn)
                self.kept.add(handle)

    @rule(handles=handles)
    def unkeep(self, handles):
        for handle in handles:
            if self.pool.alive(handle):
                self.pool.unkeep(handle)
                self.kept.discard(handle)
                if handle in self.cached and handle not in self.digests:
                    self.cached.discard(handle)

    @rule(extent=st.integers(0, EXTENTS - 1))
    def withdraw(self, extent):
        self.pool.withdraw(extent)
        pages = self.pool.pages_of(extent)
        self.withdrawn |= set(pages)
        for handle in list(self.cached):
            if handle.id in pages:
                self.forget(handle)

    @rule(extent=st.integers(0, EXTENTS - 1), half=st.booleans())
    def restore(self, extent, half):
        pages = list(self.pool.pages_of(extent))[half:]
        if set(pages) <= self.withdrawn:
            self.pool.restore(pages)
            self.withdrawn -= set(pages)
        else:
            with pytest.raises(PageError):
                self.pool.restore([page for page in pages if page not in self.withdrawn])

    @rule(target=handles, handles=handles)
    def move(self, handles):
        """All holders of a page that should leave it go to another one."""
        for old in handles:
            if old not in self.references or old.id not in self.withdrawn:
                continue
            fresh = self.pool.allocate(1)
            if fresh is None:
                return ()
            (new,) = fresh
            for handle in list(self.cached):
                if handle.id == new.id:
                    self.forget(handle)
            with pytest.raises(PageError, match="references"):
                self.pool.move(old, new, self.references[old] + 1)
            self.pool.move(old, new, self.references[old])
            self.references[new] = self.references.pop(old)
            if old in self.digests:
                self.digests[new] = self.digests.pop(old)
            if old in self.kept:
                self.kept.remove(old)
                self.kept.add(new)
            assert not self.pool.alive(old)
            return (new,)
        return ()

    @invariant()
    def same_as_model(self):
        pool = self.pool
        assert (pool.in_use, pool.cached, pool.free, pool.away) == (
            len(self.references), len(self.cached), len(self.free()), len(self.away)
        )
        assert pool.in_use + pool.cached + pool.free + pool.away == pool.num_pages
        assert pool.available == pool.cached + pool.free
        leaving = self.withdrawn - self.away
        assert pool.draining == len(leaving)
        assert pool.usable == pool.num_pages - len(self.withdrawn) >= pool.certain == RESERVE
        for extent in range(EXTENTS):
            assert pool.pending(extent) == len(leaving & set(pool.pages_of(extent)))
        for handle, count in self.references.items():
            assert pool.alive(handle) and pool.references(handle) == count
        for digest in DIGESTS:
            owner = next((h for h, d in self.digests.items() if d == digest), None)
            assert pool.find(digest) == owner


Machine.TestCase.settings = settings(
    max_examples=scaled(80), stateful_step_count=50, deadline=None
)
TestWithdrawablePool = Machine.TestCase


def test_the_last_extents_stay_empty():
    pool = WithdrawablePool(4, 3, 4, 16)
    for _ in range(5):
        pages = pool.allocate(7)
        assert {page.id for page in pages} == set(range(7))
        pool.release_all(pages)
    pool.withdraw(2)
    pool.withdraw(1)
    assert (pool.away, pool.draining, pool.available) == (8, 0, 8)


def test_what_returns_is_handed_out_with_another_generation():
    pool = WithdrawablePool(1, 1, 1, 16)
    first, second = pool.allocate(2)
    pool.identify(second, b"x")
    pool.withdraw(0)
    assert pool.find(b"x") == second  # still good for whoever holds it, and whoever joins
    pool.retain(second)
    pool.release_all([second, second])
    assert pool.find(b"x") is None and pool.away == 1
    assert pool.allocate(1) is None
    pool.restore(pool.pages_of(0))
    (again,) = pool.allocate(1)
    assert (again.id, again.generation) == (second.id, second.generation + 1)
    with pytest.raises(PageError):
        pool.restore([again.id])
    with pytest.raises(PageError):
        pool.restore([first.id])


@pytest.mark.parametrize("sizes", [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_sizes_that_cannot_be(sizes):
    with pytest.raises(PageError, match="cannot be"):
        WithdrawablePool(*sizes, 16)


def test_a_page_that_moves_stays_readable_for_who_left_it():
    """One holder has left and means to come back; the other's page moves, and then it leaves."""
    pool = WithdrawablePool(1, 1, 2, 4, FarthestNextUse())
    (old,) = pool.allocate(1)
    pool.keep([old], 1)
    (new,) = pool.allocate(1)
    pool.move(old, new, 1)
    pool.release(new)
    assert pool.alive(new) and not pool.alive(old)
    pool.retain(new)
    pool.unkeep(new)
    pool.release(new)
    assert not pool.alive(new) and pool.free == 3
