"""A page pool of which a part can be lent: pages that go away and come back while it is in use.

The last pages of the pool lie in *extents*, runs of equal length that are lent as a whole; the
first ones, the *reserve*, always stay. A page of an extent may have a fourth state beside those of
`PagePool`, and `free + cached + in_use + away == num_pages`:

- *away*: nobody's here. It is handed out again after `restore`.

`withdraw` empties an extent: what is free or cached goes away at once, what is in use when its last
reference ends, or when its holders have moved to another page (`move`). Nothing in use is ever
taken.

Pages are handed out from the reserve first, then from the first extent, and so on. So while little
is in use the last extents are empty, and lending them, which begins at the end, costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

from aqua_jax.errors import PageError
from aqua_jax.paging.pages import Evictable, PageHandle, PagePool


class WithdrawablePool(PagePool):
    """`PagePool` with a reserve and extents. Page ids: the reserve's, then extent by extent."""

    def __init__(
        self, reserve: int, extents: int, extent_pages: int, page_tokens: int,
        evictable: Evictable | None = None,
    ) -> None:
        """
        Args:
          reserve: pages that always stay, >= 1.
          extents: how many runs of pages may be withdrawn, >= 1.
          extent_pages: pages of each.
          page_tokens: tokens of a page.
          evictable: the order of eviction.

        Raises:
          PageError: sizes that cannot be.
        """
        if reserve < 1 or extents < 1 or extent_pages < 1:
            raise PageError(
                f"a reserve of {reserve} pages and {extents} extents of {extent_pages} cannot be"
            )
        super().__init__(reserve + extents * extent_pages, page_tokens, evictable)
        self.reserve, self.extents, self.extent_pages = reserve, extents, extent_pages
        self._free: _Zones = _Zones(self)  # type: ignore[assignment]
        self._withdrawn = bytearray(self.num_pages)  # 1: away, or when its last reference ends
        self._pending = [0] * extents  # of those, how many are in use
        self.away = 0

    # What stays.

    @property
    def certain(self) -> int:
        """Pages of the reserve: no sequence may need those that can be lent."""
        return self.reserve

    @property
    def usable(self) -> int:
        """Pages that are there now and stay, as far as is known."""
        return self.num_pages - self.away - self.draining

    @property
    def in_use(self) -> int:
        """Pages with at least one reference."""
        return self.num_pages - self.away - self.available

    @property
    def draining(self) -> int:
        """Pages in use that go away when their last reference ends."""
        return sum(self._pending)

    # Going away and coming back.

    def pages_of(self, extent: int) -> range:
        """The page ids of an extent."""
        if not 0 <= extent < self.extents:
            raise PageError(f"extent {extent} is none of {self.extents}")
        first = self.reserve + extent * self.extent_pages
        return range(first, first + self.extent_pages)

    def pending(self, extent: int) -> int:
        """Pages of a withdrawn extent that are still in use."""
        return self._pending[extent]

    def withdrawn(self, page: int) -> bool:
        """Whether a page is away or goes away when its last reference ends."""
        return bool(self._withdrawn[page])

    def withdraw(self, extent: int) -> None:
        """Begins to empty an extent, until `pending` says 0; repeatable."""
        for page in self.pages_of(extent):
            if self._withdrawn[page]:
                continue
            self._withdrawn[page] = 1
            if self._references[page]:
                self._pending[extent] += 1
            elif self._findable(page):
                self._evictable.discard(page, self._turns[page])
                self._forget(page)
                self.away += 1
            else:
                self.away += 1
        self._free.drop(extent)

    def restore(self, pages: Iterable[int]) -> None:
        """Makes pages of extents usable again; those in use simply stay.

        What a page holds that was away is anything: nothing here looks at it.

        Raises:
          PageError: a page isn't withdrawn. Those before it are restored.
        """
        for page in pages:
            if not (self.reserve <= page < self.num_pages and self._withdrawn[page]):
                raise PageError(f"page {page} is not withdrawn")
            self._withdrawn[page] = 0
            if self._references[page]:
                self._pending[self._extent(page)] -= 1
            else:
                self.away -= 1
                self._free.append(page)

    def move(self, old: PageHandle, new: PageHandle, references: int) -> None:
        """The content of a page, copied by its holders, is another page's from now on.

        Its digest and its owners' turn go along, and `references` to it end; the new page has one
        already and gets the others.

        Args:
          old: in use.
          new: in use, just allocated.
          references: how many holders have moved: all there are.

        Raises:
          PageError: not all have moved, or one of the pages has another's content. Nothing changes.
        """
        source, target = self._check(old), self._check(new)
        if self._references[source] != references or self._references[target] != 1:
            raise PageError(
                f"page {source} has {self._references[source]} references, of which {references} "
                f"would move to page {target}, which has {self._references[target]}"
            )
        if self._findable(target):
            raise PageError(f"page {target} has content already")
        digest, turn = self._digests[source], self._turns[source]
        self._forget(source)
        self._digests[target], self._turns[target] = digest, turn
        if digest is not None:
            self._by_digest[digest] = target
        self._references[target] = references
        self._references[source] = 1
        self.release(old)

    def _unused(self, page: int) -> None:
        """With its last reference a withdrawn page goes away."""
        if self._withdrawn[page]:
            self._forget(page)
            self._pending[self._extent(page)] -= 1
            self.away += 1
        else:
            super()._unused(page)

    def _extent(self, page: int) -> int:
        return (page - self.reserve) // self.extent_pages


class _Zones:
    """Free pages as a stack for each zone, the reserve and the extents: the lowest goes first."""

    def __init__(self, pool: WithdrawablePool) -> None:
        self._pool = pool
        self._stacks = [list(range(pool.reserve - 1, -1, -1))]
        self._stacks += [list(reversed(pool.pages_of(e))) for e in range(pool.extents)]
        self._count = pool.num_pages
        self._lowest = 0  # no zone before it has a page

    def __len__(self) -> int:
        return self._count

    def append(self, page: int) -> None:
        """Puts a page in, unless it is withdrawn."""
        pool = self._pool
        if pool.withdrawn(page):
            return
        zone = 0 if page < pool.reserve else pool._extent(page) + 1
        self._stacks[zone].append(page)
        self._count += 1
        self._lowest = min(self._lowest, zone)

    def pop(self) -> int:
        """Takes out a page of the lowest zone that has one."""
        while not self._stacks[self._lowest]:
            self._lowest += 1
        self._count -= 1
        return self._stacks[self._lowest].pop()

    def drop(self, extent: int) -> None:
        """Takes out all pages of an extent."""
        self._count -= len(self._stacks[extent + 1])
        self._stacks[extent + 1].clear()
