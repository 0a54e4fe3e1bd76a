"""Extents against a byte-by-byte model."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from aqua_jax.errors import StaleHandleError, StoreError
from aqua_jax.memory.arena import PAGE
from aqua_jax.memory.extents import ALIGN, Extent, Extents
from tests.scale import scaled

SIZE = 5 * PAGE


class ExtentsMachine(RuleBasedStateMachine):
    extents = Bundle("extents")

    def __init__(self):
        super().__init__()
        self.real = Extents(SIZE)
        self.units = [0] * (SIZE // ALIGN)  # 0 free, -1 gone, else the generation in use
        self.live = set()

    def _runs(self):
        """Lengths in units of the free runs."""
        runs, length = [], 0
        for unit in [*self.units, 1]:
            if unit == 0:
                length += 1
            elif length:
                runs.append(length)
                length = 0
        return runs

    @rule(target=extents, size=st.integers(1, 2 * PAGE))
    def allocate(self, size):
        units = -(-size // ALIGN)
        found = self.real.allocate(size)
        assert (found is not None) == (max(self._runs(), default=0) >= units)
        if found is None:
            return Extent(-1, 0, 0)
        start = found.offset // ALIGN
        assert found.offset % ALIGN == 0 and found.size == units * ALIGN
        assert self.units[start : start + units] == [0] * units, "not free"
        assert found.generation not in {e.generation for e in self.live}
        self.units[start : start + units] = [found.generation] * units
        self.live.add(found)
        return found

    @rule(extent=extents)
    def release(self, extent):
        assert self.real.holds(extent) == (extent in self.live)
        if extent not in self.live:
            with pytest.raises(StaleHandleError):
                self.real.release(extent)
            return
        self.real.release(extent)
        self.live.remove(extent)
        start = extent.offset // ALIGN
        self.units[start : start + extent.size // ALIGN] = [0] * (extent.size // ALIGN)

    @rule(extent=consumes(extents))
    def forget(self, extent):
        """Fewer stale handles to try."""

    @rule(most=st.integers(0, 3 * PAGE))
    def take_pages(self, most):
        page = PAGE // ALIGN
        free = [
            at for at in range(0, len(self.units), page)
            if not any(self.units[at : at + page])
        ]
        taken = self.real.take_pages(most)
        assert (taken is not None) == bool(free and most)
        if taken is not None:
            start, end = taken
            assert start % PAGE == end % PAGE == 0 and 0 < end - start < most + PAGE
            assert end == free[-1] * ALIGN + PAGE, "not from the end"
            assert self.units[start // ALIGN : end // ALIGN] == [0] * ((end - start) // ALIGN)
            self.units[start // ALIGN : end // ALIGN] = [-1] * ((end - start) // ALIGN)

    @invariant()
    def totals_agree(self):
        assert self.real.free == self.units.count(0) * ALIGN
        assert self.real.used == sum(extent.size for extent in self.live)
        assert self.real.longest == max(self._runs(), default=0) * ALIGN
        assert len(self.real) == len(self.live)


TestExtents = ExtentsMachine.TestCase
TestExtents.settings = settings(
    max_examples=scaled(25), stateful_step_count=40, deadline=None
)


def test_nothing_is_not_an_extent():
    for size in (0, -1):
        with pytest.raises(StoreError):
            Extents(PAGE).allocate(size)
    assert Extents(ALIGN - 1).allocate(1) is None
