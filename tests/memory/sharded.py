"""Sharded arrays off four CPU devices and back; test_tensor_sharded.py runs it."""

from __future__ import annotations

import jax

jax.config.update("jax_num_cpu_devices", 4)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding  # noqa: E402

from aqua_jax.errors import ConfigError  # noqa: E402
from aqua_jax.memory import Aqua  # noqa: E402


def mesh(*shape: int) -> jax.sharding.Mesh:
    """A mesh of that shape over the first devices."""
    names = ("x", "y")[: len(shape)]
    automatic = (jax.sharding.AxisType.Auto,) * len(shape)
    count = int(np.prod(shape))
    return jax.make_mesh(shape, names, axis_types=automatic, devices=jax.devices()[:count])


def shardings() -> list[jax.sharding.Sharding]:
    """Ways to lay a matrix over four devices."""
    return [
        NamedSharding(mesh(4), PartitionSpec("x")),
        NamedSharding(mesh(4), PartitionSpec(None, "x")),
        NamedSharding(mesh(2, 2), PartitionSpec("x", "y")),
        NamedSharding(mesh(2, 2), PartitionSpec("y", "x")),
        NamedSharding(mesh(2, 2), PartitionSpec(("x", "y"))),
        NamedSharding(mesh(2, 2), PartitionSpec("x")),
        NamedSharding(mesh(4), PartitionSpec()),
        NamedSharding(mesh(2), PartitionSpec("x")),
        SingleDeviceSharding(jax.devices()[3]),
        SingleDeviceSharding(jax.devices()[0]),
    ]


def same(a: jax.Array, b: jax.Array, sharding: jax.sharding.Sharding | None = None) -> None:
    """Equal, and laid out alike, shard by shard."""
    sharding = sharding or a.sharding
    assert b.sharding == sharding and b.committed, (a.sharding, b.sharding)
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    assert (np.asarray(a) == np.asarray(b)).all()
    want = sharding.addressable_devices_indices_map(a.shape)
    assert {s.device: s.index for s in b.addressable_shards} == want
    for shard in b.addressable_shards:
        assert shard.data.devices() == {shard.device}
        assert (np.asarray(shard.data) == np.asarray(a)[shard.index]).all()


def main() -> None:
    """All of it; prints how many fetches were right."""
    assert len(jax.devices()) == 4
    x = np.arange(64 * 48, dtype=np.float32).reshape(64, 48)
    checked = 0
    with Aqua() as aqua:
        for sharding in shardings():
            a = jax.device_put(x, sharding)
            with aqua.offload(a) as handle:
                assert handle.sharding == sharding
                # Each distinct part is there once, replicas or not.
                assert handle.nbytes == x.nbytes
                same(a, handle.fetch())
                for other in shardings():
                    same(a, handle.fetch(sharding=other), other)
                    checked += 1
                for device in jax.devices():
                    same(a, handle.fetch(sharding=device), SingleDeviceSharding(device))
        # A tree with a sharding of its own for each leaf, and given ones.
        rows, columns = shardings()[:2]
        keys = jax.random.split(jax.random.key(0), 4)
        by_rows = NamedSharding(mesh(4), PartitionSpec("x"))
        tree = {
            "a": jax.device_put(jnp.ones((8, 8), jnp.bfloat16), rows),
            "b": [jax.device_put(jnp.arange(16.0).reshape(4, 4), columns), jnp.ones(3)],
            "key": jax.device_put(keys, by_rows), "n": 4,
        }
        with aqua.offload(tree, delete=True, wait=False) as handle:
            back = handle.fetch()
            assert back["a"].sharding == rows and back["b"][0].sharding == columns
            assert not back["b"][1].committed and back["key"].sharding == by_rows
            assert (jax.random.key_data(back["key"]) == jax.random.key_data(keys)).all()
            one, two = jax.devices()[1:3]
            given = {"a": columns, "b": [None, two], "key": one, "n": None}
            moved = handle.fetch(sharding=given)
            assert moved["a"].sharding == columns and moved["b"][0].sharding == columns
            assert moved["b"][1].devices() == {two} and moved["key"].devices() == {one}
            assert (jax.random.key_data(moved["key"]) == jax.random.key_data(keys)).all()
        # A step that shards by constraint, and one that donates what was fetched.
        step = jax.jit(lambda y: y * 2, donate_argnums=0)
        a = jax.device_put(x, rows)
        with aqua.offload(a) as handle:
            assert (np.asarray(step(handle.fetch())) == 2 * x).all()
            same(a, handle.fetch())
            try:
                handle.fetch(sharding=NamedSharding(mesh(4), PartitionSpec(None, None, "x")))
            except ConfigError as error:
                assert error.field == "sharding"
            else:
                raise AssertionError("a sharding of another rank")
        odd = jax.device_put(np.arange(6.0), SingleDeviceSharding(jax.devices()[1]))
        with aqua.offload(odd) as handle:
            try:
                handle.fetch(sharding=NamedSharding(mesh(4), PartitionSpec("x")))
            except ConfigError as error:
                assert error.field == "sharding"
            else:
                raise AssertionError("six rows over four devices")
    print(checked)


if __name__ == "__main__":
    main()
