"""The page allocator: who holds which page of the KV pool, and what may be taken back.

A page is in exactly one of three states, and `free + cached + in_use == num_pages` always:

- *free*: holds nothing worth keeping;
- *in use*: at least one reference (a sequence's page table names it);
- *cached*: no reference, but its content is known by a digest, or its last owner means to come
  back for it (`keep`). It can be found again (`find`, `alive`, `retain`) until an allocation
  takes it.

Pages are append-only: a full page never changes, so several sequences may hold it.

Reuse is fenced by generations. A page's generation rises when the page is handed out again, so a
handle lives as long as the content it was given for, and any later use of it raises.

Order on the device: the pool says who *owns* a page now; it doesn't wait for dispatched work. That
is safe because steps run on the device in the order in which they were planned: an earlier step
that still writes a page freed since then runs before the step that reuses it.

Which cached page goes first is an `Evictable`: the least recently used, or, where owners come back
in turns, the one that is used again the latest (LRU never hits when use is cyclic). Cached
prefixes and the pages of sequences that gave way are in one set.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

from sortedcontainers import SortedDict

from aqua_jax.errors import PageError, StaleHandleError


class PageHandle(NamedTuple):
    """A page and the generation in which it was handed out."""

    id: int
    generation: int


class Evictable(Protocol):
    """The set of cached pages, with an order of eviction."""

    def add(self, page: int, turn: int | None) -> None:
        """Put in a page that has just lost its last reference.

        Args:
          page: not in the set.
          turn: rises with the time of its next use's beginning to wait; None: nobody waits for it.
        """

    def discard(self, page: int, turn: int | None) -> None:
        """Take out a page that is referenced again; it must be in the set, with that turn."""

    def take(self, count: int) -> list[int]:
        """Take out the pages to lose next; the set must hold so many."""

    def __len__(self) -> int: ...


class LeastRecentlyUsed:
    """Evicts the page whose last reference ended first. Every operation is O(1)."""

    def __init__(self) -> None:
        self._pages: OrderedDict[int, None] = OrderedDict()

    def add(self, page: int, turn: int | None) -> None:
        """Put in a page as the most recently used one."""
        self._pages[page] = None

    def discard(self, page: int, turn: int | None) -> None:
        """Take out a page that is referenced again."""
        del self._pages[page]

    def take(self, count: int) -> list[int]:
        """Take out the least recently used pages."""
        return [self._pages.popitem(last=False)[0] for _ in range(count)]

    def __len__(self) -> int:
        return len(self._pages)


class FarthestNextUse:
    """Evicts first what nobody waits for, least recently used first; then the pages of the owner
    that gave way last, its last page first: under time slices it comes back last (Belady's rule).
    Every operation is O(1) but for an owner's first and last page, O(log owners)."""

    def __init__(self) -> None:
        self._unclaimed: OrderedDict[int, None] = OrderedDict()
        self._turns: SortedDict = SortedDict()  # turn -> its pages
        self._claimed = 0

    def add(self, page: int, turn: int | None) -> None:
        """Put in a page, claimed by the owner of a turn or by nobody."""
        if turn is None:
            self._unclaimed[page] = None
            return
        pages = self._turns.get(turn)
        if pages is None:
            pages = self._turns[turn] = OrderedDict()
        pages[page] = None
        self._claimed += 1

    def discard(self, page: int, turn: int | None) -> None:
        """Take out a page that is referenced again."""
        if turn is None:
            del self._unclaimed[page]
            return
        pages = self._turns[turn]
        del pages[page]
        self._claimed -= 1
        if not pages:
            del self._turns[turn]

    def take(self, count: int) -> list[int]:
        """Take out the pages to lose next."""
        unclaimed = self._unclaimed
        taken = [unclaimed.popitem(last=False)[0] for _ in range(min(count, len(unclaimed)))]
        while len(taken) < count:
            # An owner's pages are released last page first, so its first in the set is its last.
            turn, pages = self._turns.peekitem(-1)
            here = min(count - len(taken), len(pages))
            taken += [pages.popitem(last=False)[0] for _ in range(here)]
            self._claimed -= here
            if not pages:
                del self._turns[turn]
        return taken

    def __len__(self) -> int:
        return len(self._unclaimed) + self._claimed


class PagePool:
    """Reference counts, generations and content digests of `num_pages` pages.

    Misuse raises: `StaleHandleError` for a handle whose content is gone, `PageError` for an unknown
    page or a release without a reference.
    Running out of pages is not an error: `allocate` returns None.
    """

    def __init__(
        self, num_pages: int, page_tokens: int, evictable: Evictable | None = None
    ) -> None:
        if num_pages < 1 or page_tokens < 1:
            raise PageError(f"a pool of {num_pages} pages of {page_tokens} tokens cannot exist")
        self.num_pages = num_pages
        self.page_tokens = page_tokens
        self._generations = [0] * num_pages
        self._references = [0] * num_pages
        self._pins = [0] * num_pages  # of these, those that end by themselves
        self.leaving = 0  # pages that have no other references
        self._digests: list[bytes | None] = [None] * num_pages
        self._by_digest: dict[bytes, int] = {}
        self._turns: list[int | None] = [None] * num_pages  # whose owner means to come back, when
        self._free = list(range(num_pages - 1, -1, -1))  # a stack: the page freed last is warm
        self._evictable: Evictable = LeastRecentlyUsed() if evictable is None else evictable

    @property
    def free(self) -> int:
        """Pages that hold nothing."""
        return len(self._free)

    @property
    def cached(self) -> int:
        """Pages without a reference whose content can still be found."""
        return len(self._evictable)

    @property
    def in_use(self) -> int:
        """Pages with at least one reference."""
        return self.num_pages - self.available

    @property
    def certain(self) -> int:
        """Pages that one sequence can always have, if all others give way."""
        return self.num_pages

    @property
    def usable(self) -> int:
        """Pages there are now; fewer than `num_pages` where some are lent (`withdrawal`)."""
        return self.num_pages

    @property
    def draining(self) -> int:
        """Pages in use that their holders should leave."""
        return 0

    @property
    def available(self) -> int:
        """Pages that `allocate` can hand out: free and cached ones."""
        return len(self._free) + len(self._evictable)

    def pages_for(self, tokens: int) -> int:
        """Pages that hold `tokens` tokens."""
        return -(-tokens // self.page_tokens)

    def allocate(self, count: int) -> list[PageHandle] | None:
        """Hands out `count` pages with one reference each: free ones first, then evicted ones.

        All or nothing: None, and nothing evicted, when fewer are available. Pages in use are never
        taken, so a caller who wants to keep cached pages retains them first.
        """
        if count < 0:
            raise PageError(f"cannot allocate {count} pages")
        if count > self.available:
            return None
        free, references, generations = self._free, self._references, self._generations
        pages = [free.pop() for _ in range(min(count, len(free)))]
        if len(pages) < count:
            evicted = self._evictable.take(count - len(pages))
            for page in evicted:
                self._forget(page)
            pages += evicted
        handles = []
        for page in pages:
            references[page] = 1
            generations[page] = generation = generations[page] + 1
            handles.append(PageHandle(page, generation))
        return handles

    def retain(self, handle: PageHandle) -> None:
        """Adds a reference to a page in use, or takes a cached one back into use."""
        self.retain_all((handle,))

    def retain_all(self, handles: Iterable[PageHandle]) -> None:
        """`retain`, one after the other."""
        references, pins, check = self._references, self._pins, self._check
        for handle in handles:
            page = check(handle)
            count = references[page]
            if count == 0:
                self._revive(page)
            elif count == pins[page]:
                self.leaving -= 1
            references[page] = count + 1

    def _revive(self, page: int) -> None:
        """Somebody wants a page that nobody holds."""
        if not self._findable(page):
            raise StaleHandleError(f"page {page} was released; its content is gone")
        self._evictable.discard(page, self._turns[page])

    def release(self, handle: PageHandle) -> None:
        """Drops a reference; with the last one the page becomes cached (has a digest, or is kept)
        or free."""
        self.release_all((handle,))

    def release_all(self, handles: Sequence[PageHandle]) -> None:
        """`release`, last page first: a prefix is found from its first page on, so the tail must
        be evicted before the head."""
        references, pins, check, unused = self._references, self._pins, self._check, self._unused
        for handle in reversed(handles):
            page = check(handle)
            count = references[page] - 1
            if count < 0:
                raise PageError(f"page {page} is released more often than it was retained")
            references[page] = count
            if count == 0:
                unused(page)
            elif count == pins[page]:
                self.leaving += 1

    def _unused(self, page: int) -> None:
        """The last reference has ended."""
        if self._findable(page):
            self._evictable.add(page, self._turns[page])
        else:
            self._free.append(page)

    def pin(self, handle: PageHandle) -> None:
        """`retain` with a reference that ends by itself: a copy's. What has no others is
        `leaving`."""
        page = self._check(handle)
        if self._references[page] == 0:
            self._revive(page)
            self.leaving += 1
        self._references[page] += 1
        self._pins[page] += 1

    def unpin(self, handle: PageHandle) -> None:
        """Ends what `pin` began."""
        page = self._check(handle)
        if self._pins[page] == 0:
            raise PageError(f"page {page} is not pinned")
        if self._references[page] == self._pins[page]:
            self.leaving -= 1  # until `release` finds it so
        self._pins[page] -= 1
        self.release(handle)

    def pins(self, handle: PageHandle) -> int:
        """References to a page in use that end by themselves."""
        return self._pins[handle.id]

    def freed(self, handles: Iterable[PageHandle], gone: dict[int, int]) -> int:
        """Pages that come free, now or when pins end, if a holder of each of these lets go of it.

        Args:
          handles: of pages in use, each once.
          gone: page id -> holders that have let go before, in the caller's mind; counts these. Less
            than there are: what never comes free.
        """
        references, pins, count = self._references, self._pins, 0
        for page in map(self._check, handles):
            left = references[page] - pins[page] - 1
            if left or page in gone:
                before = gone.get(page, 0)
                gone[page] = before + 1
                left -= before
            count += left == 0
        return count

    def keep(self, handles: Iterable[PageHandle], turn: int) -> None:
        """Marks pages in use: their content stays, once released, until an allocation takes it.

        Args:
          handles: of pages with a reference.
          turn: of their owner; those with lower ones come back earlier. Of several the lowest
            counts.
        """
        references, turns = self._references, self._turns
        for page in map(self._check, handles):
            if references[page] == 0:
                raise PageError(f"page {page} is not in use")
            before = turns[page]
            if before is None or before > turn:
                turns[page] = turn

    def unkeep(self, handle: PageHandle) -> None:
        """Ends what `keep` began; a page without reference and digest is free then."""
        page = self._check(handle)
        if self._turns[page] is None:
            return
        cached = self._references[page] == 0
        if cached:
            self._evictable.discard(page, self._turns[page])
        self._turns[page] = None
        if cached and self._digests[page] is not None:
            self._evictable.add(page, None)
        elif cached:
            self._free.append(page)

    def alive(self, handle: PageHandle) -> bool:
        """Whether what the handle was given for is still there, in use or cached; never raises."""
        page, generation = handle
        return (
            0 <= page < self.num_pages and self._generations[page] == generation and (
                self._references[page] > 0
                or self._turns[page] is not None or self._digests[page] is not None
            )
        )

    def references(self, handle: PageHandle) -> int:
        """How many hold the page; 0 for a cached one."""
        return self._references[self._check(handle)]

    def cached_among(self, handles: Iterable[PageHandle]) -> int:
        """How many of these pages nobody holds."""
        references = self._references
        return [references[page] for page in map(self._check, handles)].count(0)

    def identify(self, handle: PageHandle, digest: bytes) -> bool:
        """Makes the content of a page in use findable by `digest`.

        Returns False, and leaves this page unfindable, when another page already has that content:
        the older one has the references.
        """
        page = self._check(handle)
        if self._references[page] == 0:
            raise PageError(f"page {page} is not in use")
        if self._digests[page] not in (None, digest):
            raise PageError(f"page {page} is full and identified; its content cannot change")
        if self._by_digest.setdefault(digest, page) != page:
            return False
        self._digests[page] = digest
        return True

    def find(self, digest: bytes) -> PageHandle | None:
        """The page with this content, in use or cached; not retained."""
        pages = self.find_run((digest,))
        return pages[0] if pages else None

    def find_run(self, digests: Iterable[bytes]) -> list[PageHandle]:
        """`find` of each, up to the first that isn't there."""
        by_digest, generations, found = self._by_digest, self._generations, []
        for digest in digests:
            page = by_digest.get(digest)
            if page is None:
                break
            found.append(PageHandle(page, generations[page]))
        return found

    def forget_cached(self) -> int:
        """Empties the cache and makes pages in use unfindable; returns the pages freed.

        For when the contents of the pool are lost.
        """
        pages = self._evictable.take(len(self._evictable))
        for page in pages:
            self._free.append(page)
        for page in list(self._by_digest.values()):
            self._forget(page)
        self._turns = [None] * self.num_pages
        return len(pages)

    def _findable(self, page: int) -> bool:
        return self._digests[page] is not None or self._turns[page] is not None

    def _forget(self, page: int) -> None:
        self._turns[page] = None
        digest = self._digests[page]
        if digest is not None:
            del self._by_digest[digest]
            self._digests[page] = None

    def _check(self, handle: PageHandle) -> int:
        page, generation = handle
        if not 0 <= page < self.num_pages:
            raise PageError(f"page {page} is not in a pool of {self.num_pages}")
        if generation != self._generations[page]:
            raise StaleHandleError(
                f"page {page}: handle of generation {generation}, now {self._generations[page]}"
            )
        return page

