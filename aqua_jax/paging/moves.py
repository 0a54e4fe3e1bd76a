"""What a plan asks of the copy queue: tokens of one page, between the pool and a store.

The planner decides moves and never waits for one. Whoever carries them out (`engine/pager.py`, a
simulator, a test's device) reports each with `Residency.finished`, in any order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from typing import NamedTuple, Protocol

from aqua_jax.paging.pages import PageHandle


class StoreSlot(Protocol):
    """A slot of a store and the generation in which it was handed out."""

    @property
    def id(self) -> int:
        """Its place in the store."""

    @property
    def generation(self) -> int:
        """Which life of the place this is."""


class Pace(Protocol):
    """How fast a lender lets copies to and from its memory be (`aqua_jax.memory.pace`)."""

    page_s: float

    @property
    def congested(self) -> bool:
        """Whether what is asked for already fills the time there is."""

    def room(self, size: int) -> bool:
        """Whether a copy of so many bytes would be admitted now."""

    def ask(self, what: Hashable, size: int) -> None:
        """A copy is planned."""

    def admit(self, what: Hashable) -> bool:
        """Whether it may begin now; if so it is under way."""

    def begin(self, what: Hashable, size: int) -> None:
        """A copy for which there was room is under way."""

    def ended(self, what: Hashable) -> None:
        """It has ended, or won't be made."""


class Store(Protocol):
    """What planning needs of a tier; `aqua_jax.memory.stores` has the real ones.

    Attributes:
      name: of the tier.
      slot_bytes: of a page.
      pace: of copies to and from it; None: as fast as they go.
    """

    name: str
    slot_bytes: int

    @property
    def pace(self) -> Pace | None:
        """See the class."""

    @property
    def growing(self) -> bool:
        """Whether it may have room in a moment, though it has none now."""

    @property
    def capacity(self) -> int:
        """Slots there are now, free or in use."""

    @property
    def free_slots(self) -> int:
        """Slots that `allocate` can hand out."""

    @property
    def lost(self) -> bool:
        """Whether everything in it has become a miss."""

    @property
    def wanted_slots(self) -> int:
        """Slots that the owner of the memory wants back now."""

    def allocate(self, count: int) -> list | None:
        """Hands out `count` slots, all or nothing; None when there aren't so many."""

    def retain(self, slot: StoreSlot) -> None:
        """Adds a reference; each is dropped by a `free`."""

    def free(self, slot: StoreSlot) -> None:
        """Drops a reference; with the last one the slot is free."""

    def fill(self, slot: StoreSlot, valid_tokens: int) -> None:
        """Notes how many tokens the slot holds now."""

    def holds(self, slot: StoreSlot) -> bool:
        """Whether the handle is good and its content readable."""


class Part(NamedTuple):
    """Tokens of a page that were copied out together, and what their bytes summed to."""

    start: int
    tokens: int
    checksum: int | None  # None: not computed


@dataclasses.dataclass(eq=False, slots=True)
class Move:
    """A copy of tokens start to start + count of a page. Compared by identity."""

    page: PageHandle  # in the pool
    store: Store
    slot: StoreSlot
    start: int
    count: int
    inward: bool  # from the store into the pool
    checksum: int | None = None  # inward: what the bytes must sum to; None: not compared


@dataclasses.dataclass(eq=False, slots=True)
class Shift:
    """A copy of a slot to another one, of the same store or another, beside the steps. Compared by
    identity.

    Whoever copies sets `done` when the bytes are there, from any thread; whether they still count
    is the planner's to find out. Both slots keep a reference until then; for ever if it `failed`,
    for nobody knows what is being written.
    """

    source: Store
    slot: StoreSlot
    target: Store
    place: StoreSlot
    done: bool = False
    failed: bool = False
