"""Plain causal attention over whole sequences: no cache, any platform, differentiable.

This is what `model(tokens)` uses, and the oracle for the paged kernels in `aqua_jax.ops`.

Legend: B batch, T queries, U keys (as many), K kv heads, G query heads of each, D head dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def dense_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, *, scale: float, window: int | None
) -> jax.Array:
    """Causal softmax attention in f32.

    Args:
      q: [B, T, H, D]; query head h reads kv head h // (H // K).
      k, v: [B, T, K, D].
      scale: of the scores, D ** -0.5 for this family.
      window: tokens each query sees, itself included; None: all before it.

    Returns:
      f32 [B, T, H, D].
    """
    batch, length, heads, dim = q.shape
    kv_heads = k.shape[2]
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    # Grouping the query heads lets einsum read each kv head once, without repeating it G times.
    q = q.reshape(batch, length, kv_heads, heads // kv_heads, dim)  # [B, T, K, G, D]
    scores = jnp.einsum("btkgd,bukd->bkgtu", q, k) * scale
    query, key = jnp.arange(length)[:, None], jnp.arange(length)[None, :]
    visible = key <= query  # [T, U]
    if window is not None:
        visible &= key > query - window
    # Every query sees itself, so no row of the softmax is empty.
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
    out = jnp.einsum("bkgtu,bukd->btkgd", weights, v)
    return out.reshape(batch, length, heads, dim)
