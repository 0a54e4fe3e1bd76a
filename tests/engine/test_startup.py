"""What an engine is made of follows its configuration."""

from __future__ import annotations

import math

import pytest

from aqua_jax.config import EngineConfig
from aqua_jax.engine import startup
from aqua_jax.scheduling.fair import Fair
from aqua_jax.scheduling.policies import FirstComeFirstServed, StrictPriority


@pytest.mark.parametrize(("name", "kind"), [
    ("fair", Fair), ("fcfs", FirstComeFirstServed), ("fcfs_swap", FirstComeFirstServed),
    ("priority", StrictPriority),
])
def test_policies_by_name(name: str, kind: type) -> None:
    assert type(startup._policy(EngineConfig(model="m", policy=name))) is kind  # type: ignore[arg-type]


@pytest.mark.parametrize(("settings", "steps", "slo"), [
    ({}, "auto", 0.0), ({"slice_steps": 7}, 7, 0.0), ({"tbt_slo_ms": 250.0}, "auto", 0.25),
])
def test_slices_as_configured(settings: dict, steps: object, slo: float) -> None:
    policy = startup._policy(EngineConfig(model="m", **settings))
    assert isinstance(policy, Fair)
    assert (policy.slices.config.slice_steps, policy.slices.config.tbt_slo_s) == (steps, slo)
    assert math.isfinite(policy.slices.steps)
