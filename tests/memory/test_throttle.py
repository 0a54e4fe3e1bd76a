"""A lender's bandwidth term, as AquaTensor keeps to it."""

from __future__ import annotations

import random
import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest

from aqua_jax.errors import ConfigError
from aqua_jax.memory import Aqua
from aqua_jax.memory.arena import Arena
from aqua_jax.memory.client import Client
from aqua_jax.memory.throttle import Throttle
from tests.coordinator.running import coordinator
from tests.memory.lending import new_name, wait_for

MIB = 1 << 20


@pytest.mark.parametrize("seed", range(5))
def test_in_no_time_more_is_begun_than_the_rate_and_one_copy(seed) -> None:
    rng, now = random.Random(seed), [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    throttle = Throttle(1000, clock=lambda: now[0], sleep=sleep)
    begun: list[tuple[float, int]] = []
    for _ in range(200):
        now[0] += rng.choice([0.0, 0.0, 0.01, 0.5])
        size = rng.randrange(1, 100)
        throttle.wait(size)
        begun.append((now[0], size))
        assert not throttle.ready
    for first in range(len(begun)):
        total = 0
        for at, size in begun[first:]:
            assert total <= (at - begun[first][0]) * 1000 + 1e-6
            total += size
    assert throttle.delay_s > 0.0
    now[0] += 1.0
    assert throttle.ready and throttle.begin(10) == 0.0


def test_threads_share_the_rate() -> None:
    throttle, waits = Throttle(1000, clock=lambda: 0.0, sleep=lambda s: waits.append(s)), []
    threads = [threading.Thread(target=throttle.wait, args=(10,)) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(waits) == pytest.approx([0.01 * n for n in range(1, 20)])


def test_a_cap_is_a_rate() -> None:
    with pytest.raises(ConfigError, match="cap"):
        Throttle(0)


def test_arrays_go_and_come_no_faster_than_their_lender_allows() -> None:
    """Both of a lender's arenas under one cap; a take-back doesn't hold a step up."""
    path, cap = new_name(), 40 * MIB
    with (
        coordinator(path), Client(path, name="narrow") as client,
        Arena.create(6 * MIB) as one, Arena.create(6 * MIB) as two,
        Aqua(path, chunk_bytes=MIB) as aqua,
    ):
        lendings = [client.lend(arena, cap=cap) for arena in (one, two)]
        x = jnp.asarray(np.random.default_rng(0).integers(0, 256, 10 * MIB, np.uint8))
        begun = time.monotonic()
        handle = aqua.offload(x)
        assert handle.tiers == {"peer": 10 * MIB}
        np.testing.assert_array_equal(handle.fetch(), x)
        assert time.monotonic() - begun >= 19 * MIB / cap  # each time 10, but the last one's end
        for lending in lendings:
            lending.reclaim(0, 10.0)
        begun, calls = time.monotonic(), 0
        while handle.tiers.get("peer"):
            before = handle.tiers["peer"]
            aqua.respond()
            calls += handle.tiers.get("peer", 0) < before
            assert time.monotonic() < begun + 20
        assert calls >= 5 and time.monotonic() - begun >= 9 * MIB / cap
        wait_for(lambda: not any(lending.lent for lending in lendings), "all is back")
        np.testing.assert_array_equal(handle.fetch(), x)
        handle.free()
