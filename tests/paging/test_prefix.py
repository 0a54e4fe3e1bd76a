"""Prefix caching against a model that compares tokens instead of digests."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from aqua_jax.paging.pages import PagePool
from aqua_jax.paging.prefix import DigestChain, PrefixCache
from tests.scale import scaled

SIZE = 2  # tokens a page: short lists with few distinct tokens share many prefixes

token_lists = st.lists(st.integers(0, 1), max_size=9)
salts = st.sampled_from([b"", b"x"])


class PrefixMachine(RuleBasedStateMachine):
    """Sequences come and go; `content` is what each page holds, by page id, as plain tokens."""

    def __init__(self):
        super().__init__()
        self.pool = PagePool(8, SIZE)
        self.cache = PrefixCache(self.pool)
        self.content: dict[int, tuple] = {}  # page id -> (salt, all tokens up to the page's end)
        self.held = []

    @rule(tokens=token_lists, salt=salts, limit=st.integers(0, 10))
    def begin(self, tokens, salt, limit):
        before = (self.cache.counters.queried, self.cache.counters.hit)
        pages = self.cache.lookup(tokens, salt, limit)
        assert len(pages) * SIZE <= min(limit, len(tokens))
        for index, page in enumerate(pages):
            assert self.content[page.id] == (salt, tuple(tokens[: (index + 1) * SIZE]))
        known = set(self.content.values())
        end = (len(pages) + 1) * SIZE
        if end <= min(limit, len(tokens)):  # the run was not cut short
            assert (salt, tuple(tokens[:end])) not in known
        asked = min(limit, len(tokens))
        assert self.cache.counters.queried == before[0] + asked
        assert self.cache.counters.hit == before[1] + len(pages) * SIZE
        fresh = self.pool.allocate(self.pool.pages_for(len(tokens)) - len(pages))
        if fresh is None:
            self.pool.release_all(pages)
            return
        chain = self.cache.chain(salt)
        chain.extend(tokens)
        for page in fresh:
            self.content.pop(page.id, None)  # evicted
        for index, page in enumerate(fresh, len(pages)):
            if index < len(tokens) // SIZE and self.cache.register(page, chain.digests[index]):
                self.content[page.id] = (salt, tuple(tokens[: (index + 1) * SIZE]))
        self.held.append(pages + fresh)

    @rule(choice=st.integers(0, 100))
    def end(self, choice):
        if self.held:
            self.pool.release_all(self.held.pop(choice % len(self.held)))

    @invariant()
    def no_leak(self):
        assert self.pool.in_use == len(set(itertools.chain.from_iterable(self.held)))
        assert len(set(self.content.values())) == len(self.content)  # each content once


PrefixMachine.TestCase.settings = settings(
    max_examples=scaled(60), stateful_step_count=40, deadline=None
)
TestPrefixMachine = PrefixMachine.TestCase


@given(token_lists, token_lists, salts, salts)
@settings(max_examples=scaled(200), deadline=None)
def test_digests_are_equal_exactly_when_prefixes_are(left, right, left_salt, right_salt):
    chains = [DigestChain(SIZE, left_salt), DigestChain(SIZE, right_salt)]
    chains[0].extend(left)
    chains[1].extend(right)
    for index, (a, b) in enumerate(zip(*(chain.digests for chain in chains), strict=False)):
        end = (index + 1) * SIZE
        assert (a == b) == (left[:end] == right[:end] and left_salt == right_salt)


@given(st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=7), max_size=5))
@settings(max_examples=scaled(100), deadline=None)
def test_a_chain_grows_as_if_hashed_at_once(parts):
    grown, tokens = DigestChain(4), []
    for part in parts:
        tokens = tokens + part
        grown.extend(tokens)
    at_once = DigestChain(4)
    at_once.extend(tokens)
    assert grown.digests == at_once.digests
    assert len(grown.digests) == len(tokens) // 4


def test_a_match_costs_nothing_and_changes_nothing():
    pool = PagePool(4, SIZE)
    cache = PrefixCache(pool)
    chain = cache.chain()
    chain.extend([1, 2, 3, 4])
    pages = pool.allocate(2)
    for page, digest in zip(pages, chain.digests, strict=True):
        cache.register(page, digest)
    pool.release_all(pages)
    assert cache.match(chain, 4) == pages
    assert cache.match(chain, 3) == pages[:1]
    assert (pool.in_use, pool.cached, cache.counters.queried) == (0, 2, 0)
