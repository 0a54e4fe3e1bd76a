"""Lenders in processes of their own, stopped or killed in the middle of things."""

import os
import random
import signal
import threading
import time
import timeit

import jax.numpy as jnp
import numpy as np
import pytest

from aqua_jax.errors import ContentLostError, StoreFullError
from aqua_jax.memory import Aqua, Dynamic, Static
from tests.memory.lender_process import lender_process
from tests.memory.lending import wait_for
from tests.scale import scaled

MIB = 1 << 20


def test_a_lender_that_hangs_delays_one_offload_and_nothing_else():
    with lender_process(64 * MIB) as (path, process), Aqua(path, timeout_s=0.3) as aqua:
        near = aqua.offload(jnp.arange(1000))
        os.kill(process.pid, signal.SIGSTOP)
        try:
            assert aqua.respond() == 0
            assert min(timeit.repeat(aqua.respond, number=1000, repeat=20)) / 1000 < 10e-6
            assert (near.fetch() == jnp.arange(1000)).all()
            start = time.monotonic()
            far = aqua.offload(jnp.ones(5 * MIB))
            asked = time.monotonic() - start
            assert asked >= 0.3 and far.tiers["host"] > 0
            # What is waited for in vain isn't asked again soon.
            waits = []
            for _ in range(5):
                start = time.monotonic()
                aqua.offload(jnp.ones(5 * MIB)).free()
                waits.append(time.monotonic() - start)
            assert min(waits) < 0.3, "each of them asked the lender that hangs"
            assert (far.fetch() == 1).all()
            near.free()  # gives back without waiting
        finally:
            os.kill(process.pid, signal.SIGCONT)
        far.free()
        with aqua.offload(jnp.ones(10)) as again:  # in what is held still
            assert again.tiers.keys() == {"peer"} and aqua.tiers["host"].used == 0


@pytest.mark.parametrize("policy", [Dynamic(), Static("peer"), Dynamic(mirror="host")])
def test_killed_in_mid_burst_everything_is_exact_or_said_to_be_lost(policy):
    """Threads offload and fetch; the lender is killed at a random moment: no wrong byte, ever."""
    for seed in range(scaled(2)):
        rng = random.Random(seed)
        data = [
            np.random.default_rng(i).integers(0, 256, MIB + 4096 * i, np.uint8) for i in range(6)
        ]
        lost, wrong, killed, dead = [], [], threading.Event(), threading.Event()

        def work(aqua, mine, data=data, lost=lost, wrong=wrong, dead=dead, killed=killed):
            end = None
            while end is None or time.monotonic() < end:
                if dead.is_set() and end is None:
                    end = time.monotonic() + 0.1
                for x in mine:
                    array = jnp.asarray(data[x])
                    try:
                        with aqua.offload(array, wait=x % 2 == 0) as handle:
                            for _ in range(2):
                                if np.asarray(handle.fetch()).tobytes() != data[x].tobytes():
                                    wrong.append(x)
                    except ContentLostError as error:
                        lost.append(error)
                    except StoreFullError as error:  # without a lender there is no peer
                        if not isinstance(aqua.contents.policy, Static) or not killed.is_set():
                            wrong.append(error)
                        time.sleep(0.01)
                    except BaseException as error:
                        wrong.append(error)
                aqua.respond()

        with lender_process(32 * MIB) as (path, process):
            with Aqua(path, chunk_bytes=1 << 17, policy=policy) as aqua:
                before = aqua.offload(jnp.asarray(data[0]))
                threads = [
                    threading.Thread(target=work, args=(aqua, range(i, 6, 2))) for i in range(2)
                ]
                for thread in threads:
                    thread.start()
                time.sleep(0.05 + 0.2 * rng.random())
                killed.set()
                process.kill()
                wait_for(lambda before=before: "peer" not in before.tiers)
                dead.set()
                for thread in threads:
                    thread.join()
                assert not wrong, wrong
                aqua.respond()
                if policy.mirror:
                    assert not lost and not before.lost
                    assert np.asarray(before.fetch()).tobytes() == data[0].tobytes()
                else:
                    with pytest.raises(ContentLostError):
                        before.fetch()
                before.free()
                assert aqua.tiers["peer"].used == aqua.tiers["host"].used == 0
