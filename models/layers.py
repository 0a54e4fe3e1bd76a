"""The building blocks of the decoder: projection, norm, embedding.

Matrices are stored `[in, out]`, in the compute dtype; norms, biases and everything between two
matmuls are f32, so that a bf16 model loses precision only where bf16 buys speed.

A matrix may instead hold the blocked layout of `aqua_jax.ops.linear.pack` (more dimensions, same
weights): the engine swaps packed arrays in where that is faster, and nothing here changes.

Legend: T tokens (rows), d model width, D head dim, V vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from aqua_jax.ops import linear as linear_ops

INIT_STDDEV = 0.02  # of random weights, as GPT-2 and most of its descendants start


def _parameter(
    init: nnx.Initializer,
    rngs: nnx.Rngs | None,
    shape: tuple[int, ...],
    dtype: jax.typing.DTypeLike,
) -> nnx.Param:
    """An initialised parameter; without `rngs` only its shape and dtype.

    Shapes alone cost microseconds a parameter. Tracing the initialisers under `nnx.eval_shape`
    gives the same at 5 ms each: 4.2 s for a model of 126 layers, longer than loading may take.
    """
    if rngs is None:
        return nnx.Param(jax.ShapeDtypeStruct(shape, dtype))
    return nnx.Param(init(rngs.params(), shape, dtype))


class Linear(nnx.Module):
    """`x @ kernel + bias` with an f32 result whatever the weights' dtype.

    Attributes:
      kernel: [in, out] in `dtype`, or packed.
      bias: f32 [out], or None.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = False,
        dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs | None,
    ):
        self.in_features = in_features
        self.out_features = out_features
        normal, zeros = nnx.initializers.normal(INIT_STDDEV), nnx.initializers.zeros_init()
        self.kernel = _parameter(normal, rngs, (in_features, out_features), dtype)
        self.bias = _parameter(zeros, rngs, (out_features,), jnp.float32) if use_bias else None

    def __call__(
        self,
        x: jax.Array,
        *,
        norm: RMSNorm | None = None,
        residual: jax.Array | None = None,
        rows: jax.Array | None = None,
        implementation: str | None = None,
    ) -> jax.Array:
        """`norm(x) @ kernel + bias + residual`: x [T, in] -> f32 [T, out].

        Args:
          x: any float dtype; rounded to the kernel's, after the norm.
          norm: applied to x first. Inside the product it costs no pass of its own.
          residual: f32 [T, out].
          rows: i32 [1], how many leading rows count; None: all. The others come out as 0.
          implementation: of `ops.linear.linear`; None picks the fastest, "xla" is differentiable.
        """
        return linear_ops.linear(
            x,
            self.kernel[...],
            in_features=self.in_features,
            out_features=self.out_features,
            bias=None if self.bias is None else self.bias[...],
            norm=None if norm is None else norm.operand,
            residual=residual,
            rows=rows,
            implementation=implementation,
        )


class RMSNorm(nnx.Module):
    """Root mean square norm over the last axis (Zhang & Sennrich 2019, arXiv 1910.07467), in f32.

    Attributes:
      scale: f32 [features].
    """

    def __init__(self, features: int, *, eps: float, rngs: nnx.Rngs | None):
        self.eps = eps
        self.scale = _parameter(nnx.initializers.ones_init(), rngs, (features,), jnp.float32)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., features] -> f32, same shape."""
        return linear_ops.rms_norm(x, self.operand)

    @property
    def operand(self) -> linear_ops.Norm:
        """(scale, eps), for ops that take a norm in."""
        return self.scale[...], self.eps


class Embedding(nnx.Module):
    """Token table, which is also the output projection when the model ties them.

    Attributes:
      embedding: [V, d] in `dtype`; or packed, as the matrix [d, V] it is for the logits.
    """

    def __init__(
        self,
        vocab_size: int,
        features: int,
        *,
        dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs | None,
    ):
        self.vocab_size = vocab_size
        self.features = features
        normal = nnx.initializers.normal(INIT_STDDEV)
        self.embedding = _parameter(normal, rngs, (vocab_size, features), dtype)

    @property
    def packed(self) -> bool:
        """Whether the table holds the blocked layout."""
        return linear_ops.is_packed(self.embedding[...])

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Rows of the table: tokens i32 [T], each in [0, V) -> f32 [T, d]."""
        table = self.embedding[...]
        if self.packed:
            return linear_ops.embed_rows(table, tokens, self.features).astype(jnp.float32)
        return table[tokens].astype(jnp.float32)

    def attend(
        self,
        x: jax.Array,
        *,
        rows: jax.Array | None = None,
        implementation: str | None = None,
    ) -> jax.Array:
        """Logits of a tied head, `x @ embedding.T`: x [T, d] -> f32 [T, V]."""
        table = self.embedding[...]
        return linear_ops.linear(
            x,
            table if self.packed else table.T,  # XLA folds the transpose into the matmul
            in_features=self.features,
            out_features=self.vocab_size,
            rows=rows,
            implementation=implementation,
        )
