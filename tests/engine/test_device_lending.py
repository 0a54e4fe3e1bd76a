"""Lending a GPU's memory and mapping what others lend, as far as there needn't be a GPU."""

from __future__ import annotations

import subprocess
import sys

import pytest

from aqua_jax.engine import device_mapping
from aqua_jax.engine.device_lending import Gpu
from aqua_jax.engine.device_mapping import GpuMapper
from aqua_jax.errors import ArenaError, ConfigError
from aqua_jax.ops import device_arena
from aqua_jax.ops.device_arena import Identity, Link


@pytest.mark.parametrize("flags", [
    ("--device=cuda:1", "--listen=@aqua-none"), ("--device=cuda:0", "--socket=@aqua-none"),
    ("--device=gpu", "--listen=@aqua-none"),
])
def test_without_a_gpu_the_command_names_the_flag(flags):
    done = subprocess.run(
        [sys.executable, "-m", "aqua_jax.cli.main", "lend", "--bytes=1GiB", *flags],
        capture_output=True, text=True, timeout=60,
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"flag {flags[0]}: allowed: " in done.stderr
    assert ("there is no GPU to use here" in done.stderr) == (flags[0] != "--device=gpu")


@pytest.mark.parametrize("name", ["cuda", "cuda:", "cuda:-1", "cuda:1000", "1", "/dev/nvidia0"])
def test_names_of_gpus(name):
    with pytest.raises(ConfigError, match=r"device: got .*allowed: cuda:0, cuda:1"):
        Gpu(name)


def test_a_driver_with_fewer_gpus(monkeypatch):
    monkeypatch.setattr(device_arena, "count", lambda: 2)
    with pytest.raises(ConfigError, match="allowed: cuda:0 to cuda:1"):
        Gpu("cuda:2")
    monkeypatch.setattr(device_arena, "count", lambda: 0)
    with pytest.raises(ConfigError, match="there is no GPU"):
        Gpu("cuda:0")
    monkeypatch.setattr(device_arena, "count", lambda: 1)
    monkeypatch.setattr(device_arena, "identity", lambda device: Identity("GPU-x", "0:0:0.0"))
    monkeypatch.setattr(device_arena, "memory", lambda device: (3 << 30, 80 << 30))
    with pytest.raises(ConfigError, match=rf"bytes: got {4 << 30}; allowed: at most {5 << 29}"):
        Gpu("cuda:0").segments(4 << 30)


def test_on_a_cpu_nothing_of_a_gpu_is_mapped():
    assert device_mapping.mappers((0, 1)) == {} and device_mapping.domain() == ""


def test_gpus_that_cannot_be_reached_are_named(monkeypatch):
    """What the driver says about peers is put into words before it is asked for a mapping."""
    monkeypatch.setattr(device_arena, "ordinal_of", lambda uuid: {"GPU-x": 3}.get(uuid))
    monkeypatch.setattr(
        device_arena, "link", lambda ours, theirs: Link(ours == 0, 0, 0)
    )
    with pytest.raises(ArenaError, match=r"cuda:0, cuda:1 can't reach GPU-x \(cuda:3\) without"):
        GpuMapper([0, 1, 0]).map(-1, 4096, "GPU-x")
    # One that reaches it is given to the driver, which isn't there.
    with pytest.raises(ArenaError, match="mapping an arena of 4096 bytes for GPU 0: "):
        GpuMapper([0]).map(-1, 4096, "GPU-x")


def test_where_a_gpu_is():
    where = Identity("GPU-x", "ffff:ff:1f.7").domain
    assert where == "ffff:ff:1f.7", "no such device: no node of memory is known"
