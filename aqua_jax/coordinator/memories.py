"""The arenas' memory and journals as the coordinator has them: descriptors, and zeroing."""

from __future__ import annotations

import dataclasses
import os

from aqua_jax.coordinator.door import check_memory
from aqua_jax.coordinator.journal import Journal
from aqua_jax.coordinator.records import ArenaTerms, Entry
from aqua_jax.errors import LedgerError

_ZEROS = bytes(1 << 20)


@dataclasses.dataclass
class Memory:
    """One arena's descriptors, owned.

    Attributes:
      fd: of its memory.
      identity: device and inode, which no two arenas of host memory share; none for a device's,
        whose descriptors all look alike.
      journal: who holds what of it.
    """

    fd: int
    identity: tuple[int, int] | None
    journal: Journal

    def close(self) -> None:
        """Lets go of both."""
        os.close(self.fd)
        self.journal.close()


class Memories:
    """All arenas' memory, by arena."""

    def __init__(self) -> None:
        self._of: dict[int, Memory] = {}

    def __contains__(self, arena: int) -> bool:
        return arena in self._of

    def __getitem__(self, arena: int) -> Memory:
        return self._of[arena]

    def check(
        self, fds: list[int], terms: ArenaTerms, lent: int, *, returning: bool, arena: int = 0
    ) -> tuple[int, int] | None:
        """The identity of memory that is to become an arena.

        Nothing can be seen of a device's memory but where it is mapped: its driver checks
        descriptor and size for each borrower.

        Args:
          fds: as they came: of the memory, and of its journal if it returns.
          terms: of the arena.
          lent: how many of them are lent.
          returning: whether an earlier coordinator knew it.
          arena: the arena it is already, if that is no mistake.

        Raises:
          LedgerError: it can't be trusted, or is another arena's already.
        """
        if len(fds) != 1 + returning:
            raise LedgerError("descriptors", len(fds), f"{1 + returning}")
        if terms.on_device:
            return None
        identity = check_memory(fds[0], terms.size, lent)
        for number, known in self._of.items():
            if known.identity == identity and number != arena:
                # Otherwise two borrowers could be given the same bytes.
                raise LedgerError("descriptor", identity, "memory that isn't lent already")
        if arena in self._of and self._of[arena].identity != identity:
            raise LedgerError("descriptor", identity, "the arena's")
        return identity

    def add(self, arena: int, memory: Memory) -> None:
        """Takes in a new arena's."""
        self._of[arena] = memory

    def keep(self, arenas: set[int]) -> None:
        """Closes all others."""
        for arena in [number for number in self._of if number not in arenas]:
            self._of.pop(arena).close()

    def write(self, arena: int, entries: list[Entry]) -> None:
        """Writes an arena's journal.

        Raises:
          OSError: no memory for it.
        """
        self._of[arena].journal.write(entries)


def zero(fd: int, start: int, end: int) -> None:
    """Overwrites [start, end) of a file with zeros, others running meanwhile; closes `fd`.

    Raises:
      OSError: it can't be written.
    """
    try:
        while start < end:
            start += os.pwrite(fd, memoryview(_ZEROS)[: end - start], start)
    finally:
        os.close(fd)
