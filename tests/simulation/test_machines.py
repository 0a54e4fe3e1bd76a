"""Machines from files: presets that name their sources, errors that name the parameter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from aqua_jax.errors import ConfigError
from aqua_jax.simulation.cost import Line, Roofline
from aqua_jax.simulation.machines import NAMES, build_system, is_fitted, read_machine
from aqua_jax.simulation.models import MODELS
from aqua_jax.simulation.work import Work


@pytest.mark.parametrize("name", NAMES)
def test_presets(name: str) -> None:
    system = build_system(name, MODELS["34b"])
    assert system.figures == "modelled" and not is_fitted(name)
    assert isinstance(system.cost, Roofline)
    # Weights of 67 GB leave some tens of thousands of tokens on 80 GB.
    assert 20_000 < system.num_pages * system.page_tokens < 60_000
    # Reading the weights once a token: 25 to 45 ms, as people see with 34B models on such machines.
    assert 0.02 < system.cost.seconds(Work(decodes=1, decode_context=100, sampled=1)) < 0.05
    assert [link.store for link in system.links][-1] == "host"
    rates = [link.bytes_per_s for link in system.links]
    assert rates == sorted(rates, reverse=True), "fastest first"


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_of_a_preset_has_a_source(name: str) -> None:
    def walk(value: Any) -> int:
        if isinstance(value, dict):
            if "value" in value:
                assert set(value) == {"value", "source"} and len(value["source"]) > 4
                return 1
            return sum(map(walk, value.values()))
        if isinstance(value, list):
            return sum(map(walk, value))
        assert isinstance(value, str), f"{name}: {value} without a source"
        return 0

    assert walk(read_machine(name).values) >= 12


def test_the_page_size_changes_pages_not_tokens() -> None:
    small, large = (build_system("h100-pcie", MODELS["34b"], size) for size in (16, 64))
    assert large.page_bytes == 4 * small.page_bytes
    assert abs(small.num_pages * 16 - large.num_pages * 64) < 64


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="weights"):
        build_system("h100-pcie", MODELS["70b"])
    with pytest.raises(ConfigError, match="machine"):
        build_system("abacus", MODELS["7b"])
    path = tmp_path / "machine.json"
    path.write_text("{")
    with pytest.raises(ConfigError, match="JSON"):
        build_system(str(path), MODELS["7b"])
    values = json.loads(json.dumps(read_machine("h100-pcie").values))
    del values["device"]["flops_per_s"]["source"]
    path.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"flops_per_s.*source"):
        build_system(str(path), MODELS["7b"])
    with pytest.raises(ConfigError, match="model"):
        build_system("h100-pcie", None)


def test_stores_by_name_and_links_by_rate() -> None:
    system = build_system("h100-nvlink", MODELS["34b"])
    assert [link.store for link in system.with_links(("host",)).links] == ["host"]
    assert system.with_links(()).links == ()
    with pytest.raises(ConfigError, match="peer, host"):
        system.with_links(("tape",))
    assert {link.bytes_per_s for link in system.with_rate(1e9).links} == {1e9}


def profile(**changes: Any) -> dict[str, Any]:
    """What `aqua-jax profile --engine` writes, as far as the simulator reads it."""
    return {
        "name": "here",
        "cost": {
            "step_s": 0.01, "prefill_token_s": 1e-4, "decode_s": 1e-4, "decode_context_s": 0,
            "prefill_context_s": 0.0, "moved_byte_s": 0.0,
        },
        "engine": {"page_tokens": 16, "page_bytes": 1000, "num_pages": 50, "host_s": 0.001},
        "links": [
            {"store": "host", "store_bytes": 9000, "bytes_per_s": 1e6, "copy_s": 0.0}
        ],
        **changes,
    }


def test_a_profile_is_a_machine(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(profile()))
    assert is_fitted(str(path))
    system = build_system(str(path), None)
    assert system.figures == "fitted" and system.num_pages == 50
    assert system.cost == Line(0.01, 1e-4, 1e-4)
    assert system.links[0].bytes_per_s == 1e6 and not system.links[0].duplex
    path.write_text(json.dumps(profile(engine={"page_tokens": 16})))
    with pytest.raises(ConfigError, match="host_s"):
        build_system(str(path), None)
