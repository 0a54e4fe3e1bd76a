"""Latency figures from arrival times."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aqua_jax.bench.latency import fold, percentile, request_metrics, spread

NUMBERS = st.lists(st.floats(0, 1e6), min_size=1, max_size=30)


@given(NUMBERS, st.integers(0, 100))
def test_percentile_equals_numpys(values, share):
    assert percentile(values, share) == pytest.approx(float(np.percentile(values, share)))


@pytest.mark.parametrize(("values", "share"), [([], 50), ([1.0], -1), ([1.0], 101)])
def test_percentile_of_nothing_or_beyond(values, share):
    with pytest.raises(ValueError, match="percentile"):
        percentile(values, share)


def test_spread_and_fold():
    assert spread([3.0, 1.0, 2.000001234]) == {"median": 2.0, "min": 1.0, "max": 3.0, "n": 3}
    assert fold([{"a": 1.0, "b": 5.0}, {"a": 3.0, "b": 5.0}]) == {
        "a": {"median": 2.0, "min": 1.0, "max": 3.0, "n": 2},
        "b": {"median": 5.0, "min": 5.0, "max": 5.0, "n": 2},
    }


def test_request_metrics_of_a_burst():
    metrics = request_metrics(1.0, [[1.5, 1.6, 2.0], [3.0, 3.5]])
    expected = {
        "ttft_p50_s": 1.25, "ttft_p99_s": 1.985, "tbt_p50_ms": 400, "tbt_p99_ms": 498,
        "tbt_max_ms": 500, "worst_stall_p50_ms": 450, "e2e_p50_s": 1.75, "e2e_p99_s": 2.485,
        "output_tok_s": 2.0, "tokens": 5, "total_s": 2.5,
    }
    assert metrics == {name: pytest.approx(value) for name, value in expected.items()}


def test_requests_of_one_token_have_no_gaps():
    metrics = request_metrics(0.0, [[1.0], [2.0]])
    assert metrics["tbt_max_ms"] == 0 and metrics["worst_stall_p50_ms"] == 0
