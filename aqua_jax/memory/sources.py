"""Where leases come from: a lender's socket now, whatever else answers the same three questions."""

from __future__ import annotations

import contextlib
from typing import Protocol

from aqua_jax.errors import LenderError
from aqua_jax.memory.borrower import Borrower
from aqua_jax.memory.lease import Lease

# Smaller leases aren't worth a mapping.
LEAST = 1 << 20


class LeaseSource(Protocol):
    """Somebody to borrow from. One call at a time; each may wait for the other side."""

    def borrow(self, size: int) -> Lease | None:
        """A lease of at most `size` bytes (rounded up to whole pages), as much as can be had.

        Returns:
          None when there is no room worth having.

        Raises:
          LenderError: nobody answers.
        """

    def close(self) -> None:
        """Gives every lease back and ends the connection; may be repeated."""


class LenderSource:
    """A lender at a socket (`aqua-jax lend --listen=PATH`); connects again when it has restarted.

    Raises:
      LenderError: nobody answers there now.
    """

    def __init__(self, path: str, *, name: str = "", timeout_s: float = 2.0) -> None:
        """
        Args:
          path: of the socket, or @name.
          name: shown in the lender's status lines.
          timeout_s: for each question to the lender.
        """
        self._path, self._name, self._timeout_s = path, name, timeout_s
        self._closed = False
        self._borrower = self._connect()
        self._former: list[Borrower] = []

    def _connect(self) -> Borrower:
        return Borrower(self._path, name=self._name, timeout_s=self._timeout_s)

    def borrow(self, size: int) -> Lease | None:
        """A lease of at most `size` bytes, as much as the lender has in one piece.

        Raises:
          LenderError: nobody answers.
        """
        if self._closed:
            return None
        if not self._borrower.alive:
            fresh = self._connect()
            self._former.append(self._borrower)  # its leases are still mapped
            self._borrower = fresh
        status = self._borrower.status()
        room = 0 if status["asked"] else min(status["free"], status["limit"] - status["lent"])
        size = min(size, room)
        # What is free may be in pieces.
        while size >= min(LEAST, room) > 0:
            lease = self._borrower.borrow(size)
            if lease is not None:
                return lease
            size //= 2
        return None

    def close(self) -> None:
        """Gives every lease back and ends the connection; may be repeated."""
        self._closed = True
        with contextlib.suppress(LenderError):
            self._borrower.close()
        for borrower in self._former:
            borrower.close()


def connect(socket: str, *, name: str = "", timeout_s: float = 2.0) -> LeaseSource:
    """A source of leases at a socket.

    Raises:
      LenderError: nobody answers there.
      ConfigError: no possible path.
    """
    return LenderSource(socket, name=name, timeout_s=timeout_s)
