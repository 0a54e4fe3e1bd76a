"""Ranges against a plain set of integers."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aqua_jax.coordinator.intervals import Intervals
from aqua_jax.errors import StoreError
from tests.scale import scaled

SIZE = 24
OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["add", "remove", "take", "take_some"]), st.integers(-1, SIZE),
        st.integers(-1, SIZE),
    ),
    max_size=30,
)


@settings(max_examples=scaled(150))
@given(OPERATIONS)
def test_same_as_a_set(operations):
    ranges, model = Intervals(), set()
    for name, a, b in operations:
        wanted = set(range(a, b))
        if name == "add":
            if 0 <= a < b and not wanted & model:
                ranges.add(a, b)
                model |= wanted
            else:
                with pytest.raises(StoreError):
                    ranges.add(a, b)
        elif name == "remove":
            assert ranges.contains(a, b) == (a < b and wanted <= model)
            if a < b and wanted <= model:
                ranges.remove(a, b)
                model -= wanted
            else:
                with pytest.raises(StoreError):
                    ranges.remove(a, b)
        elif name == "take" and a > 0:
            starts = [s for s in range(SIZE) if set(range(s, s + a)) <= model]
            assert ranges.take(a) == (starts[0] if starts else None)
            model -= set(range(starts[0], starts[0] + a)) if starts else set()
        elif name == "take_some":
            taken = ranges.take_some(a)
            assert (taken is None) == (not model or a < 1)
            if taken:
                assert 0 < taken[1] - taken[0] <= a and taken[1] == max(model) + 1
                assert set(range(*taken)) <= model
                model -= set(range(*taken))
        assert {n for low, high in ranges for n in range(low, high)} == model
        assert ranges.total == len(model)
        pieces = list(ranges)
        assert all(x[1] < y[0] for x, y in zip(pieces, pieces[1:], strict=False))
        assert ranges.longest == max((high - low for low, high in pieces), default=0)
