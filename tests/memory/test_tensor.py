"""AquaTensor on one device: exactness, lifetimes, lenders that want memory back or die."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import threading
import time
import timeit
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aqua_jax.errors import (
    ConfigError,
    ContentLostError,
    LenderError,
    StaleHandleError,
    StoreError,
    StoreFullError,
)
from aqua_jax.memory import Aqua, Dynamic, Static
from tests.memory.leftovers import leftovers
from tests.memory.lender_process import lender_process
from tests.memory.lending import lending, new_name, wait_for

MIB = 1 << 20
TYPES = [
    "bool", "int4", "uint4", "int8", "uint8", "int16", "int32", "uint32", "float16", "bfloat16",
    "float32", "complex64", "float8_e4m3fn", "float8_e5m2", "float8_e4m3b11fnuz", "float8_e3m4",
    "float8_e8m0fnu", "float4_e2m1fn", "int2",
]


def values(shape, dtype, seed=0):
    """Random bits of a type, the odd ones (NaN, infinity, -0) among them."""
    random = np.random.default_rng(seed)
    size = int(np.prod(shape, dtype=np.int64))
    dtype = np.dtype(getattr(jnp, dtype))
    bits = jnp.iinfo(dtype).bits if "int" in dtype.name else 8 * dtype.itemsize
    if dtype.name == "bool" or "float4" in dtype.name or bits < 8:
        return random.integers(0, 2, size).astype(dtype).reshape(shape)
    raw = random.integers(0, 256, size * dtype.itemsize, np.uint8)
    return raw.view(dtype).reshape(shape)


def same(a, b):
    """Whether two arrays are equal bit for bit, and the same kind of thing."""
    assert isinstance(b, jax.Array)
    for field in ("shape", "dtype", "sharding", "weak_type", "committed"):
        assert getattr(a, field) == getattr(b, field), field
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture
def aqua():
    with Aqua() as made:
        yield made
        assert not made.live, "a test left handles"


@pytest.mark.parametrize("dtype", TYPES)
def test_every_type_and_shape_comes_back_as_it_was(aqua, dtype):
    for shape in ((), (0, 3), (7,), (33, 65)):
        x = jnp.asarray(values(shape, dtype))
        with aqua.offload(x) as handle:
            assert (handle.shape, handle.dtype) == (x.shape, x.dtype)
            same(x, handle.fetch())
            same(x, handle.fetch())


def test_a_large_array_is_copied_in_chunks_and_is_exact():
    x = jnp.asarray(values((3_000_001,), "float32"))
    with Aqua(chunk_bytes=1 << 16) as aqua, aqua.offload(x) as handle:
        same(x, handle.fetch())


@pytest.mark.parametrize("committed", [False, True])
def test_commitment_and_weak_types_come_back(aqua, committed):
    for x in (jnp.asarray(2.5), jnp.full((3, 4), 1.5), jnp.ones(3)):
        if committed:
            x = jax.device_put(x, jax.devices()[0])
        with aqua.offload(x) as handle:
            back = handle.fetch()
            same(x, back)
            assert (back * jnp.ones((), jnp.bfloat16)).dtype == (
                x * jnp.ones((), jnp.bfloat16)
            ).dtype


def test_random_keys_come_back(aqua):
    for key in (jax.random.key(7), jax.random.split(jax.random.key(1, impl="rbg"), 5)):
        with aqua.offload({"key": key}) as handle:
            back = handle.fetch()["key"]
        assert (back.dtype, back.shape, back.sharding) == (key.dtype, key.shape, key.sharding)
        assert jax.random.key_impl(back) == jax.random.key_impl(key)
        assert (jax.random.key_data(back) == jax.random.key_data(key)).all()


def test_a_tree_is_one_content_and_keeps_its_structure(aqua):
    tree = {
        "layers": [
            {"w": jnp.asarray(values((16, 5), "bfloat16", i)), "b": jnp.full(5, i, jnp.int8)}
            for i in range(40)
        ],
        "step": jnp.int32(3), "rate": 1e-3, "name": "adam", "none": None, "host": np.arange(6.0),
        "large": jnp.asarray(values((300, 1001), "float32")),
    }
    with aqua.offload(tree) as handle:
        assert len(aqua.live) == 1 and aqua.tiers["host"].used == handle.tiers["host"]
        back = handle.fetch()
        assert jax.tree.structure(back) == jax.tree.structure(tree)
        assert (back["rate"], back["name"], back["none"]) == (1e-3, "adam", None)
        assert type(back["host"]) is np.ndarray and (back["host"] == tree["host"]).all()
        for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(back), strict=True):
            if isinstance(a, jax.Array):
                same(a, b)
        with pytest.raises(AttributeError):
            _ = handle.shape
        assert handle.struct["step"] == jax.ShapeDtypeStruct((), jnp.int32)


def test_what_is_fetched_is_not_the_memory_that_is_offloaded(aqua):
    with aqua.offload(jnp.arange(100_000.0)) as first:
        x = first.fetch()
    with aqua.offload(jnp.zeros(100_000)):  # in the same place
        assert (x == jnp.arange(100_000.0)).all()
    with aqua.offload([jnp.arange(1000), np.arange(1000)]) as handle:
        a, b = handle.fetch()
        b += 1
        c, d = handle.fetch()
        assert (a == c).all() and (d == np.arange(1000)).all()


def test_offloading_costs_no_donation(aqua):
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = step(jnp.arange(1 << 18, dtype=jnp.float32))
    x.block_until_ready()
    address = x.unsafe_buffer_pointer()
    with aqua.offload(x) as handle:
        y = step(x)
        y.block_until_ready()
        assert x.is_deleted() and y.unsafe_buffer_pointer() == address
        assert (handle.fetch() + 1 == y).all()


def test_delete_frees_the_device(aqua):
    tree = [jnp.arange(5), jax.random.key(0), np.ones(3), 4]
    for wait in (True, False):
        copy = jax.tree.map(lambda x: x.copy() if hasattr(x, "copy") else x, tree)
        with aqua.offload(copy, delete=True, wait=wait) as handle:
            handle.wait()
            assert copy[0].is_deleted() and copy[1].is_deleted()
            back = handle.fetch()
            assert (back[0] == tree[0]).all() and (back[2] == tree[2]).all()


def test_without_waiting_the_source_may_go_at_once(aqua):
    step = jax.jit(lambda x: x * 2, donate_argnums=0)
    for kind in ("delete", "donate", "write"):
        data = values((1 << 21,), "int32")
        x = data.copy() if kind == "write" else jnp.array(data)
        jax.block_until_ready(x)
        handle = aqua.offload([x], wait=False)
        if kind == "delete":
            x.delete()
        elif kind == "donate":
            step(x).block_until_ready()
        else:
            x[:] = 0
        with handle:
            assert np.asarray(handle.fetch()[0]).tobytes() == data.tobytes(), kind
            assert handle.done()


def test_what_is_not_computed_yet_is_waited_for(aqua):
    slow = jax.jit(lambda x: jnp.sin(x @ x @ x @ x @ x))
    a = jnp.ones((900, 900)) / 900
    expected = np.asarray(slow(a))
    x = slow(a)
    with aqua.offload(x, wait=False) as handle:
        assert (np.asarray(handle.fetch()) == expected).all()
    x = slow(a)
    with aqua.offload(x, wait=False) as handle:
        # Deleted before it was computed, or held in time: an error or the right thing.
        x.delete()
        with contextlib.suppress(StoreError):
            assert (np.asarray(handle.fetch()) == expected).all()


def test_a_copy_that_fails_says_so_at_wait_and_fetch(aqua):
    gate = threading.Event()
    aqua._thread().submit(gate.wait)  # the copier is busy
    x = jax.jit(lambda x: x @ x)(jnp.ones((1500, 1500)))
    handle = aqua.offload(x, wait=False)
    held = x.is_ready()
    x.delete()
    with pytest.raises(TimeoutError):
        handle.wait(0.01)
    assert not handle.done()
    gate.set()
    with handle:
        if not held:
            with pytest.raises(StoreError):
                handle.wait()
            with pytest.raises(StoreError):
                handle.fetch()


def test_misuse_is_a_typed_error_that_names_the_leaf(aqua):
    x = jnp.ones(3)
    x.delete()
    with pytest.raises(ConfigError, match=r"x\['a'\]\[1\].*deleted"):
        aqua.offload({"a": [1, x]})
    with pytest.raises(ConfigError, match=r"x\['f'\]"):
        aqua.offload({"f": object()})
    with pytest.raises(ConfigError):
        aqua.offload(np.array([object()]))

    @jax.jit
    def traced(y):
        with pytest.raises(ConfigError, match="inside jit"):
            aqua.offload(y)
        return y

    traced(jnp.ones(2))
    handle = aqua.offload(jnp.ones(3))
    for wrong in ("cpu", [None, None], 3):
        with pytest.raises(ConfigError):
            handle.fetch(sharding=wrong)
    handle.free()
    for use in (handle.free, handle.fetch):
        with pytest.raises(StaleHandleError):
            use()
    assert handle.freed and "freed" in repr(handle)
    with pytest.raises(ConfigError):
        Aqua(host_bytes=-1)
    with pytest.raises(ConfigError):
        Aqua(chunk_bytes=8)
    with pytest.raises(ConfigError):
        Aqua(policy=Static("moon"))
    with pytest.raises(LenderError):
        Aqua(socket=new_name())


def test_forgotten_handles_are_told_and_freed():
    with leftovers() as left:
        aqua = Aqua()
        handle = aqua.offload(jnp.ones(1000))
        with pytest.warns(ResourceWarning, match="not freed: 4032 bytes"):
            del handle
            gc.collect()
        assert aqua.respond() == 0 and aqua.tiers["host"].used == 0 and not aqua.live
        kept = aqua.offload(jnp.ones(1000), wait=False)
        with pytest.warns(ResourceWarning, match="1 handles of 4032 bytes"):
            aqua.close()
        aqua.close()
        assert kept.freed
        for use in (kept.fetch, kept.free, lambda: aqua.offload(jnp.ones(2))):
            with pytest.raises(StaleHandleError):
                use()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            del kept
            gc.collect()
        lost = Aqua()
        with pytest.warns(ResourceWarning, match="Aqua was not closed"):
            del lost
            gc.collect()
    assert not left()


def test_memory_comes_from_the_lender_and_goes_back():
    with leftovers() as left, lending(64 * MIB) as running:
        with Aqua(running.path, name="researcher") as aqua:
            x = jnp.asarray(values((5 * MIB,), "uint8"))
            with aqua.offload(x) as handle:
                assert handle.tiers == {"peer": 5 * MIB}
                wait_for(lambda: running.said("(researcher)"))
                same(x, handle.fetch())
            with aqua.offload(x):
                assert aqua.tiers["peer"].used == 5 * MIB
        wait_for(lambda: running.lender.grants.held == 0)
    assert not left()


def test_respond_moves_what_is_asked_and_no_more_and_it_climbs_again():
    now = [0.0]
    with lending(64 * MIB) as running:
        with Aqua(running.path, chunk_bytes=MIB, clock=lambda: now[0]) as aqua:
            xs = [jnp.asarray(values((4 * MIB,), "uint8", i)) for i in range(8)]
            handles = [aqua.offload(x) for x in xs]
            assert aqua.tiers["peer"].used == 32 * MIB
            held = running.lender.grants.held
            running.lender.resize(held - 10 * MIB)
            wait_for(lambda: aqua.tiers["peer"].wanted)
            free = aqua.tiers["peer"].free
            moved = aqua.respond()
            assert moved <= 10 * MIB - free + MIB and aqua.tiers["peer"].wanted == 0
            assert aqua.counters.given_back == 10 * MIB and aqua.counters.demoted == moved > 0
            wait_for(lambda: running.lender.grants.held == held - 10 * MIB)
            for x, handle in zip(xs, handles, strict=True):
                same(x, handle.fetch())
            assert sum(handle.tiers.get("host", 0) for handle in handles) == moved
            running.lender.resize(64 * MIB)
            wait_for(lambda: running.lender.grants.limit == 64 * MIB)
            assert aqua.respond() == 0, "so soon"
            now[0] += 2
            wait_for(lambda: aqua.respond() or aqua.tiers["host"].used == 0)
            wait_for(lambda: not aqua.tiers["host"].used or (aqua.respond() and False))
            assert aqua.counters.climbed == moved
            for x, handle in zip(xs, handles, strict=True):
                assert handle.tiers == {"peer": 4 * MIB}
                same(x, handle.fetch())
                handle.free()


def test_static_policies_keep_to_their_tier_or_drop():
    x = jnp.asarray(values((2 * MIB,), "uint8"))
    with lending(16 * MIB) as running:
        with Aqua(running.path, policy=Static("host")) as aqua, aqua.offload(x) as handle:
            assert handle.tiers == {"host": 2 * MIB} and running.lender.grants.held == 0
        with Aqua(running.path, policy=Static("peer", spill=("none",))) as aqua:
            with aqua.offload(x) as handle:
                assert handle.tiers == {"peer": 2 * MIB} and not handle.lost
                with pytest.raises(StoreFullError):
                    aqua.offload(jnp.zeros(20 * MIB, jnp.uint8))
                running.lender.resize(0)
                wait_for(lambda: aqua.tiers["peer"].wanted)
                assert aqua.respond() == 0 and aqua.tiers == {
                    "peer": type(aqua.tiers["peer"])(0, 0, 0), "host": aqua.tiers["host"],
                }
                assert handle.lost and aqua.counters.dropped == 2 * MIB
                with pytest.raises(ContentLostError):
                    handle.fetch()
                wait_for(lambda: running.lender.grants.held == 0)


def test_ones_own_policy_decides():
    class Small:
        """Small things to the lender, large ones to the host."""

        mirror = None

        def place(self, size, tiers):
            assert set(tiers) == {"peer", "host"} and tiers["host"].wanted == 0
            return ("peer",) if size < MIB else ("host",)

        def demote(self, size, tier, tiers):
            return ("host",)

        def climb(self, size, tier, tiers):
            return ()

    with lending(32 * MIB) as running, Aqua(running.path, policy=Small()) as aqua:
        with aqua.offload(jnp.ones(10)) as small, aqua.offload(jnp.ones(MIB)) as large:
            assert list(small.tiers) == ["peer"] and list(large.tiers) == ["host"]


def test_full_tiers_raise_and_change_nothing():
    with Aqua(host_bytes=4 * MIB) as aqua:
        with aqua.offload(jnp.zeros(3 * MIB, jnp.uint8)) as handle:
            before = aqua.tiers
            with pytest.raises(StoreFullError, match="host"):
                aqua.offload([jnp.ones(5), jnp.zeros(2 * MIB, jnp.uint8)])
            assert aqua.tiers == before and aqua.live == [handle]
    with Aqua(host_bytes=0) as aqua, pytest.raises(StoreFullError):
        aqua.offload(jnp.ones(3))


def test_a_dead_lender_is_an_error_or_the_mirror_never_wrong_data():
    x = jnp.asarray(values((3 * MIB,), "uint8"))
    with lender_process(32 * MIB) as (path, process):
        with (
            Aqua(path) as plain, Aqua(path, policy=Dynamic(mirror="host")) as mirrored,
            plain.offload(x) as lost, plain.offload(x, wait=False) as late,
            mirrored.offload(x) as kept,
        ):
            late.wait()
            assert kept.tiers == {"peer": 3 * MIB, "host": 3 * MIB}
            os.kill(process.pid, signal.SIGKILL)
            wait_for(lambda: lost.lost)
            for aqua in (None, plain):
                if aqua is not None:
                    aqua.respond()
                for handle in (lost, late):
                    with pytest.raises(ContentLostError):
                        handle.fetch()
            assert plain.counters.lost == 2 and "lost" in repr(lost)
            same(x, kept.fetch())
            mirrored.respond()
            assert not kept.lost and kept.tiers == {"host": 3 * MIB}
            same(x, kept.fetch())
            with plain.offload(x) as again:  # goes on without the lender
                assert again.tiers == {"host": 3 * MIB}
                same(x, again.fetch())


def test_the_memory_of_a_dead_lender_is_let_go():
    def memfds():
        with open("/proc/self/maps", encoding="utf-8") as file:
            mapped = sum("/memfd:" in line for line in file)
        links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
        return mapped + sum("memfd" in os.readlink(p) for p in links if os.path.lexists(p))

    before = memfds()
    with lender_process(32 * MIB) as (path, process), Aqua(path) as used, Aqua(path) as idle:
        with used.offload(jnp.zeros(MIB)) as handle:
            assert memfds() > before + 2
            process.kill()
            wait_for(lambda: handle.lost)
            used.respond()
            wait_for(lambda: memfds() == before)
            assert not idle.live


def test_host_memory_may_be_of_huge_pages():
    with Aqua(huge_pages=True) as aqua, aqua.offload(jnp.arange(MIB)) as handle:
        assert (handle.fetch() == jnp.arange(MIB)).all()


def test_a_restarted_lender_is_found_again():
    path = new_name()
    x = jnp.asarray(values((MIB,), "uint8"))
    now = [0.0]
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(contextlib.ExitStack())
        running = first.enter_context(lending(8 * MIB, path))
        aqua = stack.enter_context(Aqua(path, clock=lambda: now[0]))
        handle = stack.enter_context(aqua.offload(x))
        running.lender.resize(0)
        wait_for(lambda: aqua.tiers["peer"].wanted)
        assert aqua.respond() == MIB
        first.close()
        wait_for(lambda: not aqua.contents.peers._sources[0]._borrower.alive)
        stack.enter_context(lending(8 * MIB, path))
        now[0] += 2
        end = time.monotonic() + 60
        while "peer" not in handle.tiers:
            assert time.monotonic() < end
            aqua.respond()
            time.sleep(0.02)
        same(x, handle.fetch())
        handle.free()
        aqua.close()


def test_respond_with_nothing_asked_takes_under_ten_microseconds():
    with lending(64 * MIB) as running, Aqua(running.path) as aqua:
        with aqua.offload(jnp.ones(1000)):
            aqua.respond()
            each = min(timeit.repeat(aqua.respond, number=1000, repeat=20)) / 1000
            assert each < 10e-6


def test_threads_share_an_aqua_while_the_lender_takes_and_gives():
    fast = {"chunk_bytes": 1 << 18, "clock": lambda: 20 * time.monotonic()}
    with lending(48 * MIB) as running, Aqua(running.path, **fast) as aqua:
        failures = []
        stop = threading.Event()

        def work(seed):
            try:
                x = jnp.asarray(values((MIB + 64 * seed,), "uint8", seed))
                while not stop.is_set():
                    with aqua.offload(x, wait=bool(seed % 2)) as handle:
                        for _ in range(3):
                            same(x, handle.fetch())
            except BaseException as error:
                failures.append(error)

        def until(condition):
            end = time.monotonic() + 60
            while not condition() and not failures:
                assert time.monotonic() < end
                aqua.respond()
                time.sleep(0.001)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(4):
                running.lender.resize(48 * MIB)
                until(lambda: aqua.tiers["peer"].used > 2 * MIB)
                running.lender.resize(MIB)
                until(lambda: running.lender.grants.held <= MIB)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert not failures, failures
        assert aqua.counters.given_back > 4 * MIB and aqua.counters.lost == 0
        assert aqua.tiers["host"].used == aqua.tiers["peer"].used == 0
