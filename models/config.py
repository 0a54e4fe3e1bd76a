"""Architecture of a decoder, as plain data: what a checkpoint's config.json or GGUF header says.

No jax here: loaders, the scheduler's sizing and the simulator read it too. Every field is checked
when the dataclass is made, so a config that exists is one that can be built; the limits keep a
broken or hostile file from asking for absurd amounts of memory before a single weight is read.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, get_args

from aqua_jax.errors import ConfigError

RopeKind = Literal["none", "linear", "dynamic", "llama3", "yarn"]

ROPE_KINDS: tuple[str, ...] = get_args(RopeKind)
MAX_PARAMETERS = 10**13  # weights in all; the largest dense models of this family have 4e11

# Inclusive bounds of integer fields, far above any real model.
INTEGER_LIMITS: dict[str, tuple[int, int]] = {
    "vocab_size": (1, 2**24),
    "hidden_size": (1, 2**20),
    "intermediate_size": (1, 2**22),
    "num_layers": (1, 4096),
    "num_heads": (1, 2**14),
    "num_kv_heads": (1, 2**14),
    "head_dim": (2, 4096),
    "max_position": (1, 2**30),
}
_MAX_TOKEN_ID = 2**31 - 1


def _require(ok: bool, field: str, value: Any, allowed: str) -> None:
    if not ok:
        raise ConfigError(field, value, allowed)


def _is_integer(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_number(value: Any, low: float, high: float) -> bool:
    # The comparison comes before isfinite: an int beyond float's range raises there.
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and low <= value <= high
        and math.isfinite(value)
    )


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched past the trained context.

    Sources: linear (kaiokendev's position interpolation), dynamic (NTK-aware by length),
    llama3 (Llama 3.1's frequency bands), yarn (Peng et al. 2023, arXiv 2309.00071).
    Field names follow Hugging Face's `rope_scaling`.

    Raises:
      ConfigError: a field is out of range or of the wrong type; named `rope_scaling.<field>`.
    """

    kind: RopeKind = "none"
    factor: float = 1.0
    original_max_position: int | None = None  # tokens; None: the model's max_position
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn; None: computed from factor and mscale
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn: round the correction range to whole dimensions

    def __post_init__(self) -> None:
        def check(ok: bool, field: str, allowed: str) -> None:
            _require(ok, f"rope_scaling.{field}", getattr(self, field), allowed)

        check(
            isinstance(self.kind, str) and self.kind in ROPE_KINDS,
            "kind", "one of " + ", ".join(ROPE_KINDS),
        )
        check(_is_number(self.factor, 1.0, 1e6), "factor", "a number from 1 to 1e6")
        low, high = INTEGER_LIMITS["max_position"]
        check(
            self.original_max_position is None
            or _is_integer(self.original_max_position, low, high),
            "original_max_position", f"an integer from {low} to {high}, or null",
        )
        for field in ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"):
            check(
                _is_number(getattr(self, field), 1e-6, 1e6), field, "a number from 1e-6 to 1e6"
            )
        check(
            self.high_freq_factor > self.low_freq_factor, "high_freq_factor",
            f"more than low_freq_factor ({self.low_freq_factor})",
        )
        check(
            self.beta_fast >= self.beta_slow, "beta_fast",
            f"at least beta_slow ({self.beta_slow})",
        )
        for field in ("attention_factor", "mscale", "mscale_all_dim"):
            value = getattr(self, field)
            check(
                value is None or _is_number(value, 0.0, 1e3), field,
                "a number from 0 to 1000, or null",
            )
        check(isinstance(self.truncate, bool), "truncate", "true or false")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape of a Llama-family decoder (Llama, CodeLlama, Mistral, Qwen2, Qwen3, SmolLM2).

    Raises:
      ConfigError: a field is out of range, of the wrong type, or contradicts another.
    """

    family: str  # "llama" | "mistral" | "qwen2" | "qwen3"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int  # longest trained context, tokens
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling = RopeScaling()
    # Window of each layer in tokens (a query sees itself and window-1 tokens before); None: all.
    layer_windows: tuple[int | None, ...] = ()
    tied_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm over head_dim on q and k before rotary (Qwen3)
    hidden_act: str = "silu"
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        def check(ok: bool, field: str, allowed: str) -> None:
            _require(ok, field, getattr(self, field), allowed)

        check(isinstance(self.family, str) and self.family != "", "family", "a name")
        for field, (low, high) in INTEGER_LIMITS.items():
            check(
                _is_integer(getattr(self, field), low, high), field,
                f"an integer from {low} to {high}",
            )
        check(self.head_dim % 2 == 0, "head_dim", "an even number: rotary turns pairs")
        check(
            self.num_heads % self.num_kv_heads == 0, "num_kv_heads",
            f"a divisor of the number of query heads ({self.num_heads})",
        )
        check(_is_number(self.rms_norm_eps, 0.0, 1.0), "rms_norm_eps", "a number from 0 to 1")
        # A base of 1 or less would leave no frequencies apart (and yarn divides by its logarithm).
        check(_is_number(self.rope_theta, 1.001, 1e12), "rope_theta", "a number from 1.001 to 1e12")
        check(isinstance(self.rope_scaling, RopeScaling), "rope_scaling", "a RopeScaling")
        # The NTK-aware base is raised to head_dim / (head_dim - 2).
        check(
            self.rope_scaling.kind != "dynamic" or self.head_dim > 2, "head_dim",
            "above 2 with dynamic rope scaling",
        )
        for field in ("tied_embeddings", "qkv_bias", "o_bias", "mlp_bias", "qk_norm"):
            check(isinstance(getattr(self, field), bool), field, "true or false")
        check(self.hidden_act == "silu", "hidden_act", "silu")
        self._check_windows()
        self._check_tokens()
        _require(
            self.num_parameters <= MAX_PARAMETERS, "num_parameters", self.num_parameters,
            f"at most {MAX_PARAMETERS} weights in all",
        )

    def _check_windows(self) -> None:
        windows = self.layer_windows
        _require(
            isinstance(windows, tuple) and len(windows) in (0, self.num_layers),
            "layer_windows", windows, f"empty, or one entry for each of {self.num_layers} layers",
        )
        for window in windows:
            _require(
                window is None or _is_integer(window, 1, 2**30), "layer_windows", window,
                "integers from 1 to 2**30, or null",
            )

    def _check_tokens(self) -> None:
        allowed = f"token ids, integers from 0 to {_MAX_TOKEN_ID}"
        _require(
            self.bos_token_id is None or _is_integer(self.bos_token_id, 0, _MAX_TOKEN_ID),
            "bos_token_id", self.bos_token_id, allowed + ", or null",
        )
        _require(
            isinstance(self.eos_token_ids, tuple), "eos_token_ids", self.eos_token_ids, allowed
        )
        for token in self.eos_token_ids:
            _require(_is_integer(token, 0, _MAX_TOKEN_ID), "eos_token_ids", token, allowed)

    def window(self, layer: int) -> int | None:
        """Attention window of `layer` in tokens; None when it sees everything."""
        return self.layer_windows[layer] if self.layer_windows else None

    @property
    def query_size(self) -> int:
        """Width of all query heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key (or value) heads together."""
        return self.num_kv_heads * self.head_dim

    @property
    def num_parameters(self) -> int:
        """Weights in all matrices (biases and norms, well under 1 in 1000, are not counted)."""
        layer = self.hidden_size * (
            2 * self.query_size + 2 * self.kv_size + 3 * self.intermediate_size
        )
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        return self.num_layers * layer + embeddings
