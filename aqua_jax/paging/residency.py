"""Where the KV of sequences is that gave way: still in the pool, in a store, or both.

Pages are append-only, so a copy in a store stays good. Five things follow.

- *Delta swap-out*: an owner keeps its copies while it runs, and giving way again copies only the
  tokens that are in no store yet, down to a part of the last page.
- *Write-behind*: `back` may be called for an owner that still runs; what is copied then needs no
  copy when it gives way, and its pages are free at once.
- *Lazy eviction*: pages left behind stay readable (`PagePool.keep`) until an allocation takes them,
  last those whose owner comes back first. `find` sees them, and nothing is copied back for them.
- *Prefetch*: pages of the owner that comes back next are copied in while it waits for the rest of
  its place.
- *Shared pages move once*: a copy belongs to the content, whoever owns it.

Moves are asked for here, handed out with a plan (`take_moves`), and end when somebody says so
(`finished`). Until then a move holds a reference to its page, so that nobody else gets it. An owner
whose pages are still arriving (`arriving`) must not run. A partly filled page may be written behind
the tokens that are being copied: the bytes are others.

Nothing here waits, and nothing raises when memory runs out or is lost: what isn't found is
recomputed.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence

from aqua_jax.paging.moves import Move, Part, Store
from aqua_jax.paging.pages import PageHandle, PagePool
from aqua_jax.paging.queue import MoveQueue
from aqua_jax.paging.reclaim import Copy, Reclaim
from aqua_jax.paging.stored import ResidencyCounters, Stored, Tiers


class Residency:
    """Which page of which owner is where. Owners are whatever can be a key."""

    def __init__(
        self, pool: PagePool, stores: Sequence[Store], *, verify: bool = False
    ) -> None:
        """
        Args:
          pool: whose pages are copied.
          stores: tiers, the preferred one first.
          verify: moves carry checksums.
        """
        self.tiers = Tiers(stores)
        self.verify = verify
        self.counters = ResidencyCounters()
        self._pool = pool
        self._backed: dict[Hashable, list[Stored]] = {}  # of each owner, its leading pages
        self._resident: dict[Hashable, None] = {}  # owners with copies that hold pool pages
        self._by_page: dict[PageHandle, Stored] = {}  # by `home`
        self._moves: dict[Move, Stored] = {}  # asked for and not finished
        self._queue = MoveQueue(pool.page_tokens)  # of these, those not in a plan yet
        self._awaited: dict[Hashable, int] = {}  # arrivals that an owner waits for
        self._failed: list[Hashable] = []
        self._unwanted = False  # moves may be queued that nobody waits for
        self._turn = 0
        self._reclaim = Reclaim(self.tiers, self)

    # What the scheduler asks.

    @property
    def outstanding(self) -> int:
        """Moves asked for, in a plan or not yet, and not finished."""
        return len(self._moves)

    @property
    def usable(self) -> bool:
        """Whether any store can hold anything."""
        return any(store.capacity and not store.lost for store in self.tiers.stores)

    @property
    def leaving(self) -> int:
        """Pool pages that come free when outward moves end, and not before."""
        return self._pool.leaving

    @property
    def awaiting(self) -> Collection[Hashable]:
        """Owners of which pages are still being copied in."""
        return self._awaited

    def arriving(self, owner: Hashable) -> bool:
        """Whether pages of the owner are still being copied in."""
        return owner in self._awaited

    def copies(self, owner: Hashable) -> Sequence[Stored]:
        """Copies of the owner's leading pages, in stores or on their way there."""
        return self._backed.get(owner, ())

    def backed_tokens(self, owner: Hashable) -> int:
        """Tokens of the owner that are in stores or on their way there."""
        backed = self._backed.get(owner)
        if not backed:
            return 0
        return (len(backed) - 1) * self._pool.page_tokens + backed[-1].promised

    def find(self, owner: Hashable) -> list[tuple[PageHandle | None, Stored, int]]:
        """The owner's leading pages that needn't be computed.

        Returns:
          For each: where it is in the pool, or None: it has to be copied in; its copy; the tokens
          it holds, a whole page except perhaps for the last.
        """
        found: list[tuple[PageHandle | None, Stored, int]] = []
        alive, size = self._pool.alive, self._pool.page_tokens
        for stored in self._backed.get(owner, ()):
            home = stored.home
            if home is not None and alive(home):
                tokens = stored.home_tokens
            elif stored.tokens and stored.store.holds(stored.slot):
                home, tokens = None, stored.tokens
            else:
                break
            if tokens < size and len(stored.owners) > 1:
                break  # what is left of a shared page: each of them would fill it up
            found.append((home, stored, tokens))
            if tokens < size or stored.promised < size:
                break
        return found

    def take_moves(self, limit: int) -> tuple[Move, ...]:
        """The next moves to hand over, those somebody waits for first."""
        return self._queue.take(limit)

    def cancel_unwanted(self) -> None:
        """Forgets moves that nobody waits for and no plan has; their pages are free at once."""
        if not self._unwanted:
            return
        self._unwanted = False
        for move in self._queue.withdraw(lambda move: not self._moves[move].owners):
            self._finish(move, False, None)

    def take_failed(self) -> list[Hashable]:
        """Owners whose pages did not all arrive, each once; see `sound_tokens`."""
        failed, self._failed = self._failed, []
        return failed

    def sound_tokens(self, owner: Hashable) -> int:
        """Tokens from the first on that the pages of such an owner really hold."""
        return sum(stored.home_tokens for stored in self.copies(owner))

    # What happens to owners.

    def back(
        self, owner: Hashable, pages: Sequence[PageHandle], tokens: int, limit: int | None = None
    ) -> int:
        """Begins to copy out what is in no store yet.

        Args:
          owner: holds `pages`.
          pages: its page table.
          tokens: that it has computed, all by steps already dispatched.
          limit: most pages to begin with; None: all.

        Returns:
          Pages begun. Fewer than there are when the stores are full: the leading ones are kept.
        """
        self._resident[owner] = None
        return self._back(owner, pages, tokens, limit)

    def _back(
        self, owner: Hashable, pages: Sequence[PageHandle], tokens: int, limit: int | None = None
    ) -> int:
        size = self._pool.page_tokens
        backed = self._backed.setdefault(owner, [])
        # Of an owner with pages all copies are whole, or promised to be, but the last.
        first = len(backed) - (bool(backed) and backed[-1].promised < size)
        end, by_page, begun = self._pool.pages_for(tokens), self._by_page, 0
        for index in range(first, end):
            if begun == limit:
                break
            page = pages[index]
            count = size if index < end - 1 else tokens - index * size
            if index < len(backed):
                stored = backed[index]
            else:
                known = by_page.get(page) or self._store(page, owner)
                if known is None:
                    self.counters.refused += end - index
                    break
                stored = known
                stored.owners.append(owner)
                backed.append(stored)
            if count > stored.home_tokens:
                stored.home_tokens = count
            if count > stored.promised:
                if stored.store.lost:
                    lost, slot = stored.store, stored.slot
                    if not self.tiers.descend(stored):
                        break
                    lost.free(slot)
                self._send_out(stored, page, stored.promised, count - stored.promised)
                begun += 1
        return begun

    def leave(self, owner: Hashable, pages: Sequence[PageHandle], tokens: int) -> None:
        """The owner gives way. Its references to `pages` end; its first `tokens` tokens are kept
        as far as stores have room."""
        self._stop_waiting(owner)
        self._resident.pop(owner, None)  # its copies are no duplicates any more
        self._back(owner, pages, tokens)
        self.counters.departures += 1
        self.counters.tokens_held += tokens
        self._turn += 1
        backed, by_page, size = self._backed[owner], self._by_page, self._pool.page_tokens
        for stored, page in zip(backed, pages, strict=False):
            tokens_here = size if tokens >= size else tokens
            if stored.home == page and by_page.get(page) is stored:  # as it is for most
                stored.home_tokens = tokens_here
            else:
                self._settle_home(stored, page, tokens_here)
            tokens -= size
        self._pool.keep(pages[: len(backed)], self._turn)
        self._pool.release_all(pages)

    def come_back(
        self, owner: Hashable, found: Sequence[tuple[PageHandle | None, Stored, int]],
        homes: Sequence[PageHandle | None], pages: Sequence[PageHandle],
    ) -> None:
        """The owner has pages again.

        Args:
          owner: holds a reference to each of `pages`.
          found: what `find` has said, or its beginning.
          homes: where that is in the pool: as `find` has said, or a page of the same content.
          pages: its new page table; those that were found are the same.
        """
        backed = self._backed[owner]
        for stored in backed[len(found) :]:
            self._disown(stored, owner)
        del backed[len(found) :]
        self._resident[owner] = None
        for (_, stored, tokens), home, page in zip(found, homes, pages, strict=False):
            self.counters.tokens_held += tokens
            if home is None:
                self._bring_in(stored, page)
            else:
                self.counters.tokens_revived += tokens
                if home != stored.home:
                    self._settle_home(stored, home, tokens)
                elif len(stored.owners) == 1:
                    self._pool.unkeep(home)  # it is in use, and its next turn will be another
            if stored.arrivals:
                stored.waiters.append(owner)
                self._awaited[owner] = self._awaited.get(owner, 0) + 1
        self.counters.returns += bool(found)

    def prefetch(
        self, found: Sequence[tuple[PageHandle | None, Stored, int]], limit: int
    ) -> int:
        """Begins to copy pages in for an owner that will come back soon and has none.

        They are nobody's until then: cached in the pool as what owners leave behind, and evicted
        last, for no other owner comes back earlier.

        Args:
          found: what `find` says of it now.
          limit: most pages to take for it.

        Returns:
          Pages begun.
        """
        gone = [stored for home, stored, _ in found if home is None]
        pages = self._pool.allocate(max(0, min(len(gone), limit, self._pool.available))) or ()
        for stored, page in zip(gone, pages, strict=False):
            self._bring_in(stored, page)
        self._pool.keep(pages, 0)
        for page in pages:
            self._pool.release(page)  # the moves hold it until they have ended
        self.counters.prefetched += len(pages)
        return len(pages)

    def drop(self, owner: Hashable) -> None:
        """The owner has ended, or starts over: its copies are not needed."""
        self._stop_waiting(owner)
        self._resident.pop(owner, None)
        for stored in reversed(self._backed.pop(owner, [])):
            self._disown(stored, owner)

    # What happens to moves and stores.

    def finished(self, move: Move, ok: bool, checksum: int | None = None) -> None:
        """A move in a plan has ended.

        Args:
          move: of `take_moves`; each ends once.
          ok: whether the bytes are where they should be.
          checksum: of an outward move, when `verify`.
        """
        self.counters.failed += not ok
        self._finish(move, ok, checksum)

    def abandon(self) -> None:
        """The pool's content is lost, and no copy is under way any more. What has arrived in
        stores is good."""
        for move, stored in list(self._moves.items()):
            stored.failed = False  # nobody waits, so nobody is told
            if move.inward:
                stored.waiters.clear()
        self._awaited.clear()
        for move in list(self._moves):
            self._finish(move, False, None)
        self._queue.clear()
        self._failed.clear()
        for stored in self._by_page.values():
            stored.home, stored.home_tokens = None, 0
        self._by_page.clear()

    def trim(self, owner: Hashable, tokens: int) -> None:
        """Copies of an owner without pages are good for its first `tokens` tokens only."""
        backed = self._backed.get(owner, [])
        whole = tokens // self._pool.page_tokens
        if self.backed_tokens(owner) > tokens:
            self.cut(owner, backed[whole])

    def respond(self, copy: Copy, climb: int = 0) -> None:
        """Gives back what lenders want, at a step boundary; a flag's look when they want nothing.

        Args:
          copy: begins to copy one slot's bytes to another's.
          climb: pages that may be on their way to a faster tier; 0: none set out.
        """
        self._reclaim.respond(copy, climb)

    @property
    def shifting(self) -> int:
        """Copies from store to store whose slots are held until `respond` has ended them."""
        return self._reclaim.shifting

    def moved(self, old: PageHandle, new: PageHandle) -> None:
        """What a page of the pool held is in another one now."""
        if (stored := self._by_page.pop(old, None)) is not None:
            stored.home, self._by_page[new] = new, stored

    # For `reclaim`, too.

    def held_back(self, stored: Stored) -> bool:
        """Whether a copy has to stay where it is for now."""
        return stored.busy or any(owner in self._awaited for owner in stored.owners)

    def cut(self, owner: Hashable, stored: Stored) -> None:
        """Takes away a copy and all behind it."""
        backed = self._backed[owner]
        index = backed.index(stored)
        waited = self._awaited.get(owner)
        for later in reversed(backed[index:]):
            self._disown(later, owner)
        del backed[index:]
        if self._awaited.get(owner) != waited and owner not in self._failed:
            self._failed.append(owner)  # nobody would tell it of what still arrives

    def copy_again(self, stored: Stored) -> None:
        """From the pool, where it is alive, to the empty slot that it has now."""
        assert stored.home is not None
        stored.parts, stored.tokens = [], 0
        self._send_out(stored, stored.home, 0, stored.home_tokens)

    def alive(self, stored: Stored) -> bool:
        """Whether the pool has the content."""
        home = stored.home
        return home is not None and not stored.arrivals and self._pool.alive(home)

    def lost(self, stored: Stored) -> None:
        """The store doesn't have it any more. Owners that come back may find it in the pool."""
        stored.parts, stored.tokens, stored.promised = [], 0, 0
        gone = not self.alive(stored)
        for owner in list(stored.owners):
            if gone or owner in self._resident:
                self.cut(owner, stored)

    # Inside.

    def _store(self, page: PageHandle, owner: Hashable) -> Stored | None:
        """A new copy for a page, in the best tier with room."""
        stored = self.tiers.place()
        if stored is None and self._drop_duplicate(owner):
            stored = self.tiers.place()
        if stored is not None:
            self._settle_home(stored, page, 0)
        return stored

    def _drop_duplicate(self, asking: Hashable) -> bool:
        """Gives up a copy whose content is in the pool and needed there: of the owner that came
        back last, for it will be the last to leave. Its last page, to keep copies leading ones."""
        if asking in self._resident:  # a copy made ahead is not worth another one
            return False
        for owner in reversed(self._resident):
            backed = self._backed[owner]
            if backed and not backed[-1].busy and len(backed[-1].owners) == 1:
                self.counters.dropped += 1
                self._disown(backed.pop(), owner)
                return True
        return False

    def _send_out(self, stored: Stored, page: PageHandle, start: int, count: int) -> None:
        move = Move(page, stored.store, stored.slot, start, count, inward=False)
        stored.promised = start + count
        stored.outs += 1
        self._ask(move, stored)

    def _bring_in(self, stored: Stored, page: PageHandle) -> None:
        stored.failed = False
        stored.promised = stored.tokens
        self._settle_home(stored, page, stored.tokens)
        # A sum can only be compared for what was summed up together.
        pieces: list[Part] | tuple[Part] = (Part(0, stored.tokens, None),)
        if self.verify:
            pieces = [part for part in stored.parts if part.start < stored.tokens]
        for start, count, checksum in pieces:
            stored.arrivals += 1
            self._ask(Move(page, stored.store, stored.slot, start, count, True, checksum), stored)

    def _ask(self, move: Move, stored: Stored) -> None:
        (self._pool.retain if move.inward else self._pool.pin)(move.page)
        self._moves[move] = stored
        self._queue.put(move)

    def _finish(self, move: Move, ok: bool, checksum: int | None) -> None:
        stored = self._moves.pop(move)
        self._queue.ended(move)
        if move.inward:
            self._arrived(stored, move, ok)
            self._pool.release(move.page)
        else:
            self._departed(stored, move, ok, checksum)
            self._pool.unpin(move.page)
        if not stored.owners and not stored.busy:
            self.tiers.free(stored)

    def _departed(self, stored: Stored, move: Move, ok: bool, checksum: int | None) -> None:
        stored.outs -= 1
        if ok and move.store is stored.store and move.slot == stored.slot:
            self.counters.tokens_out += move.count
            stored.parts.append(Part(move.start, move.count, checksum))
            stored.parts.sort()
            stored.count()
        if not stored.outs and stored.promised > stored.tokens:  # something failed
            stored.promised = stored.tokens
            for owner in list(stored.owners):
                if owner in self._resident and stored is not self._backed[owner][-1]:
                    self.cut(owner, stored)  # sent again when it leaves

    def _arrived(self, stored: Stored, move: Move, ok: bool) -> None:
        stored.arrivals -= 1
        stored.failed |= not ok
        self.counters.tokens_in += move.count * ok
        if stored.arrivals:
            return
        waiters, stored.waiters = stored.waiters, []
        if stored.failed:
            # A copy that can't be read is no copy. Whoever has it is sound up to there.
            for owner in list(stored.owners):
                self.cut(owner, stored)
            for owner in waiters:
                if owner not in self._failed:
                    self._failed.append(owner)
        for owner in waiters:
            self._awaited[owner] -= 1
            if not self._awaited[owner]:
                del self._awaited[owner]

    def _settle_home(self, stored: Stored, page: PageHandle, tokens: int) -> None:
        if stored.home != page:
            self._leave_home(stored)
        stored.home, stored.home_tokens = page, tokens
        self._by_page[page] = stored

    def _leave_home(self, stored: Stored) -> None:
        home = stored.home
        if home is not None and self._by_page.get(home) is stored:
            del self._by_page[home]
            if self._pool.alive(home):
                self._pool.unkeep(home)

    def _disown(self, stored: Stored, owner: Hashable) -> None:
        stored.owners.remove(owner)
        if owner in stored.waiters:
            stored.waiters.remove(owner)
            self._awaited[owner] -= 1
            if not self._awaited[owner]:
                del self._awaited[owner]
        if not stored.owners:
            self._leave_home(stored)
            stored.home, stored.home_tokens = None, 0
            if stored.busy:
                self._unwanted = True
            else:
                self.tiers.free(stored)

    def _stop_waiting(self, owner: Hashable) -> None:
        if self._awaited.pop(owner, 0):
            for stored in self._backed[owner]:
                if owner in stored.waiters:
                    stored.waiters.remove(owner)
        if owner in self._failed:
            self._failed.remove(owner)
