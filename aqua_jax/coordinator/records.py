"""What the ledger writes down, and what it asks to be told: plain data."""

from __future__ import annotations

import dataclasses
import mmap

from aqua_jax.coordinator.intervals import Intervals
from aqua_jax.errors import LedgerError

PAGE = mmap.PAGESIZE
MOST = 2**62  # bytes and ids beyond this are mistakes
MOST_PIECES = 64
# Ranges of one consumer. Whatever is asked costs some microseconds for each that there is, of
# whomever, and everybody waits for it: with 3,000 ranges of a page each 15 ms.
MOST_RANGES = 1024
# Kinds of memory that the host can't read or write: their lenders zero them.
DEVICE_KINDS = frozenset({"cuda"})
Span = tuple[int, int]


def round_up(size: int) -> int:
    """`size` as a whole number of the operating system's pages."""
    return -(-size // PAGE) * PAGE


def whole(field: str, value: object, low: int = 0, high: int = MOST) -> int:
    """`value`, if it is an integer from `low` to `high`.

    Raises:
      LedgerError: it isn't.
    """
    if type(value) is not int or not low <= value <= high:
        raise LedgerError(field, value, f"an integer from {low} to {high}")
    return value


def label(field: str, value: object, most: int = 200) -> str:
    """`value`, if it is printable text of at most `most` characters.

    Raises:
      LedgerError: it isn't.
    """
    if not isinstance(value, str) or len(value) > most or not value.isprintable():
        raise LedgerError(field, value, f"at most {most} printable characters")
    return value


@dataclasses.dataclass(frozen=True)
class ArenaTerms:
    """What a producer says of an arena when it registers it.

    Attributes:
      size: bytes, whole pages.
      name: told to people.
      kind: of memory: "host", "cuda", ...
      domain: where it is, from the outside in: "node0/gpu1". Consumers prefer what is near.
      bandwidth: bytes/s that copies to it may reach; 0: unknown.
      cap: bytes/s that a borrower may use; 0: all. The borrower's pager keeps it.
      scrub: zeroed before its owner gets it back.
      device: that it is on, by a name that all processes know; "" for the host's.
    """

    size: int
    name: str = ""
    kind: str = "host"
    domain: str = ""
    bandwidth: int = 0
    cap: int = 0
    scrub: bool = False
    device: str = ""

    def __post_init__(self) -> None:
        whole("size", self.size, PAGE)
        if self.size % PAGE:
            raise LedgerError("size", self.size, f"a multiple of {PAGE}")
        label("name", self.name)
        label("kind", self.kind, 32)
        label("domain", self.domain)
        label("device", self.device)
        whole("bandwidth", self.bandwidth)
        whole("cap", self.cap)

    @property
    def on_device(self) -> bool:
        """Whether the host can't read or write it."""
        return self.kind in DEVICE_KINDS


@dataclasses.dataclass
class Range:
    """Consecutive bytes of one arena that one consumer holds; the unit that generations fence.

    Attributes:
      generation: its name, never used again.
      lease: the lease it is part of; one request, one lease.
      owner: the consumer's key.
      arena: the arena's id.
      offset: where it was granted; bytes from the arena's start.
      size: bytes granted at first.
      held: what of it hasn't been given back, in the arena's offsets.
      keep: bytes the owner may keep; `size` when nothing is wanted back.
      deadline: when the rest should be back, by the ledger's clock; None when nothing is wanted.
      priority: ranges of lower priority are asked for first.
      since: when it was granted, by the ledger's clock.
      disowned: its owner has been told that it is lost, before its producer came back: all of it is
        wanted back whatever the producer wants.
    """

    generation: int
    lease: int
    owner: int
    arena: int
    offset: int
    size: int
    held: Intervals
    keep: int
    priority: int
    since: float
    deadline: float | None = None
    disowned: bool = False

    @property
    def wanted(self) -> int:
        """Bytes the owner is asked to give back."""
        return max(0, self.held.total - self.keep)


@dataclasses.dataclass
class Arena:
    """An arena's bytes: each lent one is free, dirty, being scrubbed, or held by one range.

    The others are the producer's own.

    Attributes:
      id: its name, never used again.
      producer: the key of the client that lends it.
      terms: as registered.
      limit: bytes the producer wants to lend at most.
      deadline: when what is above the limit should be back; None when nothing is.
      free: zeroed; may be granted.
      dirty: held bytes of somebody once.
      scrubbing: being zeroed now.
      scrub: the number under which its lender was asked to zero `scrubbing`, if it was.
      ranges: by generation, oldest first.
    """

    id: int
    producer: int
    terms: ArenaTerms
    limit: int
    free: Intervals
    dirty: Intervals
    scrubbing: Intervals
    ranges: dict[int, Range]
    deadline: float | None = None
    scrub: int = 0

    @property
    def held(self) -> int:
        """Bytes that consumers hold."""
        return sum(found.held.total for found in self.ranges.values())

    @property
    def lent(self) -> int:
        """Bytes that aren't the producer's own."""
        return self.free.total + self.dirty.total + self.scrubbing.total + self.held

    @property
    def excess(self) -> int:
        """Bytes that the producer wants and hasn't got."""
        return max(0, self.lent - self.limit)


@dataclasses.dataclass
class Client:
    """A process, or one connection of it: producer, consumer, or both.

    Attributes:
      key: its name, a secret between it and the coordinator.
      name: told to people.
      domain: where it runs; see `ArenaTerms`.
      identity: process id and start time, which together name a process for ever.
      expires: when its term ends unless renewed, by the ledger's clock.
      connected: whether it is connected now.
      expired: whether its term has ended; what it holds is quarantined then.
      killed: whether its end has been asked for.
    """

    key: int
    name: str
    domain: str
    identity: tuple[int, int]
    expires: float
    connected: bool = True
    expired: bool = False
    killed: bool = False


@dataclasses.dataclass(frozen=True)
class Lease:
    """What one request was granted.

    Attributes:
      id: its name.
      ranges: at least one.
    """

    id: int
    ranges: tuple[Range, ...]

    @property
    def size(self) -> int:
        """Bytes granted."""
        return sum(piece.size for piece in self.ranges)


@dataclasses.dataclass(frozen=True)
class Refused:
    """Why a request wasn't granted; asking again later may help.

    Attributes:
      reason: "room" (there isn't so much, or not in so few pieces) or "quota" (of bytes, or
        `MOST_RANGES`).
      free: bytes that could be granted to it.
      longest: the longest of them in one piece.
      cleaning: whether what is there would be enough once all of it has been zeroed.
    """

    reason: str
    free: int
    longest: int
    cleaning: bool


@dataclasses.dataclass(frozen=True)
class Claim:
    """A range as its owner remembers it: what it still has mapped."""

    generation: int
    arena: int
    held: tuple[Span, ...]


@dataclasses.dataclass(frozen=True)
class Entry:
    """A range as an arena's journal remembers it, with its owner; see `Range` and `Client`."""

    generation: int
    lease: int
    owner: int
    owner_name: str
    identity: tuple[int, int]
    offset: int
    size: int
    held: tuple[Span, ...]
    priority: int
    since: float


@dataclasses.dataclass(frozen=True)
class Revoke:
    """Tell a consumer how much of a range it may keep, and by when the rest should be back."""

    client: int
    generation: int
    keep: int
    deadline: float | None


@dataclasses.dataclass(frozen=True)
class Lost:
    """Tell a consumer that a range's producer is gone, and with it what was stored there."""

    client: int
    generation: int


@dataclasses.dataclass(frozen=True)
class Returned:
    """Tell a producer that bytes of its arena are its own again."""

    client: int
    arena: int
    start: int
    end: int


@dataclasses.dataclass(frozen=True)
class Scrub:
    """Tell a lender to zero a range of its device's memory, and to say so under the number."""

    client: int
    arena: int
    start: int
    end: int
    number: int


@dataclasses.dataclass(frozen=True)
class Kill:
    """End a consumer's process, which keeps memory beyond all limits."""

    client: int


Event = Revoke | Lost | Returned | Kill
