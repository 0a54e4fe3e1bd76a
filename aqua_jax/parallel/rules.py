"""Which part of each parameter a device holds when a model is cut by heads and by hidden units.

The cut is that of Megatron-LM (Shoeybi et al. 2019, arXiv 1909.08053): the projections into a
layer's inside (`qkv`, `gate_up`) are cut by output, those out of it (`o`, `down`) by input, so that
each device computes its own heads and hidden units from start to end and partial sums meet once
after attention and once after the feed-forward layer. Embedding and head are cut by vocabulary.
Norms are on every device.

A fused kernel is cut part by part, `[q | k | v]` and `[gate | up]`: a device holds its columns of
each, in the same order. A bias that is added to a sum over devices is the first device's; the
others hold zeros. Where the vocabulary doesn't divide, the last devices' parts end with zeros; the
logits of those are dropped. With fewer kv heads than devices, neighbours hold the same one.

A parameter's name says how it is cut, whatever layer it belongs to.

Letters: N devices, H query heads, K kv heads, D head dim, F hidden units, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from aqua_jax.errors import ConfigError
from aqua_jax.models.config import ModelConfig

Range = tuple[int, int]  # first and end


@dataclasses.dataclass(frozen=True)
class Cut:
    """A device's part of a parameter `[in, out]`, `[V, d]` or `[n]`: ranges of one axis, joined.

    Attributes:
      axis: which.
      ranges: in order; may be none.
      padding: zeros after them.
    """

    axis: int
    ranges: tuple[Range, ...]
    padding: int = 0

    @property
    def size(self) -> int:
        """Its length along the axis."""
        return sum(end - start for start, end in self.ranges) + self.padding


def check(model: ModelConfig, size: int) -> None:
    """Raises ConfigError if the model can't be cut for `size` devices."""

    def require(ok: bool, what: str) -> None:
        if not ok:
            raise ConfigError("tensor_parallel", size, what)

    require(
        model.num_heads % size == 0, f"a divisor of the model's {model.num_heads} attention heads"
    )
    require(
        model.num_kv_heads % size == 0 or size % model.num_kv_heads == 0,
        f"a divisor or a multiple of the model's {model.num_kv_heads} kv heads",
    )
    require(
        model.intermediate_size % size == 0,
        f"a divisor of the model's {model.intermediate_size} hidden units",
    )


def part_of(model: ModelConfig, size: int) -> ModelConfig:
    """The architecture of what one of `size` devices computes.

    Raises:
      ConfigError: the model can't be cut so.
    """
    check(model, size)
    return dataclasses.replace(
        model, num_heads=model.num_heads // size,
        num_kv_heads=max(1, model.num_kv_heads // size),
        intermediate_size=model.intermediate_size // size,
        vocab_size=-(-model.vocab_size // size),
    )


def cuts(model: ModelConfig, size: int, name: str) -> tuple[Cut, ...] | None:
    """Each device's part of a parameter; None: all of it on each.

    Args:
      model: the whole architecture.
      size: N.
      name: dotted, as `models.parameters` has it.
    """
    rule = _RULES.get(".".join(name.split(".")[-2:]))
    return None if rule is None else tuple(rule(model, size, rank) for rank in range(size))


def _span(total: int, size: int, rank: int, start: int = 0) -> Range:
    """The rank's range of `total` elements from `start` on; the last ones may get fewer."""
    each = -(-total // size)
    return start + min(total, rank * each), start + min(total, (rank + 1) * each)


def _heads(model: ModelConfig, size: int, rank: int) -> tuple[Range, ...]:
    width = model.head_dim * max(1, model.num_kv_heads // size)
    first = rank * model.num_kv_heads // size * model.head_dim
    keys = model.query_size + first
    values = keys + model.kv_size
    return (
        _span(model.query_size, size, rank), (keys, keys + width), (values, values + width)
    )


def _hidden(model: ModelConfig, size: int, rank: int) -> tuple[Range, ...]:
    hidden = model.intermediate_size
    return _span(hidden, size, rank), _span(hidden, size, rank, hidden)


def _vocabulary(axis: int) -> Callable[[ModelConfig, int, int], Cut]:
    def rule(model: ModelConfig, size: int, rank: int) -> Cut:
        start, end = _span(model.vocab_size, size, rank)
        return Cut(axis, ((start, end),), -(-model.vocab_size // size) - (end - start))

    return rule


def _firsts(model: ModelConfig, size: int, rank: int) -> Cut:
    width = model.hidden_size
    return Cut(0, ((0, width),)) if rank == 0 else Cut(0, (), width)


# By the last two parts of a name.
_RULES: dict[str, Callable[[ModelConfig, int, int], Cut]] = {
    "embed.embedding": _vocabulary(0),
    "lm_head.kernel": _vocabulary(1),
    "qkv.kernel": lambda model, size, rank: Cut(1, _heads(model, size, rank)),
    "qkv.bias": lambda model, size, rank: Cut(0, _heads(model, size, rank)),
    "o.kernel": lambda model, size, rank: Cut(0, (_span(model.query_size, size, rank),)),
    "o.bias": _firsts,
    "gate_up.kernel": lambda model, size, rank: Cut(1, _hidden(model, size, rank)),
    "gate_up.bias": lambda model, size, rank: Cut(0, _hidden(model, size, rank)),
    "down.kernel": lambda model, size, rank: Cut(
        0, (_span(model.intermediate_size, size, rank),)
    ),
    "down.bias": _firsts,
}
