"""Where leases come from: one lender's socket, or a coordinator's, which knows many lenders."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from socket import SOCK_SEQPACKET
from typing import TYPE_CHECKING, Protocol

from aqua_jax.coordinator import sockets
from aqua_jax.errors import LenderError
from aqua_jax.memory.arena import PAGE
from aqua_jax.memory.borrower import Borrower
from aqua_jax.memory.lease import Lease
from aqua_jax.memory.mapping import Mapper

if TYPE_CHECKING:
    from aqua_jax.memory.client import Client

# Smaller leases aren't worth a mapping.
LEAST = 1 << 20
# Leases that one question to a coordinator may be answered with.
PIECES = 8


class LeaseSource(Protocol):
    """Somebody to borrow from. One call at a time; each may wait for the other side."""

    def borrow(self, size: int) -> Sequence[Lease]:
        """Leases of at most `size` bytes (rounded up to whole pages), as much as can be had.

        Returns:
          None of them when there is no room worth having.

        Raises:
          LenderError, CoordinatorError: nobody answers.
        """

    def close(self) -> None:
        """Gives every lease back and ends the connection; may be repeated."""


class LenderSource:
    """A lender at a socket (`aqua-jax lend --listen=PATH`); connects again when it has restarted.

    Raises:
      LenderError: nobody answers there now.
    """

    def __init__(
        self, path: str, *, name: str = "", timeout_s: float = 2.0, unit: int = PAGE,
        mappers: dict[str, Mapper] | None = None,
    ) -> None:
        """
        Args:
          path: of the socket, or @name.
          name: shown in the lender's status lines.
          timeout_s: for each question to the lender.
          unit: bytes that must be in one piece to be of use.
          mappers: for devices' memory, by kind.
        """
        self._path, self._name, self._timeout_s, self._unit = path, name, timeout_s, unit
        self._mappers = mappers
        self._closed = False
        self._borrower = self._connect()
        # Earlier connections, and what is left of their leases.
        self._former: list[tuple[Borrower, list[Lease]]] = []
        self._leases: list[Lease] = []

    def _connect(self) -> Borrower:
        return Borrower(
            self._path, name=self._name, timeout_s=self._timeout_s, mappers=self._mappers
        )

    def borrow(self, size: int) -> Sequence[Lease]:
        """A lease of at most `size` bytes, as much as the lender has in one piece.

        Raises:
          LenderError: nobody answers.
        """
        if self._closed:
            return ()
        self._tidy()
        if not self._borrower.alive:
            fresh = self._connect()
            self._former.append((self._borrower, self._leases))
            self._borrower, self._leases = fresh, []
            self._tidy()
        status = self._borrower.status()
        room = 0 if status["asked"] else min(status["free"], status["limit"] - status["lent"])
        size = min(size, room)
        # What is free may be in pieces; small ones are better than nothing of a small rest.
        least = max(1, min(self._unit, room), min(LEAST, size // PIECES))
        while size >= least:
            lease = self._borrower.borrow(size)
            if lease is not None:
                lease.lender = self._borrower.lender_name or self._path
                self._leases.append(lease)
                return (lease,)
            size //= 2
        return ()

    def _tidy(self) -> None:
        """Ends earlier connections whose leases have been closed."""
        self._leases = [lease for lease in self._leases if not lease.closed]
        kept = []
        for borrower, leases in self._former:
            if all(lease.closed for lease in leases):
                borrower.close()
            else:
                kept.append((borrower, leases))
        self._former = kept

    def close(self) -> None:
        """Gives every lease back and ends the connection; may be repeated."""
        self._closed = True
        with contextlib.suppress(LenderError):
            self._borrower.close()
        for borrower, _ in self._former:
            borrower.close()


class CoordinatorSource:
    """A coordinator at a socket (`aqua-jax coordinator --socket=PATH`): leases of several lenders.

    While it is away its leases stay what they are.

    Raises:
      CoordinatorError: nobody answers there now.
      DependencyError: gRPC isn't installed.
    """

    def __init__(
        self, path: str, *, name: str = "", timeout_s: float = 2.0, unit: int = PAGE,
        client: Client | None = None, domain: str = "", mappers: dict[str, Mapper] | None = None,
    ) -> None:
        """
        Args:
          path: of the socket, or @name.
          name: shown in the coordinator's status, and in its quotas.
          timeout_s: for each question to the coordinator.
          unit: bytes that must be in one piece to be of use.
          client: connected there, the caller's; what it lends is not borrowed. None: one's own.
          domain: where this process is; near memory is lent first.
          mappers: for devices' memory, by kind.
        """
        from aqua_jax.memory.client import Client  # gRPC, which a lender alone doesn't need

        self._unit, self._shared = unit, client is not None
        self._client = client or Client(path, name=name, domain=domain, timeout_s=timeout_s)
        self._client.mappings.mappers.update(mappers or {})

    def borrow(self, size: int) -> Sequence[Lease]:
        """Leases of at most `size` bytes in all, as much as there is and the quota allows.

        Raises:
          CoordinatorError: nobody answers.
        """
        unit = self._unit
        size = max(unit, size // unit * unit)
        # Small leases are better than none, and than nothing of a small rest.
        least = max(unit, min(LEAST, size // PIECES) if self._client.loans else unit)
        return self._client.borrow(size, unit=unit, pieces=PIECES, minimum=least) or ()

    def close(self) -> None:
        """Gives every lease back and ends the connection, if it is its own; may be repeated."""
        if not self._shared:
            self._client.close()
            return
        for loan in self._client.loans:
            loan.close()


def is_coordinator(socket: str, timeout_s: float = 2.0) -> bool:
    """Whether a coordinator answers at a socket: only it has a second one, for descriptors."""
    with contextlib.suppress(LenderError):
        sockets.connect(sockets.door_of(socket), timeout_s, SOCK_SEQPACKET).close()
        return True
    return False


def connect(
    socket: str, *, name: str = "", timeout_s: float = 2.0, unit: int = PAGE, domain: str = "",
    mappers: dict[str, Mapper] | None = None,
) -> LeaseSource:
    """A source of leases at a socket, a coordinator's or a lender's.

    Args:
      socket: its path, or @name.
      name: shown to people, and in quotas.
      timeout_s: for each question.
      unit: bytes that must be in one piece to be of use.
      domain: where this process is; a coordinator lends near memory first.
      mappers: for devices' memory, by kind.

    Raises:
      LenderError: nobody answers there.
      CoordinatorError: a coordinator's socket, and it doesn't answer.
      DependencyError: it is a coordinator's, and gRPC isn't installed.
      ConfigError: no possible path.
    """
    if is_coordinator(socket, timeout_s):
        return CoordinatorSource(
            socket, name=name, timeout_s=timeout_s, unit=unit, domain=domain, mappers=mappers
        )
    return LenderSource(socket, name=name, timeout_s=timeout_s, unit=unit, mappers=mappers)
