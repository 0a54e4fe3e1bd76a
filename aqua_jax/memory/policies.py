"""Which tier an offloaded content belongs in: two policies, and what one's own must answer.

Tiers have names: "peer" (memory that other processes lend), "host" (memory of this process). The
name "none" in an answer of `demote` means: drop it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol

from aqua_jax.errors import ConfigError

NONE = "none"
TIERS = ("peer", "host")


@dataclasses.dataclass(frozen=True)
class TierView:
    """A tier as a policy sees it; bytes.

    Attributes:
      used: what contents take.
      free: what can be had without asking anybody.
      wanted: what the owners of the memory want back now.
    """

    used: int
    free: int
    wanted: int


class Policy(Protocol):
    """Decides tiers; asked with a lock held, so it answers at once. Unknown names are passed over.

    Large contents lie in chunks of some MiB, and move chunk by chunk.

    """

    @property
    def mirror(self) -> str | None:
        """Name of a tier that keeps a copy of everything; None: none does."""

    def place(self, size: int, tiers: Mapping[str, TierView]) -> Sequence[str]:
        """Where something new of `size` bytes goes: the tiers to try, best first.

        With the first ones full, the rest of its chunks go to the next. Empty: nowhere.
        """

    def demote(self, size: int, tier: str, tiers: Mapping[str, TierView]) -> Sequence[str]:
        """Where a chunk of `size` bytes goes that must leave `tier`: the tiers to try, best first.

        `tier` itself means other memory of the same tier. With "none" it is dropped, and fetching
        it raises ContentLostError. When nothing has room it stays, and the lender waits for it.
        """

    def climb(self, size: int, tier: str, tiers: Mapping[str, TierView]) -> Sequence[str]:
        """Better tiers for a chunk that lies in `tier`, best first. Empty: it stays."""


@dataclasses.dataclass(frozen=True)
class Static:
    """One tier for everything; never climbs.

    Attributes:
      tier: "peer" or "host".
      spill: where content goes when the tier wants its memory back, best first; ("none",) drops
        it, which suits what can be computed again.
      mirror: a tier that keeps a copy of everything.

    Raises:
      ConfigError: a name that isn't a tier's.
    """

    tier: str
    spill: tuple[str, ...] = ("host",)
    mirror: str | None = None

    def __post_init__(self) -> None:
        _check("tier", (self.tier,))
        _check("spill", self.spill, NONE)
        _check("mirror", () if self.mirror is None else (self.mirror,))

    def place(self, size: int, tiers: Mapping[str, TierView]) -> Sequence[str]:
        """That tier."""
        return (self.tier,)

    def demote(self, size: int, tier: str, tiers: Mapping[str, TierView]) -> Sequence[str]:
        """Other memory of the tier, then `spill`."""
        return (tier, *self.spill)

    def climb(self, size: int, tier: str, tiers: Mapping[str, TierView]) -> Sequence[str]:
        """Nothing climbs."""
        return ()


@dataclasses.dataclass(frozen=True)
class Dynamic:
    """The best tier that has room; down when memory is wanted back, up again when there is room.

    Attributes:
      tiers: best first; "none" at the end drops what has no room anywhere when it must move.
      mirror: a tier that keeps a copy of everything; "host" makes a lender's death harmless.

    Raises:
      ConfigError: a name that isn't a tier's, or none at all.
    """

    tiers: tuple[str, ...] = TIERS
    mirror: str | None = None

    def __post_init__(self) -> None:
        _check("tiers", self.tiers[:-1])
        _check("tiers", self.tiers[-1:], NONE)
        if not set(self.tiers) & set(TIERS) or len(set(self.tiers)) < len(self.tiers):
            raise ConfigError("tiers", self.tiers, f"some of {TIERS}, each once")
        _check("mirror", () if self.mirror is None else (self.mirror,))

    def place(self, size: int, tiers: Mapping[str, TierView]) -> Sequence[str]:
        """All tiers, best first."""
        return self.tiers

    def demote(self, size: int, tier: str, tiers: Mapping[str, TierView]) -> Sequence[str]:
        """Other memory of the same tier, then those below it."""
        return self.tiers[self.tiers.index(tier):] if tier in self.tiers else self.tiers

    def climb(self, size: int, tier: str, tiers: Mapping[str, TierView]) -> Sequence[str]:
        """The tiers above."""
        return self.tiers[: self.tiers.index(tier)] if tier in self.tiers else ()


def _check(field: str, names: Sequence[str], *more: str) -> None:
    allowed = (*TIERS, *more)
    for name in names:
        if name not in allowed:
            raise ConfigError(field, name, f"one of {allowed}")
