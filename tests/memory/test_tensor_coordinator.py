"""Aqua through a coordinator: leases of several lenders, each of which may want its own back."""

import jax.numpy as jnp
import numpy as np
import pytest

from aqua_jax.errors import CoordinatorError
from aqua_jax.memory import Aqua
from aqua_jax.memory.arena import Arena
from aqua_jax.memory.client import Client
from tests.coordinator.running import coordinator
from tests.memory.lending import new_name, wait_for

MIB = 1 << 20


def test_a_coordinators_lenders_are_one_tier():
    with (
        coordinator(new_name(), "--term_s=5", "--metrics_port=0") as running,
        Arena.create(16 * MIB) as near, Arena.create(16 * MIB) as far,
        Client(running.path, name="lender") as client,
    ):
        first, second = client.lend(near, name="near"), client.lend(far, name="far")
        with Aqua(running.path, name="me", chunk_bytes=MIB) as aqua:
            x = jnp.asarray(np.random.default_rng(0).integers(0, 256, 20 * MIB, np.uint8))
            with aqua.offload(x) as handle:
                assert handle.tiers == {"peer": 20 * MIB} and running.held() >= 20 * MIB
                assert (handle.fetch() == x).all()
                # One lender wants everything: what the other has no room for goes to the host.
                first.reclaim(0, 5.0)
                wait_for(lambda: aqua.tiers["peer"].wanted)
                moved = aqua.respond()
                wait_for(lambda: first.lent == 0)
                assert 0 < moved <= 16 * MIB and aqua.counters.late == 0
                assert sum(handle.tiers.values()) == 20 * MIB
                assert (handle.fetch() == x).all()
                # Its owner leaves with the rest still lent.
                assert second.lent == 16 * MIB
                client.close()
                wait_for(lambda: handle.lost)
                aqua.respond()
                assert aqua.counters.lost == 1
            with aqua.offload(x) as handle:
                assert handle.tiers == {"host": 20 * MIB} and (handle.fetch() == x).all()
        running.kill()
        with pytest.raises(CoordinatorError):
            Client(running.path, timeout_s=0.5)
