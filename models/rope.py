"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864) and its context extensions.

A head of size D is D/2 two-dimensional points; point i is turned by the angle
`position * inv_freq[i]`. As in Hugging Face's checkpoints point i is (x[i], x[i + D/2])
("half-split"); GGUF files keep (x[2i], x[2i+1]), which their loader permutes.

The extensions differ in how they lower the frequencies `theta ** (-2i/D)`:
  linear:  all by `factor` (position interpolation).
  llama3:  wavelengths beyond the trained context by `factor`, short ones not, a ramp between.
  yarn:    the same idea with the ramp over dimensions ("NTK by parts"), and q.k sharpened by a
           factor on cos and sin.
  dynamic: theta itself grows with the length of the sequence ("NTK-aware").

Legend: T tokens, N heads (query or key), D head dim.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from aqua_jax.models.config import ModelConfig, RopeScaling


def inverse_frequencies(config: ModelConfig) -> np.ndarray:
    """Turning rate of each pair in radians per token, f32 [D/2].

    For `dynamic` these are the rates within the trained context; `cos_sin` stretches them.
    """
    # The exponent is rounded to f32 before the power, as torch does: positions multiply the
    # rounding, and parity at 10k tokens needs the same rates to the last bit or nearly so.
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    rates = (1.0 / (config.rope_theta ** exponents.astype(np.float64))).astype(np.float32)
    scaling = config.rope_scaling
    if scaling.kind == "linear":
        return rates / np.float32(scaling.factor)
    if scaling.kind == "llama3":
        return _llama3_rates(rates, scaling, _original_length(config)).astype(np.float32)
    if scaling.kind == "yarn":
        return _yarn_rates(rates, config).astype(np.float32)
    return rates


def _original_length(config: ModelConfig) -> int:
    """Length in tokens the model was trained on before its context was extended."""
    return config.rope_scaling.original_max_position or config.max_position


def _llama3_rates(rates: np.ndarray, scaling: RopeScaling, original: int) -> np.ndarray:
    """Llama 3.1: `scaling.factor` for wavelengths over original / low_freq_factor, 1 under
    original / high_freq_factor, interpolated in between."""
    turns = original * rates / (2 * math.pi)  # full turns over the trained context, [D/2]
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return keep * rates + (1 - keep) * rates / scaling.factor


def _yarn_rates(rates: np.ndarray, config: ModelConfig) -> np.ndarray:
    """YaRN's NTK-by-parts: pairs that turn more than beta_fast times over the trained context
    keep their rate, those that turn less than beta_slow times are interpolated."""
    scaling, dim = config.rope_scaling, config.head_dim

    def pair_turning(turns: float) -> float:
        """Index (real) of the pair that makes `turns` full turns over the trained context."""
        wavelength = _original_length(config) / (turns * 2 * math.pi)
        return dim * math.log(wavelength) / (2 * math.log(config.rope_theta))

    low, high = pair_turning(scaling.beta_fast), pair_turning(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # a step instead of a ramp, without dividing by zero
    interpolate = np.clip((np.arange(dim // 2) - low) / (high - low), 0.0, 1.0)
    return interpolate * rates / scaling.factor + (1 - interpolate) * rates


def attention_scale(config: ModelConfig) -> float:
    """Factor on cos and sin, so that q.k is scaled by its square; 1 except for yarn."""
    scaling = config.rope_scaling
    if scaling.kind != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor

    def temperature(mscale: float) -> float:
        return 1.0 if scaling.factor <= 1 else 0.1 * mscale * math.log(scaling.factor) + 1.0

    if scaling.mscale and scaling.mscale_all_dim:
        return temperature(scaling.mscale) / temperature(scaling.mscale_all_dim)
    return temperature(1.0)


def cos_sin(
    config: ModelConfig, positions: jax.Array, prompt_lens: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of every token's angles.

    Args:
      config: the model.
      positions: i32 [T], position of each token in its own sequence.
      prompt_lens: i32 [T], prompt length of the sequence each token belongs to; read by dynamic
        scaling only. None: positions alone count.

    Returns:
      cos, sin: f32 [T, D/2].

    Dynamic scaling takes theta for the length `max(prompt_len, position + 1)`: a prompt is
    computed with the theta of its whole length and each generated token with its own, which is
    what a one-shot prefill followed by cached decoding does in transformers (on a fresh model:
    there a longer request leaves its theta behind for the next one past the trained context).
    Being a function of the request alone it doesn't change with chunking, preemption or recompute.
    """
    rates: jax.Array = jnp.asarray(inverse_frequencies(config))  # [D/2]
    if config.rope_scaling.kind == "dynamic":
        length = positions + 1 if prompt_lens is None else jnp.maximum(prompt_lens, positions + 1)
        rates = _dynamic_rates(config, rates, length)  # [T, D/2]
    angles = positions.astype(jnp.float32)[:, None] * rates  # [T, D/2]
    scale = attention_scale(config)
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def _dynamic_rates(config: ModelConfig, rates: jax.Array, length: jax.Array) -> jax.Array:
    """Rates [T, D/2] for sequences of `length` [T] tokens; `rates` unchanged up to max_position.

    transformers multiplies theta by `stretch ** (D / (D - 2))`; here the unstretched rates are
    multiplied by what that does to each, which keeps them exact where there is no stretch.
    """
    dim, factor = config.head_dim, config.rope_scaling.factor
    trained = config.max_position
    stretch = factor * jnp.maximum(length, trained).astype(jnp.float32) / trained - (factor - 1)
    exponents = np.arange(0, dim, 2, dtype=np.float32) / (dim - 2)  # (2i/D) * (D/(D-2))
    return rates * stretch[:, None] ** -exponents
