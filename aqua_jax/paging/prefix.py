"""Prefix caching: full pages found by the tokens they hold and all the tokens before them.

A page's digest is a chained hash, `H(parent digest, tokens of the page)`, whose chain starts from
the salt (whatever else the KV depends on: the adapter, the tenant). So equal digests mean equal
salt and equal tokens from position 0 to the end of the page, and nothing else needs comparing.
blake2b with 16 bytes: a collision among 2^40 pages has probability 2^-49. The idea is vLLM's and
SGLang's; the chain is kept on the sequence and only ever extended, because hashing 10,000 tokens
anew in each step would cost about a millisecond.
"""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Sequence
from hashlib import blake2b

from aqua_jax.paging.pages import PageHandle, PagePool

_DIGEST_BYTES = 16


class DigestChain:
    """The digests of the full pages of one growing list of tokens."""

    def __init__(self, page_tokens: int, salt: bytes = b"") -> None:
        self._page_tokens = page_tokens
        self._root = blake2b(salt, digest_size=_DIGEST_BYTES).digest()
        self.digests: list[bytes] = []  # one for each full page

    def extend(self, tokens: Sequence[int]) -> None:
        """Hashes the pages that became full; `tokens` is the whole list, which only grew."""
        size = self._page_tokens
        parent = self.digests[-1] if self.digests else self._root
        for start in range(len(self.digests) * size, len(tokens) - size + 1, size):
            page = array("q", tokens[start : start + size]).tobytes()
            parent = blake2b(parent + page, digest_size=_DIGEST_BYTES).digest()
            self.digests.append(parent)


@dataclasses.dataclass
class PrefixCounters:
    """What lookups asked for and found, in tokens, since the start."""

    queried: int = 0
    hit: int = 0


class PrefixCache:
    """Finds the pages of a pool that already hold the beginning of a sequence."""

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self.counters = PrefixCounters()

    def chain(self, salt: bytes = b"") -> DigestChain:
        """An empty chain that fits this cache's pages."""
        return DigestChain(self._pool.page_tokens, salt)

    def match(self, chain: DigestChain, max_tokens: int, first: int = 0) -> list[PageHandle]:
        """The longest run of whole pages known from page `first` on, within `max_tokens` tokens.

        Neither retained nor counted: a caller that has to wait for memory may ask at each step.
        """
        return self._pool.find_run(chain.digests[first : max_tokens // self._pool.page_tokens])

    def lookup(
        self, tokens: Sequence[int], salt: bytes = b"", max_tokens: int | None = None
    ) -> list[PageHandle]:
        """`match` from plain tokens; the pages are retained and the hit is counted."""
        chain = self.chain(salt)
        chain.extend(tokens)
        limit = len(tokens) if max_tokens is None else max_tokens
        handles = self.match(chain, limit)
        self._pool.retain_all(handles)
        self.count(min(limit, len(tokens)), len(handles) * self._pool.page_tokens)
        return handles

    def register(self, handle: PageHandle, digest: bytes) -> bool:
        """Makes a full page findable; False if another page already holds that content."""
        return self._pool.identify(handle, digest)

    def count(self, queried_tokens: int, hit_tokens: int) -> None:
        """Counts one look-up that was acted upon."""
        self.counters.queried += queried_tokens
        self.counters.hit += hit_tokens
