"""Lends extents through a coordinator and takes them back, from a thread of its own.

For a model whose own loop must never wait: it says `lend` and `keep`, which return at once, and
looks at `news`, a plain attribute. What it lends it must not touch until it has come back.
"""

from __future__ import annotations

import collections
import logging
import queue
import threading
import time
from collections.abc import Sequence

from aqua_jax.coordinator.intervals import Intervals
from aqua_jax.errors import AquaError
from aqua_jax.memory.arena import PAGE, round_up
from aqua_jax.memory.client import Client
from aqua_jax.memory.lendable import Lendable
from aqua_jax.memory.loan import Lending

_log = logging.getLogger(__name__)

# Between two looks at what has come back: while something is wanted, and otherwise.
_SOON_S, _LATER_S = 0.005, 0.25


class Producer:
    """Extents of one owner, as the coordinator is told of them.

    Attributes:
      news: whether `take_returned` has something.
      longest_s: from when an extent was wanted back until all of it was, the longest so far.
      lost: extents that the coordinator lends no more and never gave back: nobody may use them.
    """

    def __init__(
        self, path: str, extents: Sequence[Lendable], *, name: str = "", domain: str = "",
        unit: int = PAGE, cap: int = 0, scrub: bool = False, deadline_s: float = 10.0,
        timeout_s: float = 2.0,
    ) -> None:
        """
        Args:
          path: of the coordinator's socket, or @name.
          extents: may be lent; the caller's, until `close` has returned at least.
          name: told to people.
          domain: where the memory is.
          unit: bytes that are of use to the owner only together, and so come back together.
          cap: bytes/s that a borrower may use; 0: all.
          scrub: zeroed before it comes back.
          deadline_s: seconds that borrowers have when an extent is wanted back.
          timeout_s: for each answer of the coordinator's.

        Raises:
          CoordinatorError: nobody answers there.
          DependencyError: gRPC isn't installed.
        """
        self._extents, self._name, self._unit = list(extents), name, unit
        self._cap, self._scrub, self._deadline_s = cap, scrub, deadline_s
        self._client = Client(path, name=name, domain=domain, timeout_s=timeout_s)
        self.news = False
        self.lost = 0
        self.longest_s = 0.0
        self._returned: collections.deque[tuple[int, int, int]] = collections.deque()
        # The thread's alone from here on.
        self._lendings: dict[int, Lending] = {}
        self._ours: dict[int, Intervals] = {}  # of extents that were lent, bytes that aren't now
        self._wanted: dict[int, float] = {}  # back, and since when
        self._keep = len(self._extents)
        self._said: queue.SimpleQueue[tuple[str, tuple[int, ...]]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="aqua-producer", daemon=True)
        self._thread.start()

    @property
    def client(self) -> Client:
        """The connection, for whoever borrows there as well: its own memory isn't lent to it."""
        return self._client

    @property
    def connected(self) -> bool:
        """Whether the coordinator is there."""
        return self._client.connected

    # What the owner says and hears, without waiting.

    def lend(self, extent: int, first: int = 0, last: int | None = None) -> None:
        """Lends an extent, or units first to last - 1 of it, which are the owner's and unused.

        What can't be lent comes back as if it had been; units at the ends, too, that share a page
        of the system with others that aren't lent with them.
        """
        if last is None:
            last = -(-self._extents[extent].size // self._unit)
        self._said.put(("lend", (extent, first, last)))

    def keep(self, count: int) -> None:
        """Lends at most so many extents from now on.

        Taken back first is what nobody has borrowed; borrowers of as many others as are needed are
        asked, and those extents come as they are given back. A higher count takes the wish back.
        """
        self._said.put(("keep", (count,)))

    def take_returned(self) -> list[tuple[int, int, int]]:
        """(extent, first, last) of units that are the owner's again, each once."""
        self.news = False  # before taking: what comes in between is seen next time
        return [self._returned.popleft() for _ in range(len(self._returned))]

    def close(self) -> None:
        """Takes everything back, for `deadline_s` at most, and leaves; may be repeated.

        What hasn't come back by then is lost to its borrowers. It stays mapped there.
        """
        self._said.put(("close", ()))
        self._thread.join()

    # The thread.

    def _run(self) -> None:
        word = ""
        numbers: tuple[int, ...] = ()
        while word != "close":
            try:
                word, numbers = self._said.get(timeout=_SOON_S if self._wanted else _LATER_S)
            except queue.Empty:
                word = ""
            try:
                if word == "lend":
                    self._offer(*numbers)
                elif word == "keep":
                    self._keep = numbers[0]
                if word:
                    self._settle()
            except AquaError as error:
                _log.warning("lending: %s", error)
            self._collect()
        self._leave()

    def _offer(self, extent: int, first: int, last: int) -> None:
        memory, lending, unit = self._extents[extent], self._lendings.get(extent), self._unit
        ours = self._ours.setdefault(extent, Intervals([(0, memory.size)]))
        start, end = round_up(first * unit), min(last * unit, memory.size) // PAGE * PAGE
        if start >= end:
            self._report(extent, first, last)
            return
        self._report(extent, first, start // unit)
        self._report(extent, -(-end // unit), last)
        ours.remove(start, end)
        try:
            if lending is None:
                # Nothing of it at first: an answer that comes too late then lends nothing.
                lending = self._client.lend(
                    memory, [], name=self._name, kind=memory.kind, device=memory.device,
                    cap=self._cap, scrub=self._scrub,
                )
                self._lendings[extent] = lending
            lending.lend(start, end - start)
        except AquaError as error:
            _log.info("extent %d can't be lent now: %s", extent, error)
            self._came_back(extent, start, end)

    def _lent(self) -> list[int]:
        return [
            extent for extent, lending in sorted(self._lendings.items())
            if lending.alive and lending.lent
        ]

    def _settle(self) -> None:
        """Wants as many back as there are too many. Waits for the coordinator once at most: its
        answers are slow while the owner keeps the processor busy."""
        lent = self._lent()
        need = len(lent) - self._keep - len(self._wanted)
        for extent in sorted(self._wanted)[: max(0, -need)]:
            lending = self._lendings[extent]
            lending.reclaim(lending.lent, 0.0, wait=False)
            del self._wanted[extent]
        others = [extent for extent in lent if extent not in self._wanted]
        if 0 < need < len(others):
            # What nobody has borrowed comes at once, and what is borrowed in part is soon given
            # back.
            borrowed = self._client.borrowed([self._lendings[extent] for extent in others])
            costs = {
                extent: self._lendings[extent].lent if held is None else held
                for extent, held in zip(others, borrowed, strict=True)
            }
            others.sort(key=lambda extent: (costs[extent], self._lendings[extent].lent))
        for extent in others[: max(0, need)]:
            self._lendings[extent].reclaim(0, self._deadline_s, wait=False)
            self._wanted[extent] = time.monotonic()

    def _collect(self) -> None:
        for extent, lending in list(self._lendings.items()):
            if lending.news:
                for start, end in lending.take_returned():
                    self._came_back(extent, start, end)
            if not lending.alive:
                del self._lendings[extent]
                self._wanted.pop(extent, None)
                if lending.lent:
                    self.lost += 1
                    _log.warning("extent %d stays away: the coordinator lends it no more", extent)
            elif not lending.lent:
                since = self._wanted.pop(extent, None)
                if since is not None:
                    self.longest_s = max(self.longest_s, time.monotonic() - since)

    def _came_back(self, extent: int, start: int, end: int) -> None:
        ours, unit = self._ours[extent], self._unit
        ours.add(start, end)
        first, last = start // unit, -(-end // unit)
        # At the ends others' bytes of the same unit may still be away.
        first += not ours.contains(first * unit, first * unit + unit)
        last -= not ours.contains(last * unit - unit, last * unit)
        self._report(extent, first, last)

    def _report(self, extent: int, first: int, last: int) -> None:
        if first < last:
            self._returned.append((extent, first, last))
            self.news = True

    def _leave(self) -> None:
        deadline = time.monotonic() + self._deadline_s
        try:
            for extent in self._lent():
                if time.monotonic() > deadline:  # the coordinator doesn't answer
                    break
                self._lendings[extent].reclaim(0, self._deadline_s)
            while self._lent() and self.connected and time.monotonic() < deadline:
                time.sleep(_SOON_S)
        except AquaError as error:
            _log.warning("lending ends: %s", error)
        left = self._lent()
        if left:
            _log.warning("%d extents are still lent; whoever holds them loses them", len(left))
        self._client.close()  # and with it all that is lent
