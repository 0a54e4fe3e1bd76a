"""The pages of sequences: what needn't be computed, what to take, what to leave behind.

The scheduler decides who gets pages and who gives way; this carries it out on the bookkeeping of
the pool, the prefix cache, and the stores below the pool (`paging.residency`), and keeps the counts
on the sequences right.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from aqua_jax.errors import SequenceStateError
from aqua_jax.paging.pages import PageHandle, PagePool
from aqua_jax.paging.prefix import PrefixCache
from aqua_jax.paging.residency import Residency, Stored
from aqua_jax.scheduling.sequence import Sequence, Status

_NEVER = -1 << 40  # holders that would have to go first


class Found(NamedTuple):
    """What of a waiting sequence needn't be computed."""

    pages: list[PageHandle | None]  # its leading pages; None: to be copied in from a store
    tokens: int  # that they hold; with `source`, what that one holds included
    source: PageHandle | None = None  # to be copied to the page after `pages`, inside the pool
    # Of the first pages, the sequence's own copies.
    kept: tuple[tuple[PageHandle | None, Stored, int], ...] = ()

    @property
    def shared(self) -> list[PageHandle]:
        """Pages in the pool."""
        if not self.kept:  # as for all newcomers
            return self.pages  # type: ignore[return-value]
        return [page for page in self.pages if page is not None]


