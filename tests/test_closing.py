"""Leaving a `with` block closes what it was entered with."""

from __future__ import annotations

import pytest

from aqua_jax.closing import Closing


class Door(Closing):
    def __init__(self) -> None:
        self.closed = 0

    def close(self) -> int:
        self.closed += 1
        return self.closed


def test_it_is_open_inside_and_closed_once_afterwards() -> None:
    with Door() as door:
        assert isinstance(door, Door) and not door.closed
    assert door.closed == 1


def test_an_error_closes_it_and_goes_on() -> None:
    door = Door()
    with pytest.raises(ValueError, match="through it"), door:
        raise ValueError("through it")
    assert door.closed == 1


def test_what_does_not_say_how_to_close_cannot_be_made() -> None:
    class Hole(Closing):
        pass

    with pytest.raises(TypeError, match="close"):
        Hole()  # type: ignore[abstract]
