"""What an engine is made of follows its configuration."""

from __future__ import annotations

import math
import pathlib
from typing import Any

import jax
import pytest

from aqua_jax.config import EngineConfig
from aqua_jax.engine import startup
from aqua_jax.errors import ConfigError
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


def test_users_weigh_as_configured() -> None:
    policy = startup._policy(EngineConfig(model="m", user_weights={"alice": 2.0, "bob": 0.5}))
    assert isinstance(policy, Fair) and policy.config.user_weights == {"alice": 2.0, "bob": 0.5}
    policy = startup._policy(EngineConfig(model="m"))
    assert isinstance(policy, Fair) and policy.config.user_weights == {}


@pytest.mark.parametrize("weights", [
    {"": 1.0}, {7: 1.0}, {"a": 0.0}, {"a": -1.0}, {"a": math.inf}, {"a": math.nan}, {"a": True},
    {"a": "2"}, "a=2", None,
])
def test_weights_are_finite_and_positive_and_have_names(weights: Any) -> None:
    with pytest.raises(ConfigError, match="finite numbers > 0") as info:
        EngineConfig(model="m", user_weights=weights)
    assert (info.value.field, info.value.value) == ("user_weights", weights)


@pytest.mark.parametrize("policy", ["fcfs", "fcfs_swap", "priority"])
def test_weights_of_users_are_for_fair(policy: Any) -> None:
    with pytest.raises(ConfigError, match=f"empty with policy {policy}.*with fair") as info:
        EngineConfig(model="m", policy=policy, user_weights={"a": 2})
    assert (info.value.field, info.value.value) == ("user_weights", {"a": 2})
    EngineConfig(model="m", policy=policy, user_weights={})


def test_configurations_with_weights_compare_and_hash() -> None:
    first, second = (EngineConfig(model="m", user_weights={"a": weight}) for weight in (1, 2))
    assert first != second and len({first, second}) == 2


def test_a_cache_of_programs_that_cannot_be_made(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    before = jax.config.jax_compilation_cache_dir
    with pytest.raises(ConfigError, match=r"compile_cache_dir: got .*Not a directory"):
        startup.enable_compile_cache(str(tmp_path / "file" / "programs"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # nobody asked for that one
    startup.enable_compile_cache(None)
    assert jax.config.jax_compilation_cache_dir == before
