"""A lender's bandwidth term: whatever happens when, no window has more bytes than it may."""

from __future__ import annotations

import random

import pytest

from aqua_jax.errors import ConfigError
from aqua_jax.memory.pace import WINDOW_S, Pace
from tests.scale import scaled


def most_in_a_window(copies: list[tuple[float, int]], window: float) -> int:
    """Of (time, bytes), sorted by time."""
    most = first = inside = 0
    for at, size in copies:
        inside += size
        while copies[first][0] < at - window:
            inside -= copies[first][1]
            first += 1
        most = max(most, inside)
    return most


@pytest.mark.parametrize("seed", range(scaled(20)))
def test_no_window_has_more_than_the_cap(seed):
    """Copies happen at any moment between their admission and when their end is seen."""
    rng, now = random.Random(seed), [0.0]
    page = rng.choice([4096, 100_000, 400_000])
    cap = rng.choice([page, 10 * page, 100 * page, 3_333_333])
    pace = Pace(cap, page, clock=lambda: now[0])
    window = max(WINDOW_S, page / cap)
    waiting: list[int] = []
    under_way: list[tuple[int, int, float]] = []
    copies: list[tuple[float, int]] = []
    number = admitted = late = 0
    refused: set[tuple[int, int]] = set()
    while admitted < 400:
        if rng.random() < 0.7:
            number += 1
            size = page if rng.random() < 0.7 else rng.randrange(1, page)
            pace.ask((number, size), size)
            waiting.append((number, size))
        for what in list(waiting):
            if pace.admit(what):
                waiting.remove(what)
                under_way.append((*what, now[0]))
                admitted += 1
                late += what in refused
                continue
            refused.add(what)
            if rng.random() < 0.02:
                pace.ended(what)  # not wanted any more
                waiting.remove(what)
        if not under_way and waiting:
            # It says when the next one may go, and not too late.
            now[0] += pace.ready_in() + 1e-9
            assert any(pace.room(size) for _, size in waiting)
        now[0] += rng.random() * 0.03
        for one in list(under_way):
            if rng.random() < 0.5:
                pace.ended(one[:2])
                copies.append((rng.uniform(one[2], now[0]), one[1]))
                under_way.remove(one)
    copies.sort()
    assert most_in_a_window(copies, window) <= max(page, cap * window)
    assert most_in_a_window(copies, 0.1) <= cap * 0.1 + page
    assert pace.delayed == late and (pace.delay_s > 0) == (late > 0)
    if late > admitted / 2:  # they are asked for faster than they may go
        # Nor far less: copies here take long, and count until they are seen to have ended.
        assert sum(size for _, size in copies) >= 0.2 * cap * copies[-1][0]
    for what in waiting:
        pace.ended(what)
    for one in under_way:
        pace.ended(one[:2])
    now[0] += 10
    assert not pace.congested and pace.room(page) and pace.ready_in() == 0.0


def test_what_is_asked_for_makes_it_congested():
    pace = Pace(10_000, 100, clock=lambda: 0.0)  # ten pages in a window
    for number in range(9):
        pace.ask(number, 100)
    assert not pace.congested
    pace.ask(9, 100)
    assert pace.congested and pace.room(100)
    assert all(pace.admit(number) for number in range(10))
    assert pace.congested and not pace.room(1)
    pace.ask(10, 100)
    assert not pace.admit(10) and pace.ready_in() == float("inf")
    pace.ended("never heard of")


@pytest.mark.parametrize(("cap", "page"), [(0, 1), (-1, 1), (1, 0)])
def test_no_rate_or_size(cap, page):
    with pytest.raises(ConfigError):
        Pace(cap, page)
