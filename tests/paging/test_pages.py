"""The page pool against a model that holds its state as plain sets."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, precondition, rule

from aqua_jax.errors import PageError, StaleHandleError
from aqua_jax.paging.pages import LeastRecentlyUsed, PageHandle, PagePool
from tests.scale import scaled


class PoolMachine(RuleBasedStateMachine):
    """Random allocations, retains, releases and digests; the model knows what each should do."""

    handles = Bundle("handles")

    def __init__(self):
        super().__init__()
        self.pool = PagePool(6, 4)
        self.references: dict[PageHandle, int] = {}  # in use
        self.cached: list[PageHandle] = []  # least recently used first
        self.digests: dict[PageHandle, bytes] = {}  # of live content

    def _free(self) -> int:
        return 6 - len(self.references) - len(self.cached)

    @rule(target=handles, count=st.integers(0, 7))
    def allocate(self, count):
        expected = count <= self._free() + len(self.cached)
        evictions = max(0, count - self._free())
        pages = self.pool.allocate(count)
        assert (pages is not None) == expected
        if pages is None:
            return ()
        evicted, self.cached = self.cached[:evictions], self.cached[evictions:]
        for handle in evicted:
            del self.digests[handle]
        assert len({page.id for page in pages}) == count
        in_use = {handle.id for handle in [*self.references, *self.cached]}
        assert not in_use & {page.id for page in pages}
        self.references.update((page, 1) for page in pages)
        return tuple(pages)

    @rule(handles=handles)
    def retain(self, handles):
        for handle in handles:
            if handle in self.references:
                self.pool.retain(handle)
                self.references[handle] += 1
            elif handle in self.cached:
                self.pool.retain(handle)
                self.cached.remove(handle)
                self.references[handle] = 1
            else:
                with pytest.raises(StaleHandleError):
                    self.pool.retain(handle)

    @rule(handles=handles)
    def release(self, handles):
        for handle in handles:
            if handle in self.references:
                self.pool.release(handle)
                self.references[handle] -= 1
                if self.references[handle] == 0:
                    del self.references[handle]
                    if handle in self.digests:
                        self.cached.append(handle)
            else:
                with pytest.raises((PageError, StaleHandleError)):
                    self.pool.release(handle)

    @rule(handles=handles, digest=st.sampled_from([b"a", b"b", b"c", b"d", b"e"]))
    def identify(self, handles, digest):
        for handle in handles[:1]:
            if handle not in self.references or self.digests.get(handle, digest) != digest:
                with pytest.raises((PageError, StaleHandleError)):
                    self.pool.identify(handle, digest)
                continue
            owner = next((h for h, d in self.digests.items() if d == digest), handle)
            assert self.pool.identify(handle, digest) == (owner == handle)
            if owner == handle:
                self.digests[handle] = digest

    @precondition(lambda self: len(self.cached) > 2)
    @rule()
    def forget(self):
        assert self.pool.forget_cached() == len(self.cached)
        self.cached.clear()
        self.digests.clear()

    @invariant()
    def same_as_model(self):
        pool = self.pool
        assert (pool.in_use, pool.cached, pool.free) == (
            len(self.references), len(self.cached), self._free()
        )
        assert pool.in_use + pool.cached + pool.free == pool.num_pages
        assert pool.available == pool.cached + pool.free
        for handle, count in self.references.items():
            assert pool.references(handle) == count
        for digest in (b"a", b"b", b"c", b"d", b"e"):
            owner = next((h for h, d in self.digests.items() if d == digest), None)
            assert pool.find(digest) == owner


PoolMachine.TestCase.settings = settings(
    max_examples=scaled(60), stateful_step_count=40, deadline=None
)
TestPoolMachine = PoolMachine.TestCase


def test_allocation_is_all_or_nothing():
    pool = PagePool(4, 16)
    kept = pool.allocate(3)
    assert pool.allocate(2) is None
    assert (pool.in_use, pool.free) == (3, 1)
    assert pool.allocate(0) == []
    pool.release_all(kept)
    assert pool.free == 4


def test_a_failed_allocation_evicts_nothing():
    pool = PagePool(2, 16)
    first, second = pool.allocate(2)
    pool.identify(first, b"x")
    pool.release(first)
    assert pool.allocate(2) is None
    assert pool.find(b"x") == first
    pool.release(second)


def test_stale_handles_and_double_release():
    pool = PagePool(1, 16)
    (old,) = pool.allocate(1)
    pool.release(old)
    with pytest.raises(PageError, match="more often"):
        pool.release(old)
    with pytest.raises(StaleHandleError, match="content is gone"):
        pool.retain(old)
    (new,) = pool.allocate(1)
    assert new.id == old.id
    for use in (pool.retain, pool.release, pool.references):
        with pytest.raises(StaleHandleError, match="generation"):
            use(old)
    with pytest.raises(PageError, match="not in a pool"):
        pool.release(PageHandle(1, 0))


def test_evicts_the_tail_of_a_prefix_before_its_head():
    pool = PagePool(3, 16)
    pages = pool.allocate(3)
    for index, page in enumerate(pages):
        pool.identify(page, bytes([index]))
    pool.release_all(pages)
    pool.allocate(1)
    assert [pool.find(bytes([i])) is not None for i in range(3)] == [True, True, False]


def test_identifying_twice_keeps_the_older_page():
    pool = PagePool(2, 16)
    old, new = pool.allocate(2)
    assert pool.identify(old, b"x") and pool.identify(old, b"x")
    assert not pool.identify(new, b"x")
    pool.release(new)
    assert (pool.free, pool.cached) == (1, 0)
    with pytest.raises(PageError, match="cannot change"):
        pool.identify(old, b"y")


def test_the_order_of_eviction_can_be_replaced():
    class MostRecentlyUsed(LeastRecentlyUsed):
        def take(self, count):
            return [self._pages.popitem(last=True)[0] for _ in range(count)]

    pool = PagePool(2, 16, MostRecentlyUsed())
    first, second = pool.allocate(2)
    for page, digest in ((first, b"first"), (second, b"second")):
        pool.identify(page, digest)
        pool.release(page)
    pool.allocate(1)
    assert pool.find(b"first") == first
    assert pool.find(b"second") is None


@pytest.mark.parametrize("num_pages, page_tokens", [(0, 16), (4, 0), (-1, 16)])
def test_impossible_pools_are_refused(num_pages, page_tokens):
    with pytest.raises(PageError):
        PagePool(num_pages, page_tokens)
    with pytest.raises(PageError):
        PagePool(1, 1).allocate(-1)


def test_pages_for_rounds_up():
    pool = PagePool(8, 16)
    assert [pool.pages_for(n) for n in (0, 1, 16, 17, 32)] == [0, 1, 1, 2, 2]
