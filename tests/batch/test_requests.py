"""Scheduling fields of a job's lines."""

from __future__ import annotations

import pytest

from aqua_jax.batch.requests import parse_own
from aqua_jax.config import SamplingParams
from aqua_jax.errors import RequestError


def parse(**fields):
    return parse_own({"id": "a", "prompt": "x", **fields}, "a", 1, 10, SamplingParams())


def test_user_weight_and_priority_reach_the_request():
    request = parse(user="ann", weight=2, priority=-3)
    assert (request.user, request.weight, request.priority) == ("ann", 2, -3)
    plain = parse()
    assert (plain.user, plain.weight, plain.priority) == ("", 1.0, 0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("user", 3), ("user", "\ud800"), ("weight", 0), ("weight", "1"), ("weight", True),
        ("weight", float("nan")), ("priority", 1.5), ("priority", False), ("priority", 10**30),
    ],
)
def test_bad_scheduling_fields_are_named(field, value):
    with pytest.raises(RequestError) as caught:
        parse(**{field: value})
    assert caught.value.field == field
