"""Lending a GPU's memory and mapping what others lend, as far as there needn't be a GPU."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from aqua_jax.config import EngineConfig
from aqua_jax.engine import device_mapping, lendable_pool
from aqua_jax.engine.device_lending import Gpu, LendableGpuMemory
from aqua_jax.engine.device_mapping import GpuMapper
from aqua_jax.engine.platform import DeviceMemory
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


@pytest.mark.parametrize(("page_bytes", "unit", "asked", "room"), [
    (4 << 20, 2 << 20, 8 << 30, 20 << 30), (512 << 10, 2 << 20, None, 7 << 30),
    (3 << 19, 2 << 20, 1 << 30, 2 << 30), (1 << 20, 2 << 20, 2 << 20, 1 << 30),
])
def test_what_an_engine_lends_of_a_gpu_lies_beside_its_pool(
    monkeypatch, page_bytes, unit, asked, room
):
    """The driver's answers stand in for a GPU: sizes of extents, and XLA's array as it was."""
    made = []
    memory = DeviceMemory(limit=0, free=room + lendable_pool._GPU_MARGIN, total=80 << 30)
    monkeypatch.setattr(lendable_pool, "device_memory", lambda device: memory)
    monkeypatch.setattr(device_arena, "unit", lambda ordinal: unit)
    monkeypatch.setattr(lendable_pool, "LendableGpuMemory", lambda *sizes: made.append(sizes))
    config = EngineConfig(
        model="m", lend="auto", coordinator="@none", policy="fair", lend_kv_memory=asked
    )
    found, _ = lendable_pool._on_gpu(config, 1000, page_bytes)
    ((extents, extent_bytes, ordinal),) = made
    assert found.reserve == 1000 and ordinal == 0
    assert (extents, extent_bytes) == (found.extents, found.extent_pages * page_bytes)
    assert extent_bytes % unit == 0 and extents * extent_bytes <= (asked or room)
    assert extents * extent_bytes > 0.9 * (asked or room)
    for more in (room + 1, page_bytes - 1):
        with pytest.raises(ConfigError, match=r"lend_kv_memory: got .* beside XLA's share"):
            lendable_pool._on_gpu(dataclasses.replace(config, lend_kv_memory=more), 9, page_bytes)


def test_without_a_gpu_nothing_is_lent_of_one():
    with pytest.raises(ConfigError, match=r"bytes: got .*what the GPU can give"):
        LendableGpuMemory(4, 2 << 20, 0)
    with pytest.raises(ArenaError):
        device_arena.unit(0)
