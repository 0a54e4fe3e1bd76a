"""The projection before attention, with everything between the residual stream and the cache.

Legend: T rows, k input features, H query heads, K kv heads, D head dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from aqua_jax.ops.linear import Norm, is_packed, linear, optional, rms_norm, use_ffi


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Half-split rotary embedding: x [T, N, D], cos and sin [T, D/2] -> [T, N, D].

    Pair i of a head, (x[i], x[i + D/2]), is turned by its angle; `models.rope` has the angles.
    """
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def qkv_rotary(
    x: jax.Array,
    w: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    *,
    features: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    bias: jax.Array | None = None,
    norm: Norm | None = None,
    query_norm: Norm | None = None,
    key_norm: Norm | None = None,
    rows: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries, keys and values of `rms_norm(x) @ w + bias`, the first two normed and rotated.

    The C++ implementation does all of it on the sums of the product while they are in cache. XLA
    makes a slice, a norm and a rotation of each: 60 ms of a 1,024-token step of 335 ms (12 layers,
    12/4 heads of 64, on a busy machine).

    Args:
      x: [T, k], f32 or bf16.
      w: [k, (H + 2K) * D] or packed: query heads, key heads, value heads.
      cos, sin: f32 [T, D/2].
      features: k.
      heads, kv_heads, head_dim: H, K, D; D is even.
      bias: f32 [(H + 2K) * D].
      norm: scale f32 [k] and eps of an RMSNorm of x.
      query_norm, key_norm: scale f32 [D] and eps of an RMSNorm over each head, before rotating.
        Both or neither, with one eps.
      rows: i32 [1], how many leading rows count; the others come out as 0. None: all.
      implementation: None (the fastest that can run), "ffi" or "xla".

    Returns:
      f32 q [T, H, D], k [T, K, D], v [T, K, D].

    Raises:
      ValueError: shapes that don't fit, an unknown implementation, or "ffi" where it can't run.
    """
    count, wide = x.shape[0], (heads + 2 * kv_heads) * head_dim
    if (query_norm is None) != (key_norm is None):
        raise ValueError("query_norm and key_norm are given both or not at all")
    if query_norm is not None and key_norm is not None and query_norm[1] != key_norm[1]:
        raise ValueError(f"eps differs: query_norm {query_norm[1]}, key_norm {key_norm[1]}")
    if cos.shape != (count, head_dim // 2) or sin.shape != cos.shape or head_dim % 2:
        raise ValueError(f"cos has shape {cos.shape}; allowed: {(count, head_dim // 2)}")
    if use_ffi(implementation, "aqua_qkv", is_packed(w), "the weights are not packed"):
        if x.dtype not in (jnp.bfloat16, jnp.float32):
            x = x.astype(jnp.float32)
        out = [
            jax.ShapeDtypeStruct((count, n, head_dim), jnp.float32)
            for n in (heads, kv_heads, kv_heads)
        ]
        q, k, v = jax.ffi.ffi_call("aqua_qkv", out)(
            x,
            w,
            optional(bias, jnp.float32),
            optional(None if norm is None else norm[0], jnp.float32),
            optional(None if query_norm is None else query_norm[0], jnp.float32),
            optional(None if key_norm is None else key_norm[0], jnp.float32),
            cos,
            sin,
            optional(rows, jnp.int32),
            norm_eps=np.float32(0.0 if norm is None else norm[1]),
            head_eps=np.float32(0.0 if query_norm is None else query_norm[1]),
        )
        return q, k, v
    qkv = linear(
        x, w, in_features=features, out_features=wide, bias=bias, rows=rows, norm=norm,
        implementation=implementation,
    )
    ends = [heads * head_dim, (heads + kv_heads) * head_dim]
    q, k, v = (part.reshape(count, -1, head_dim) for part in jnp.split(qkv, ends, axis=-1))
    if query_norm is not None and key_norm is not None:
        q, k = rms_norm(q, query_norm), rms_norm(k, key_norm)
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    return q, k, v
