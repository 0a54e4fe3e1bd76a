"""Bytes at equal first tokens and pauses."""

from __future__ import annotations

import pytest

from aqua_jax.simulation.bars import Bar, bars, rounded, table


def point(
    ttft: float, gap: float, out: float, back: float, rate: float = 500.0
) -> dict[str, float]:
    return {
        "ttft_p99_s": ttft, "worst_gap_s": gap, "bytes_out": out, "bytes_in": back,
        "output_tok_s": rate,
    }


RESULTS = {
    "fair@peer/5": point(1.0, 2.0, 30.0, 70.0),
    "fair@peer/40": point(1.0, 6.0, 10.0, 20.0),
    "aqua_reference/5": point(0.5, 10.0, 20.0, 40.0),
    "aqua_reference/40": point(0.5, 20.0, 5.0, 5.0, 321.0),
    "vllm": point(4.0, 3.0, 0.0, 0.0),
}


def test_the_cheapest_settings_that_keep_a_bar_are_compared() -> None:
    # Gaps of 10 s: fair takes its long slices. Gaps of 20 s: the rival may take its own as well.
    assert bars(RESULTS, "fair", "aqua_reference") == [
        Bar(1.0, 10.0, "fair@peer/40", "aqua_reference/5", 30.0, 60.0, 500.0, 500.0),
        Bar(1.0, 20.0, "fair@peer/40", "aqua_reference/40", 30.0, 10.0, 500.0, 321.0),
    ]
    assert [bar.kept for bar in bars(RESULTS, "fair", "aqua_reference")] == [True, False]


def test_nobody_is_asked_for_what_he_cannot_keep() -> None:
    found = bars(RESULTS, "fair", "vllm")
    assert [(bar.ttft_p99_s, bar.worst_gap_s, bar.ours) for bar in found] == [
        (5.0, 3.0, "fair@peer/5"), (5.0, 7.0, "fair@peer/40"),
    ]


def test_equal_choices_are_told_once_at_their_tightest_bar() -> None:
    results = {**RESULTS, "aqua_reference/20": point(0.6, 15.0, 30.0, 30.0)}
    assert bars(results, "fair", "aqua_reference") == bars(RESULTS, "fair", "aqua_reference")


def test_a_table_says_where_it_moves_more() -> None:
    text = table(RESULTS, "fair", "At equal bars:")
    assert "fair moves no more than aqua_reference at 1 of 2 bars that both keep" in text
    assert [line.endswith("more") for line in text.splitlines() if "aqua_reference/" in line] == [
        False, True,
    ]


def test_bars_are_round_so_that_chance_makes_none() -> None:
    assert [rounded(value) for value in (0.0, 0.011, 0.3, 1.0, 1.01, 6.0, 7.2, 88.0)] == (
        pytest.approx([0.0, 0.015, 0.3, 1.0, 1.5, 7.0, 10.0, 100.0])
    )
    results = {**RESULTS, "fair@peer/80": point(1.03, 6.2, 9.0, 20.0)}
    assert {bar.ttft_p99_s for bar in bars(results, "fair", "aqua_reference")} == {1.0, 1.5}
