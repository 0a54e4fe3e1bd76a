"""Gated activation and the gated feed-forward layer around it (Shazeer 2020, arXiv 2002.05202).

Legend: T rows, d model width, F hidden width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from aqua_jax.ops.linear import PANEL, Norm, is_packed, linear, optional, use_ffi, zero_beyond


def swiglu(
    gate_up: jax.Array,
    rows: jax.Array | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """silu(gate) * up.

    Args:
      gate_up: f32 [T, 2F], gate then up.
      rows: i32 [1], how many leading rows count; the others come out as 0. None: all.
      dtype: of the result, bfloat16 or float32.
      implementation: None (the fastest that can run), "ffi" or "xla".

    Returns:
      [T, F].

    Raises:
      ValueError: an odd width, an unknown implementation, or "ffi" where it can't run.
    """
    if gate_up.ndim != 2 or gate_up.shape[1] % 2:
        raise ValueError(f"gate_up has shape {gate_up.shape}; allowed: [T, 2F]")
    supported = gate_up.dtype == jnp.float32 and dtype in (jnp.bfloat16, jnp.float32)
    if use_ffi(implementation, "aqua_swiglu", supported, "swiglu takes f32 and gives f32 or bf16"):
        shape = (gate_up.shape[0], gate_up.shape[1] // 2)
        return jax.ffi.ffi_call("aqua_swiglu", jax.ShapeDtypeStruct(shape, dtype))(
            gate_up, optional(rows, jnp.int32)
        )
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return zero_beyond((jax.nn.silu(gate) * up).astype(dtype), rows)


def gated_mlp(
    x: jax.Array,
    gate_up: jax.Array,
    down: jax.Array,
    *,
    features: int,
    hidden: int,
    gate_up_bias: jax.Array | None = None,
    down_bias: jax.Array | None = None,
    rows: jax.Array | None = None,
    norm: Norm | None = None,
    residual: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """`down(silu(gate(h)) * up(h)) + residual` with h = rms_norm(x), as one op.

    The C++ implementation rounds the hidden rows to the weights' dtype while they are in cache and
    never writes the f32 [T, 2F] array: 13.4 core-ms against 16.5 for the parts at 1,024 rows
    (d 768, F 2,048), norm and residual included; level at 64 rows.

    Args:
      x: [T, d], f32 or bf16.
      gate_up: [d, 2F] or packed, gate then up.
      down: [F, d] or packed.
      features: d.
      hidden: F.
      gate_up_bias: f32 [2F].
      down_bias: f32 [d].
      rows: i32 [1], how many leading rows count; the others come out as 0. None: all.
      norm: scale f32 [d] and eps of an RMSNorm of x.
      residual: f32 [T, d].
      implementation: None (the fastest that can run), "ffi" or "xla".

    Returns:
      f32 [T, d].

    Raises:
      ValueError: shapes that don't fit, an unknown implementation, or "ffi" where it can't run.
    """
    supported = is_packed(gate_up) and is_packed(down) and hidden % PANEL == 0
    why_not = "it needs packed weights and a hidden width that is a multiple of 64"
    if use_ffi(implementation, "aqua_mlp", supported, why_not):
        if x.dtype not in (jnp.bfloat16, jnp.float32):
            x = x.astype(jnp.float32)
        shape = (x.shape[0], features)
        return jax.ffi.ffi_call("aqua_mlp", jax.ShapeDtypeStruct(shape, jnp.float32))(
            x,
            gate_up,
            optional(gate_up_bias, jnp.float32),
            down,
            optional(down_bias, jnp.float32),
            optional(None if norm is None else norm[0], jnp.float32),
            optional(residual, jnp.float32),
            optional(rows, jnp.int32),
            hidden=np.int64(hidden),
            norm_eps=np.float32(0.0 if norm is None else norm[1]),
        )
    wide = linear(
        x, gate_up, in_features=features, out_features=2 * hidden, bias=gate_up_bias,
        rows=rows, norm=norm, implementation=implementation,
    )
    middle = swiglu(wide, rows, down.dtype, implementation=implementation)
    return linear(
        middle, down, in_features=hidden, out_features=features, bias=down_bias,
        rows=rows, residual=residual, implementation=implementation,
    )
