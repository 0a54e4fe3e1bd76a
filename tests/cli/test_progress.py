"""Progress on stderr, on a terminal and elsewhere."""

from __future__ import annotations

import logging
import time

import pytest

from aqua_jax import progress
from aqua_jax.progress import Progress, duration


@pytest.mark.parametrize(
    ("seconds", "words"), [(0, "0s"), (59.4, "59s"), (185, "3m05s"), (7810, "2h10m")]
)
def test_durations(seconds, words):
    assert duration(seconds) == words


def test_log_lines_say_share_rate_and_time_left(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    now = iter(range(0, 1000, 2))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(now)))
    with Progress(100, label="job", terminal=False) as bar:
        bar.skip(20)
        bar.restart_clock()
        for _ in range(6):
            bar.generated(30)
            bar.advance(10)
        bar.advance(5, failed=1)
    assert 3 <= len(caplog.messages) <= 8
    last = caplog.messages[-1]
    assert last.startswith("job: ") and "tok/s" in last and "left" in last
    assert "85%, 7 done, 1 errors" in bar.line()


def test_a_bar_on_a_terminal_and_nothing_when_off(capsys):
    with Progress(3, terminal=True) as bar:
        for _ in range(3):
            bar.advance(1, 10)
    shown = capsys.readouterr()
    assert shown.out == "" and "100%" in shown.err and "3 done" in shown.err
    with Progress(3, enabled=False, terminal=True) as bar:
        bar.advance(3)
    assert capsys.readouterr().err == ""


def test_resumed_work_counts_into_the_share_but_not_the_rate():
    bar = Progress(100, enabled=False)
    bar.skip(90)
    assert bar.line().startswith("90%, 0 done, 0 tok/s")
    assert progress.LOG_EVERY_S >= 1
