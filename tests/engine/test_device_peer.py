"""A GPU's memory as a tier, as far as there needn't be one."""

from __future__ import annotations

import pytest

from aqua_jax.config import EngineConfig
from aqua_jax.engine.device_peer import MappedRange, gpu_of
from aqua_jax.engine.tiers import open_tiers
from aqua_jax.errors import ConfigError, StoreError
from aqua_jax.memory.lease import Lease
from aqua_jax.memory.stores import PeerStore


class Memory:
    """An arena of a GPU: an address that the host must not touch."""

    def __init__(self, nbytes: int):
        self.nbytes, self.address, self.closed = nbytes, 0x7F00_0000_0000, 0

    def close(self) -> None:
        self.closed += 1


def test_names_of_gpus():
    assert [gpu_of(text) for text in ("cuda:0", "cuda:15", "cuda", "cuda:", "/run/cuda:1", "")] == [
        0, 15, None, None, None, None
    ]


def test_slots_in_it_have_addresses_and_nothing_is_read():
    """Bookkeeping alone touches no byte; what is left over is never handed out; closed once."""
    mapped, owner = Memory(10 << 20), Memory(10 << 20)
    lease = Lease(MappedRange(mapped, owner), 0, lambda lease, offset, nbytes: None)
    with PeerStore(lease, 3 << 20, 16) as store:
        assert store.capacity == 3 and store.base == mapped.address
        slots = store.allocate(3)
        assert [store.address(one) - mapped.address for one in slots] == [0, 3 << 20, 6 << 20]
        with pytest.raises(StoreError, match="cannot read"):
            lease.read(0, 16)
        with pytest.raises(StoreError, match="cannot write"):
            lease.write(0, b"x")
        assert not mapped.closed and not owner.closed
    lease.close()
    assert (mapped.closed, owner.closed) == (1, 1)


def test_without_a_gpu_it_is_refused():
    config = EngineConfig(model="m", peer="cuda:1", policy="fair")
    with pytest.raises(ConfigError, match="peer: got 'cuda:1'; allowed: a lender's socket"):
        open_tiers(config, "ffi", 16, 4096)
