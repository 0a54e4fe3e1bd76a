"""What memory needs before a device copies from and to it, as the rooms without jax see it."""

from __future__ import annotations

from typing import Protocol


class Pins(Protocol):
    """Makes host memory ready for a device's copies; `ops.pinning.HostPins` on GPUs.

    Both calls take about as long as writing to the memory: not for the step loop.
    """

    def pin(self, address: int, nbytes: int) -> None:
        """Readies [address, address + nbytes), whole pages of the system.

        Raises:
          ArenaError: it can't be done.
        """

    def unpin(self, address: int, nbytes: int) -> None:
        """Undoes one `pin` of the same piece, once no copy is under way in it.

        Raises:
          ArenaError: it isn't ready.
        """
