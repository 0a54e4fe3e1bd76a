"""Slots that lie in several lenders' memory at once, each with a part of every slot.

Where a model is on several devices each may page to a lender of its own, near it. A slot exists
only where every lender has its part, so what one of them does happens to whole slots: if it wants
memory back the others get as much of theirs, and if it goes all of it is lost. A planner sees one
store.
"""

from __future__ import annotations

from collections.abc import Sequence

from aqua_jax.errors import StoreError
from aqua_jax.memory.pace import JointPace
from aqua_jax.memory.slots import LentSlots, StoreSlot
from aqua_jax.memory.stores import PeerStore


class SplitStore(LentSlots):
    """Slots made of the slots of `parts`, which have equal numbers of them.

    Attributes:
      parts: a store for each lender; none of its slots is handed out by itself.
      homes: for each device the index of the part that has its bytes, and which ones of a slot
        there they are: the first ones, the second ones, ...
      device_bytes: of each device in a slot.
    """

    def __init__(
        self, parts: Sequence[PeerStore], homes: Sequence[int], page_tokens: int, *,
        name: str = "peer",
    ) -> None:
        """
        Args:
          parts: unused so far; owned. What one of them has more than others goes back.
          homes: for each device the index of its part; a part's slots are divided evenly among its
            devices.
          page_tokens: tokens of a page.
          name: in messages and metrics.

        Raises:
          StoreError: the devices' bytes of a slot differ.
        """
        shares = [homes.count(index) for index in range(len(parts))]
        slot_bytes = sum(part.slot_bytes for part in parts)
        self.device_bytes = slot_bytes // max(1, len(homes))
        sizes = [part.slot_bytes for part in parts]
        if not parts or sizes != [self.device_bytes * share for share in shares]:
            raise StoreError(f"slots of {sizes} bytes aren't even shares for devices at {homes}")
        capacity = min(part.capacity for part in parts)
        super().__init__(
            name, capacity * slot_bytes, slot_bytes, page_tokens, [part.lease for part in parts]
        )
        self.parts = tuple(parts)
        self.homes = tuple((home, homes[:rank].count(home)) for rank, home in enumerate(homes))
        if any(part.pace is not None for part in parts):
            self.pace = JointPace(
                [(part.pace, part.slot_bytes) for part in parts if part.pace is not None],
                slot_bytes,
            )
        self._trim(capacity)

    def _trim(self, capacity: int) -> None:
        for part in self.parts:
            part.give_back(max(0, part.capacity - capacity))

    @property
    def wanted_slots(self) -> int:
        """Slots that `retire` and `give_back` should let go to do what the lenders ask."""
        return 0 if self.lost else max(part.wanted_slots for part in self.parts)

    @property
    def pressed(self) -> bool:
        """Whether a lender's time for what it wants back is all but over."""
        return any(part.pressed for part in self.parts)

    @property
    def base(self) -> int:
        """There is none: see `spans`.

        Raises:
          StoreError: always.
        """
        raise StoreError(f"store {self.name} lies in {len(self.parts)} memories")

    def spans(self, slot: StoreSlot) -> list[tuple[int, int]]:
        """Where its bytes lie in this process, device by device: (address, bytes)."""
        self.check(slot)
        found = []
        for home, place in self.homes:
            part = self.parts[home]
            at = part.base + slot.id * part.slot_bytes + place * self.device_bytes
            found.append((at, self.device_bytes))
        return found

    def close(self) -> None:
        """Gives everything back; every handle is stale. No copy may be under way. Repeatable."""
        super().close()
        for part in self.parts:
            part.close()
