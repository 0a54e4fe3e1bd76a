"""Operands and exact results for the tests of matrix products."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from aqua_jax.ops import library

DTYPES = (jnp.bfloat16, jnp.float32)
# Not one of them a multiple of the 64 columns and 16 or 32 of k that the layout works in, but for
# the last two; both sides of the 2 row tiles from which the kernels change their order of loops.
SHAPES = ((1, 1, 1), (2, 33, 65), (5, 100, 200), (17, 70, 130), (37, 200, 70), (70, 257, 66),
          (8, 256, 128), (64, 64, 192))  # fmt: skip
_LEVELS = ("generic", "avx2", "avx512", "avx512bf16", "amx")


def instruction_sets() -> tuple[str, ...]:
    """What this processor can run, best last; just "none" when nothing is compiled."""
    best = library.instruction_set()
    return _LEVELS[: _LEVELS.index(best) + 1] if best in _LEVELS else (best,)


def normal(seed: int, *shape: int, dtype: type = np.float32) -> np.ndarray:
    """Standard normal values."""
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def rounded(x: np.ndarray, dtype: type) -> np.ndarray:
    """x as `dtype` holds it, in f64."""
    return np.asarray(x).astype(dtype).astype(np.float64)


def rms_norm(x: np.ndarray, scale: np.ndarray, eps: float) -> np.ndarray:
    """f64 RMSNorm over the last axis."""
    x = np.asarray(x, np.float64)
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * np.asarray(scale, np.float64)


def product(x: np.ndarray, w: np.ndarray, dtype: type) -> tuple[np.ndarray, np.ndarray]:
    """Exact x @ w over operands rounded to `dtype`, and the size of the sums' terms.

    f32 summation in any order is off by at most k * 2^-24 of the second.
    """
    a, b = rounded(x, dtype), rounded(w, dtype)
    return a @ b, np.abs(a) @ np.abs(b)


def swiglu(gate_up: np.ndarray) -> np.ndarray:
    """f64 silu(gate) * up."""
    gate, up = np.split(np.asarray(gate_up, np.float64), 2, axis=-1)
    return gate / (1 + np.exp(-gate)) * up
