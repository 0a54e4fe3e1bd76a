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
from aqua_jax.errors import AquaError, CoordinatorError, LedgerError
from aqua_jax.memory.arena import PAGE
from aqua_jax.memory.client import Client
from aqua_jax.memory.loan import Lendable, Lending

_log = logging.getLogger(__name__)

# Between two looks at what has come back: while something is wanted, and otherwise.
_SOON_S, _LATER_S = 0.005, 0.25


class Producer:
    """Extents of one owner, as the coordinator is told of them.

    Attributes:
      news: whether `take_returned` has something.
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
        self._returned: collections.deque[tuple[int, int, int]] = collections.deque()
        # The thread's alone from here on.
        self._lendings: dict[int, Lending] = {}
        self._back: dict[int, Intervals] = {}  # of extents that were lent, bytes that are back
        self._wanted: set[int] = set()
        self._keep = len(self._extents)
        self._said: queue.SimpleQueue[tuple[str, int]] = queue.SimpleQueue()
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

    def lend(self, extent: int) -> None:
        """Lends an extent, all of which is the owner's now and unused.

        If that can't be, it comes back as if it had been lent.
        """
        self._said.put(("lend", extent))

    def keep(self, count: int) -> None:
        """Lends at most so many extents from now on.

        Taken back first is what nobody has borrowed; borrowers of as many others as are needed are
        asked, and those extents come as they are given back. A higher count takes the wish back.
        """
        self._said.put(("keep", count))

    def take_returned(self) -> list[tuple[int, int, int]]:
        """(extent, first, last) of units that are the owner's again, each once."""
        self.news = False  # before taking: what comes in between is seen next time
        return [self._returned.popleft() for _ in range(len(self._returned))]

    def close(self) -> None:
        """Takes everything back, for `deadline_s` at most, and leaves; may be repeated.

        What hasn't come back by then is lost to its borrowers. It stays mapped there.
        """
        self._said.put(("close", 0))
        self._thread.join()

    # The thread.

    def _run(self) -> None:
        word, number = "", 0
        while word != "close":
            try:
                word, number = self._said.get(timeout=_SOON_S if self._wanted else _LATER_S)
            except queue.Empty:
                word = ""
            try:
                if word == "lend":
                    self._offer(number)
                elif word == "keep":
                    self._keep = number
                if word:
                    self._settle()
            except AquaError as error:
                _log.warning("lending: %s", error)
            self._collect()
        self._leave()

    def _offer(self, extent: int) -> None:
        memory, lending = self._extents[extent], self._lendings.get(extent)
        self._back[extent] = Intervals()
        try:
            if lending is None:
                # Nothing of it at first: an answer that comes too late then lends nothing.
                lending = self._client.lend(
                    memory, [], name=self._name, cap=self._cap, scrub=self._scrub
                )
                self._lendings[extent] = lending
            lending.lend(0, memory.size)
        except AquaError as error:
            _log.info("extent %d can't be lent now: %s", extent, error)
            self._came_back(extent, 0, memory.size)

    def _lent(self) -> list[int]:
        return [
            extent for extent, lending in sorted(self._lendings.items())
            if lending.alive and lending.lent
        ]

    def _settle(self) -> None:
        """Wants as many back as there are too many."""
        lent = self._lent()
        need = len(lent) - self._keep - len(self._wanted)
        for extent in sorted(self._wanted)[: max(0, -need)]:
            lending = self._lendings[extent]
            lending.reclaim(lending.lent, 0.0)
            self._wanted.discard(extent)
        if need <= 0:
            return
        others = [extent for extent in lent if extent not in self._wanted]
        for ask in (self._take_if_free, self._take):
            for extent in others:
                if need and extent not in self._wanted and ask(self._lendings[extent]):
                    self._wanted.add(extent)
                    need -= 1

    @staticmethod
    def _take_if_free(lending: Lending) -> bool:
        try:
            lending.resize(0)
        except (LedgerError, CoordinatorError):  # borrowed in part; or nobody can say
            return False
        return True

    def _take(self, lending: Lending) -> bool:
        lending.reclaim(0, self._deadline_s)
        return True

    def _collect(self) -> None:
        for extent, lending in list(self._lendings.items()):
            if lending.news:
                for start, end in lending.take_returned():
                    self._came_back(extent, start, end)
            if not lending.alive:
                del self._lendings[extent]
                self._wanted.discard(extent)
                if lending.lent:
                    self.lost += 1
                    _log.warning("extent %d stays away: the coordinator lends it no more", extent)
            elif not lending.lent:
                self._wanted.discard(extent)

    def _came_back(self, extent: int, start: int, end: int) -> None:
        back, unit = self._back[extent], self._unit
        back.add(start, end)
        first, last = start // unit, -(-end // unit)
        # At the ends others' bytes of the same unit may still be away.
        first += not back.contains(first * unit, first * unit + unit)
        last -= not back.contains(last * unit - unit, last * unit)
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