class Holdings:
    """Gives and takes the pages of sequences."""

    def __init__(
        self, pool: PagePool, prefix: PrefixCache | None, residency: Residency | None
    ) -> None:
        """`prefix` is a cache over the same pool; None: no prefix caching. `residency`: None: what
        gives way is recomputed."""
        self.pool, self.prefix, self.residency = pool, prefix, residency

    def ready(self, sequence: Sequence) -> bool:
        """Whether everything it holds has arrived."""
        return self.residency is None or not self.residency.arriving(sequence)

    @property
    def leaving(self) -> int:
        """Pages that come free when copies to a store have ended."""
        return 0 if self.residency is None else self.residency.leaving

    @property
    def available(self) -> int:
        """Pages that can be had now, or when those copies have ended."""
        return self.pool.available + self.leaving

    def find(self, sequence: Sequence) -> Found:
        """What of a waiting sequence needn't be computed; changes nothing.

        At least one token is left to compute, for something has to be sampled from. A page that
        is partly filled is still being written by its owner, so it is copied, not shared; the
        owner can't lose it in this plan, because nobody is preempted once admission has begun.
        """
        size = self.pool.page_tokens
        kept = self._kept(sequence)
        pages = [home for home, _, _ in kept]
        tokens = sum(count for _, _, count in kept)
        if sequence.no_prefix_read:
            return Found(pages, tokens, kept=kept)
        if self.prefix is not None and sequence.chain is not None and tokens == len(pages) * size:
            digests = sequence.chain.digests
            for index, page in enumerate(pages):
                if page is None and index < len(digests):
                    pages[index] = self.pool.find(digests[index])
            more = self.prefix.match(sequence.chain, sequence.total_len - 1, len(pages))
            pages += more
            tokens = len(pages) * size
        parent, prompt = sequence.parent, sequence.prompt_len - 1
        if (
            parent is not None
            and parent.status is Status.RUNNING
            and self.ready(parent)
            and parent.num_computed >= prompt > tokens
        ):
            whole = prompt // size
            shared: list[PageHandle | None] = list(parent.pages[:whole])
            return Found(shared, prompt, parent.pages[whole] if prompt % size else None)
        return Found(pages, tokens, kept=kept)

    def _kept(self, sequence: Sequence) -> tuple[tuple[PageHandle | None, Stored, int], ...]:
        return () if self.residency is None else tuple(self.residency.find(sequence))

    def demand(self, sequence: Sequence, found: Found) -> int:
        """Pages that taking a sequence in costs, of those that are available."""
        shared = found.shared
        cached = self.pool.cached_among(shared)
        return self.pool.pages_for(sequence.total_len) - len(shared) + cached

    def count_hit(self, sequence: Sequence) -> None:
        """Notes what a sequence just admitted needn't compute; what forks share is no merit of the
        cache."""
        if sequence.parent is not None:
            return
        if sequence.preemptions == 0:
            sequence.num_cached_tokens = sequence.num_computed
        if self.prefix is not None and not sequence.no_prefix_read:
            self.prefix.count(sequence.total_len, sequence.num_computed)

    def take(self, sequence: Sequence, found: Found) -> tuple[int, int] | None:
        """Gives a sequence what was found and the pages of all its tokens.

        Returns:
          Page ids (source, target) to copy inside the pool, if any.

        Raises:
          SequenceStateError: there are not so many pages.
        """
        pool, shared = self.pool, found.shared
        pool.retain_all(shared)  # before allocating, which may evict what nobody holds
        fresh = pool.allocate(pool.pages_for(sequence.total_len) - len(shared))
        if fresh is None:
            raise SequenceStateError(f"{sequence}: pages changed during a plan")
        unused = iter(fresh)
        pages = [page or next(unused) for page in found.pages]
        # Leading pages that can be found already, by everybody.
        registered = len(pages) if len(shared) == len(pages) else found.pages.index(None)
        sequence.pages = [*pages, *unused]
        sequence.num_computed = found.tokens
        sequence.num_registered = min(registered, found.tokens // pool.page_tokens)
        if self.residency is not None:
            if found.kept:
                self.residency.come_back(sequence, found.kept, found.pages, sequence.pages)
            else:
                self.residency.drop(sequence)
        if found.source is None:
            return None
        return found.source.id, sequence.pages[len(pages)].id

    def extend(self, sequence: Sequence, tokens: int) -> bool:
        """Makes sure of pages for so many tokens; False, and nothing changed, if there are none."""
        missing = self.pool.pages_for(tokens) - len(sequence.pages)
        if missing > 0:
            pages = self.pool.allocate(missing)
            if pages is None:
                return False
            sequence.pages += pages
        return True

    def give_up(self, sequence: Sequence, *, keep: int = 0) -> None:
        """Takes all pages away; the first `keep` tokens stay readable, in a store or longer in the
        pool, as far as there is room."""
        pages, sequence.pages = sequence.pages, []
        sequence.num_computed = sequence.num_registered = 0
        if keep and self.residency is not None:
            self.residency.leave(sequence, pages, keep)
            return
        if self.residency is not None:
            self.residency.drop(sequence)
        self.pool.release_all(pages)

    def prefetch(self, sequence: Sequence, spare: int, found: Found | None = None) -> int:
        """Begins to copy back pages of the sequence that comes next, into `spare` pages; `found`:
        what was just found of it, if anybody has looked. Returns how many pages."""
        if self.residency is None or spare <= 0 or not sequence.swapped or sequence.num_inflight:
            return 0
        kept = (found and found.kept) or self._kept(sequence)
        own = sum(home is not None and self.pool.references(home) == 0 for home, _, _ in kept)
        return self.residency.prefetch(kept, spare - own)

    def write_behind(
        self, leaving_next: Iterable[Sequence], wanted: int, limit: int
    ) -> list[tuple[Sequence, int]]:
        """Copies full pages of sequences that will give way soon, so that their places come free at
        once then. Before any count has advanced in this plan: what is copied was computed by
        steps already dispatched.

        Args:
          leaving_next: in the order in which they would go.
          wanted: pages that should come free at once if they go; those of later ones stay.
          limit: most pages to begin copying.

        Returns:
          Of whom how many pages were begun.
        """
        begun: list[tuple[Sequence, int]] = []
        if self.residency is None or not self.residency.usable:
            return begun
        size = self.pool.page_tokens
        for sequence in leaving_next:
            if limit <= 0 or wanted <= 0:
                break
            if self.ready(sequence) and not sequence.complete:
                full = sequence.num_computed // size * size
                wanted -= full // size
                if full > self.residency.backed_tokens(sequence):
                    pages = self.residency.back(sequence, sequence.pages, full, limit)
                    begun.append((sequence, pages))
                    limit -= pages
        return begun

    def unsaved(self, sequence: Sequence, tokens: int) -> int:
        """Of its first tokens, those that are in no store and not on their way to one."""
        if self.residency is None:
            return tokens
        return max(0, tokens - self.residency.backed_tokens(sequence))

    def freed_by(
        self, victims: Iterable[Sequence], spared: Iterable[PageHandle]
    ) -> Iterator[tuple[Sequence, int]]:
        """Each of `victims`, and the pages that come free as it gives way, in this order, one after
        another; those of `spared` stay."""
        gone = {page.id: _NEVER for page in spared}
        for victim in victims:
            yield victim, self.pool.freed(victim.pages, gone)

    def pins(self, page: PageHandle) -> int:
        """References to a page that copies to a store hold."""
        return self.pool.pins(page)

    def register(self, sequence: Sequence) -> None:
        """Makes pages findable that are full of tokens known here and dispatched there."""
        if sequence.num_computed < (sequence.num_registered + 1) * self.pool.page_tokens:
            return  # most of the time
        if self.prefix is None or sequence.chain is None:
            return
        full = min(sequence.num_computed, len(sequence.tokens)) // self.pool.page_tokens
        if full <= sequence.num_registered:
            return
        sequence.chain.extend(sequence.tokens)
        for index in range(sequence.num_registered, full):
            self.prefix.register(sequence.pages[index], sequence.chain.digests[index])
        sequence.num_registered = full
