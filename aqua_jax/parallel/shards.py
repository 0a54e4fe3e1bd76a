"""The devices that share one model: placing arrays, running functions on each, adding up.

A cut parameter is one jax array whose first axis is the devices' parts one after the other, each
in whatever layout its device wants (packed kernels too): the whole has no meaning beyond that, and
`over` gives each device its own part. The KV pool is cut by kv heads, everything else is on every
device.

On CPUs each device has a thread of XLA's that waits where devices meet. With more than 32 programs
under way XLA stops dispatching in the middle of one, some devices wait for the others for ever, and
after a minute it ends the process (seen with jaxlib 0.10.2). A step is at most three programs, and
the engine runs one step ahead.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from aqua_jax.errors import ConfigError
from aqua_jax.models.config import ModelConfig
from aqua_jax.parallel import rules

_LOG = logging.getLogger(__name__)
_AXIS = "tensor"

EVERYWHERE = PartitionSpec()  # the same on every device
PARTS = PartitionSpec(_AXIS)  # the first axis is the devices' parts
HEADS = PartitionSpec(None, None, None, None, _AXIS)  # the KV pool [P, L, 2, page_tokens, K, D]


def ask_for_cpu_devices(count: int) -> None:
    """Has jax make `count` CPU devices, unless it has started or somebody asked for more.

    On CPUs devices are only a setting, which has to come first.
    """
    flags = re.findall(
        r"--xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", "")
    )
    asked = jax.config.jax_num_cpu_devices  # type: ignore[attr-defined]  # -1: nobody
    if max(asked, *map(int, flags), 1) >= count:
        return
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        return  # it has started; `local_devices` says whether there are enough
    _LOG.info("%d devices, if they are CPUs, for tensor_parallel=%d", count, count)


def local_devices(count: int) -> list[jax.Device]:
    """The first `count` devices of this process.

    Raises:
      ConfigError: there aren't so many.
    """
    ask_for_cpu_devices(count)
    devices = jax.local_devices()
    if len(devices) < count:
        platform = devices[0].platform
        hint = (
            "; jax had started before, so set XLA_FLAGS=--xla_force_host_platform_device_count="
            f"{count} for more" if platform == "cpu" else ""
        )
        raise ConfigError(
            "tensor_parallel", count,
            f"1 to {len(devices)}, the {platform} devices of this process{hint}",
        )
    return devices[:count]


class Shards:
    """N devices and the parts of one model on them.

    Methods whose names end in `_parts` are for inside of functions made by `over`: there each
    device runs with its own arrays.

    Attributes:
      size: N.
      model: the whole architecture.
      part: that of one device's part.
    """

    def __init__(self, model: ModelConfig, size: int):
        """
        Raises:
          ConfigError: the model can't be cut so, or there aren't so many devices.
        """
        self.model, self.size = model, size
        self.part = rules.part_of(model, size)
        self.devices = local_devices(size)
        self._mesh = Mesh(np.array(self.devices), (_AXIS,), axis_types=(AxisType.Auto,))

    @property
    def kv_heads(self) -> int:
        """Heads of the whole KV pool; more than the model's where devices hold the same ones."""
        return self.part.num_kv_heads * self.size

    # Arrays.

    def cuts(self, name: str) -> tuple[rules.Cut, ...] | None:
        """Each device's part of a parameter; None: all of it on each."""
        return rules.cuts(self.model, self.size, name)

    def spec(self, name: str) -> PartitionSpec:
        """How a parameter lies."""
        return EVERYWHERE if self.cuts(name) is None else PARTS

    def place(self, part: np.ndarray | jax.Array, rank: int) -> jax.Array:
        """A part on its device; on CPUs an aligned NumPy array is taken over, not copied."""
        return jax.device_put(part, self.devices[rank])

    def join(self, parts: Sequence[jax.Array]) -> jax.Array:
        """Parts that lie on their devices as one array."""
        shape = parts[0].shape
        return jax.make_array_from_single_device_arrays(
            (self.size * shape[0], *shape[1:]), self.sharding(PARTS), list(parts)
        )

    def parts(self, array: jax.Array) -> list[jax.Array]:
        """Each device's part of an array: the inverse of `join`."""
        found = {shard.device: shard.data for shard in array.addressable_shards}
        return [found[device] for device in self.devices]

    def everywhere(self, array: np.ndarray | jax.Array) -> jax.Array:
        """An array on every device."""
        return jax.device_put(array, self.sharding(EVERYWHERE))

    def sharding(self, spec: PartitionSpec) -> NamedSharding:
        """A way to lie as jax has it."""
        return NamedSharding(self._mesh, spec)

    # Programs.

    def over(self, function: Callable[..., Any], inputs: Any, outputs: Any) -> Callable[..., Any]:
        """The function on every device, each with its own parts.

        Args:
          function: of positional arguments.
          inputs: how each argument lies; a `PartitionSpec` may stand for a tree of arrays.
          outputs: the same for what it returns; what is said to lie `EVERYWHERE` must come out the
            same on every device.
        """
        return jax.shard_map(
            function, mesh=self._mesh, in_specs=inputs, out_specs=outputs, check_vma=False
        )

    def sum_parts(self, x: jax.Array) -> jax.Array:
        """The sum of what each device has; the same bits on all."""
        return jax.lax.psum(x, _AXIS)

    def rows_parts(
        self, look_up: Callable[[jax.Array], jax.Array], tokens: jax.Array
    ) -> jax.Array:
        """Rows of a table that is cut by vocabulary.

        Args:
          look_up: rows of this device's part: i32 [T] in [0, its size) -> f32 [T, d].
          tokens: i32 [T], each in [0, V).

        Returns:
          f32 [T, d]: each row comes from one device, the others add nothing.
        """
        own = tokens - jax.lax.axis_index(_AXIS) * self.part.vocab_size
        here = (own >= 0) & (own < self.part.vocab_size)
        rows = look_up(jnp.where(here, own, 0))
        return self.sum_parts(jnp.where(here[:, None], rows, 0.0))

    def columns_parts(self, y: jax.Array) -> jax.Array:
        """Logits [R, its part of V] of each device, side by side: [R, V]."""
        joined = jax.lax.all_gather(y, _AXIS, axis=1, tiled=True)
        return joined[:, : self.model.vocab_size]
