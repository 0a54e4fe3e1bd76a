"""How long a step takes: a roofline of a machine and a model, or a line fitted to a recorded run.

*Roofline* (Williams, Waterman and Patterson, 2009): the step's arithmetic at the rate that matrix
products reach, or its bytes at the rate that reads reach, whichever takes longer, plus what every
step costs. Each token is multiplied with all weights of the layers once, sampled rows with the
head; attention is two products of width `head_dim` per query head and key. Bytes are the weights,
once, the keys and values of each decode's context, those of each prompt chunk's context once, and
whatever the copy queue moves in or out meanwhile. Activations are left out: a few percent.

*Line*: the sum of what each quantity of `Work` costs. On a CPU it is what we measure: products are
arithmetic-bound from a few rows on, so prefill and decode add up instead of overlapping.

*Varied*: either, with each step off by as much as some recorded step was. What happens once in a
run, such as its longest pause, depends on which request comes a millisecond before which step, so
one run of it says little: the median of several is what to compare with the median of real ones.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence
from typing import Protocol

from aqua_jax.errors import ConfigError
from aqua_jax.models.config import ModelConfig
from aqua_jax.simulation.work import Work


class StepCost(Protocol):
    """Seconds of a step on the device."""

    def seconds(self, work: Work) -> float:
        """From the step's beginning to its tokens being readable on the host."""


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """What a model costs, from its architecture.

    Attributes:
      layer_flops: arithmetic per token in the layers' products.
      head_flops: per sampled row.
      attention_flops: per token and key, all layers.
      weight_bytes: of all weights.
      kv_bytes: of one token's keys and values, all layers.
      hidden: width of the residual stream.
      layers: how many.
    """

    layer_flops: float
    head_flops: float
    attention_flops: float
    weight_bytes: int
    kv_bytes: int
    hidden: int
    layers: int

    @classmethod
    def of(cls, config: ModelConfig, itemsize: int = 2, kv_itemsize: int = 2) -> ModelShape:
        """The shape of an architecture with weights and KV of so many bytes per number."""
        head = config.vocab_size * config.hidden_size
        embeddings = head if config.tied_embeddings else 2 * head
        return cls(
            layer_flops=2.0 * (config.num_parameters - embeddings),
            head_flops=2.0 * head,
            attention_flops=4.0 * config.num_layers * config.query_size,
            weight_bytes=config.num_parameters * itemsize,
            kv_bytes=2 * config.num_layers * config.kv_size * kv_itemsize,
            hidden=config.hidden_size, layers=config.num_layers,
        )


@dataclasses.dataclass(frozen=True)
class Roofline:
    """A model on `devices` equal devices that share every product (tensor parallelism).

    Attributes:
      shape: of the model.
      flops_per_s: that products reach, one device.
      bytes_per_s: that reads reach, one device.
      step_s: what every step costs besides.
      devices: how many.
      all_reduce_s: latency of one sum over the devices; there are two a layer.
      all_reduce_bytes_per_s: of such a sum, in bytes of the result.
    """

    shape: ModelShape
    flops_per_s: float
    bytes_per_s: float
    step_s: float
    devices: int = 1
    all_reduce_s: float = 0.0
    all_reduce_bytes_per_s: float = math.inf

    def seconds(self, work: Work) -> float:
        """See the module."""
        shape = self.shape
        flops = (
            shape.layer_flops * work.tokens + shape.head_flops * work.sampled
            + shape.attention_flops * (work.decode_context + work.prefill_context)
        )
        reads = shape.kv_bytes * (work.decode_context + work.prefill_reads)
        # All weights, whatever is sampled: the head is a hundredth of them.
        bytes_read = shape.weight_bytes + reads + work.moved_bytes
        rate = self.devices
        seconds = self.step_s + max(
            flops / (rate * self.flops_per_s), bytes_read / (rate * self.bytes_per_s)
        )
        if self.devices > 1:
            row_bytes = 2 * shape.hidden * work.tokens
            seconds += 2 * shape.layers * (
                self.all_reduce_s + row_bytes / self.all_reduce_bytes_per_s
            )
        return seconds


@dataclasses.dataclass(frozen=True)
class Line:
    """Seconds per step and per unit of each quantity; see `Work`.

    Raises:
      ConfigError: a coefficient is not a number >= 0, or all are 0.
    """

    step_s: float
    prefill_token_s: float = 0.0
    decode_s: float = 0.0
    decode_context_s: float = 0.0
    prefill_context_s: float = 0.0
    moved_byte_s: float = 0.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            good = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not good or not 0.0 <= value < math.inf:
                raise ConfigError(f"cost.{field.name}", value, "seconds, a number >= 0")
        if not any(dataclasses.astuple(self)):
            raise ConfigError("cost", 0.0, "at least one coefficient above 0")

    def seconds(self, work: Work) -> float:
        """The sum."""
        return (
            self.step_s + self.prefill_token_s * work.prefill_tokens
            + self.decode_s * work.decodes + self.decode_context_s * work.decode_context
            + self.prefill_context_s * work.prefill_context
            + self.moved_byte_s * work.moved_bytes
        )


class Varied:
    """Another cost, each step times one of `ratios`, drawn anew for every step; a `StepCost`."""

    def __init__(self, cost: StepCost, ratios: Sequence[float], seed: int) -> None:
        """
        Args:
          cost: of a step in the middle.
          ratios: what recorded steps took by what they would have taken there.
          seed: of the draws.

        Raises:
          ConfigError: no ratios, or one that is not above 0.
        """
        if not ratios or not 0.0 < min(ratios) <= max(ratios) < math.inf:
            raise ConfigError("ratios", list(ratios)[:3], "numbers above 0")
        self._cost, self._ratios, self._draw = cost, ratios, random.Random(seed)

    def seconds(self, work: Work) -> float:
        """A draw."""
        return self._cost.seconds(work) * self._draw.choice(self._ratios)
