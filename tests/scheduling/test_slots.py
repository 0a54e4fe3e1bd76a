"""Slots and their epochs."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aqua_jax.errors import StaleHandleError
from aqua_jax.scheduling.slots import Slots
from tests.scale import scaled


def test_the_lowest_slot_is_handed_out_first():
    slots = Slots(3)
    assert [slots.acquire()[0] for _ in range(3)] == [0, 1, 2]
    assert slots.acquire() is None
    for slot in (2, 0):
        slots.release(slot, 1)
    assert slots.acquire() == (0, 2)


def test_results_of_an_earlier_holder_are_told_apart():
    slots = Slots(1)
    old = slots.acquire()
    assert slots.current(*old)
    slots.release(*old)
    assert not slots.current(*old)
    new = slots.acquire()
    assert new[0] == old[0]
    assert slots.current(*new)
    assert not slots.current(*old)
    with pytest.raises(StaleHandleError, match="epoch"):
        slots.release(*old)
    slots.release(*new)
    with pytest.raises(StaleHandleError, match="epoch"):
        slots.release(*new)
    assert slots.available == 1
    assert not slots.current(7, 1)


@given(st.lists(st.integers(0, 5), max_size=60))
@settings(max_examples=scaled(50), deadline=None)
def test_a_slot_has_one_holder(choices):
    slots, held, seen = Slots(4), [], set()
    for choice in choices:
        if choice < len(held):
            slots.release(*held.pop(choice))
        else:
            taken = slots.acquire()
            assert (taken is None) == (len(held) == 4)
            if taken is not None:
                assert taken not in seen
                seen.add(taken)
                held.append(taken)
        assert slots.available == 4 - len(held)
        assert len({slot for slot, _ in held}) == len(held)
        assert all(slots.current(*holder) for holder in held)
