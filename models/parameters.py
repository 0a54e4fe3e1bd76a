"""A decoder's parameters as a flat dictionary of dotted names, and back.

Loaders fill, and the engine passes through jit, plain arrays by name ("layers.0.mlp.down.kernel"):
flat leaves cross jit in microseconds where an nnx object of 300 parameters costs 19 ms a call.
"""

from __future__ import annotations

import collections
import concurrent.futures
import os
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from aqua_jax.errors import ModelLoadError
from aqua_jax.models.config import ModelConfig
from aqua_jax.models.decoder import Decoder
from aqua_jax.models.layers import INIT_STDDEV

_BLOCK = 1 << 20  # values drawn at a time: 8 MiB beside the tensor being made, for each thread
_WORKERS = 16


def abstract_decoder(
    config: ModelConfig, dtype: jax.typing.DTypeLike = jnp.float32
) -> tuple[nnx.GraphDef[Decoder], dict[str, jax.ShapeDtypeStruct]]:
    """The decoder without its numbers; allocates nothing.

    Args:
      config: the architecture.
      dtype: of matrices. Norm scales and biases are float32 whatever it is.

    Returns:
      graphdef: hashable structure, for `merge`.
      shapes: shape and dtype of every parameter by dotted name.
    """
    graphdef, state = nnx.split(Decoder(config, dtype=dtype, rngs=None))
    shapes = {}
    for path, variable in nnx.to_flat_state(state):
        value = variable.get_value()
        shapes[".".join(map(str, path))] = jax.ShapeDtypeStruct(value.shape, value.dtype)
    return graphdef, shapes


def merge(graphdef: nnx.GraphDef[Decoder], params: Mapping[str, jax.Array]) -> Decoder:
    """A decoder with these parameters: 14 ms for 180 of them, for use inside traced functions.

    Args:
      graphdef: from `abstract_decoder`.
      params: an array by dotted name, for every name `abstract_decoder` gave. Matrices may hold
        the packed layout of `ops.linear.pack`, so shapes aren't checked here.

    Raises:
      ModelLoadError: a parameter is missing or unknown.
    """
    flat: dict[Any, nnx.Param] = {
        tuple(int(part) if part.isdigit() else part for part in name.split(".")): nnx.Param(value)
        for name, value in params.items()
    }
    try:
        model = nnx.merge(graphdef, nnx.from_flat_state(flat))
    except ValueError as error:
        raise ModelLoadError(f"parameters don't fit the model: {error}") from error
    # nnx pairs leaves up by order alone, so a wrong name would land in another one's place.
    if wrong := parameters(model).keys() ^ params.keys():
        raise ModelLoadError(f"parameters missing or unknown: {', '.join(sorted(wrong)[:8])}")
    return model


def parameters(model: Decoder) -> dict[str, jax.Array]:
    """The inverse of `merge`: a model's arrays by dotted name."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): variable.get_value() for path, variable in flat}


def random_params(
    config: ModelConfig, dtype: jax.typing.DTypeLike = jnp.float32, seed: int = 0
) -> Iterator[tuple[str, np.ndarray]]:
    """Seeded random weights, one parameter at a time (`--load_format=dummy`).

    Matrices and biases are normal with standard deviation 0.02, norm scales 1. Every parameter
    has a generator of its own, seeded by (seed, name), so that neither their order nor the rest
    of the architecture changes a value. A thread per core makes them, as many ahead of what was
    taken as there are threads.

    Args:
      config: the architecture.
      dtype: of matrices; see `abstract_decoder`.
      seed: any integer; only its low 64 bits count.

    Yields:
      (dotted name, array of the shape and dtype that `abstract_decoder` gives).
    """
    _, shapes = abstract_decoder(config, dtype)
    workers = min(_WORKERS, len(os.sched_getaffinity(0)))
    ahead: collections.deque[tuple[str, concurrent.futures.Future[np.ndarray]]] = (
        collections.deque()
    )
    with concurrent.futures.ThreadPoolExecutor(workers, "aqua-random") as pool:
        for name, spec in shapes.items():
            ahead.append((name, pool.submit(_random, name, spec, seed)))
            if len(ahead) > workers:
                first, array = ahead.popleft()
                yield first, array.result()
        while ahead:
            first, array = ahead.popleft()
            yield first, array.result()


def _random(name: str, spec: jax.ShapeDtypeStruct, seed: int) -> np.ndarray:
    if name.endswith("norm.scale"):
        return np.ones(spec.shape, spec.dtype)
    generator = np.random.default_rng([seed % 2**64, zlib.crc32(name.encode())])
    array = np.empty(spec.shape, spec.dtype)
    flat = array.reshape(-1)
    for start in range(0, flat.size, _BLOCK):
        block = flat[start : start + _BLOCK]
        values = generator.standard_normal(block.size, np.float32) * np.float32(INIT_STDDEV)
        if spec.dtype != jnp.bfloat16:
            block[:] = values
            continue
        # Rounded to nearest even as the conversion does, which holds the interpreter's lock.
        bits = values.view(np.uint32)
        bits += np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))
        block.view(np.uint16)[:] = bits >> np.uint32(16)
    return array
