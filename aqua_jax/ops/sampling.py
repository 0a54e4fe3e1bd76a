"""Choosing a token per row from logits: greedy, temperature, top-k, top-p, min-p.

No sort: a filter is a threshold on the row's logits, found bit by bit in the integer order of
floats (32 counting passes over the row). Ties
at a threshold are all kept. The draw is an inverse-CDF look-up with one uniform number per row,
so a row's token depends on its logits and its number alone, never on its neighbours.

Letters: R rows, V vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from aqua_jax.ops import library

_BLOCK = 256  # columns per block of the two-level cumulative sum


def request_uniforms(
    key_data: jax.Array, sample_index: jax.Array, token_index: jax.Array
) -> jax.Array:
    """One uniform number per row from fold_in(fold_in(request key, sample), token).

    Args:
      key_data: u32[R, 2], threefry key of the request.
      sample_index: i32[R], which of the request's samples.
      token_index: i32[R], index of the output token.

    Returns:
      f32[R] in [0, 1).
    """

    def one(data: jax.Array, sample: jax.Array, token: jax.Array) -> jax.Array:
        key = jax.random.wrap_key_data(data, impl="threefry2x32")
        key = jax.random.fold_in(jax.random.fold_in(key, sample), token)
        return jax.random.uniform(key)

    return jax.vmap(one)(key_data, sample_index, token_index)


def argmax(values: jax.Array) -> jax.Array:
    """First index of each row's largest value: f32[R, V] -> i32[R].

    Two vectorised reductions; XLA's own argmax is a scalar variadic reduce on CPU.
    """
    top = jnp.max(values, axis=-1, keepdims=True)
    index = jax.lax.broadcasted_iota(jnp.int32, values.shape, 1)
    return jnp.min(jnp.where(values == top, index, values.shape[-1] - 1), axis=-1)


def _ordered(values: jax.Array) -> jax.Array:
    """Map f32 to u32 so that integer order is float order."""
    bits = jax.lax.bitcast_convert_type(values, jnp.uint32)
    sign = bits >> 31
    return jnp.where(sign == 1, ~bits, bits | jnp.uint32(0x80000000))


def _largest_threshold(keys: jax.Array, weights: jax.Array, wanted: jax.Array) -> jax.Array:
    """Largest key t per row with sum(weights[keys >= t]) >= wanted: u32[R, V] -> u32[R, 1]."""

    def body(i: jax.Array, t: jax.Array) -> jax.Array:
        trial = t | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        kept = jnp.sum(jnp.where(keys >= trial, weights, 0), axis=-1, keepdims=True)
        return jnp.where(kept >= wanted, trial, t)

    start = jnp.zeros((keys.shape[0], 1), jnp.uint32)
    return jax.lax.fori_loop(0, 32, body, start)


def _filter(
    scaled: jax.Array, top_k: jax.Array, top_p: jax.Array, min_p: jax.Array
) -> jax.Array:
    """Probabilities (unnormalised) with the tokens outside the filters set to 0."""
    probs = jnp.exp(scaled)  # the row's largest is 1: scaled has its maximum subtracted
    probs = jnp.where(probs >= min_p[:, None], probs, 0.0)
    keys = _ordered(scaled)
    vocab = scaled.shape[-1]
    wanted = jnp.where(top_k <= 0, vocab, top_k).astype(jnp.float32)[:, None]
    by_rank = _largest_threshold(keys, jnp.ones_like(scaled), jnp.minimum(wanted, vocab))
    probs = jnp.where(keys >= by_rank, probs, 0.0)
    # A hair below 1 keeps rounding of the total from cutting the tail when top_p is 1.
    mass = jnp.sum(probs, axis=-1, keepdims=True) * jnp.minimum(top_p[:, None], 1.0 - 1e-7)
    by_mass = _largest_threshold(keys, probs, mass)
    cut = (keys >= by_mass) | (top_p[:, None] >= 1.0)
    return jnp.where(cut, probs, 0.0)


def _draw(probs: jax.Array, uniforms: jax.Array) -> jax.Array:
    """Inverse-CDF draw in two levels: f32[R, V], f32[R] -> i32[R]."""
    rows, vocab = probs.shape
    blocks = -(-vocab // _BLOCK)
    padded = jnp.pad(probs, ((0, 0), (0, blocks * _BLOCK - vocab)))
    padded = padded.reshape(rows, blocks, _BLOCK)
    ends = jnp.cumsum(jnp.sum(padded, axis=-1), axis=-1)  # [R, blocks]
    target = uniforms[:, None] * ends[:, -1:]
    block = jnp.minimum(jnp.sum(ends <= target, axis=-1), blocks - 1)
    before = jnp.where(block > 0, jnp.take_along_axis(ends, block[:, None] - 1, axis=1)[:, 0], 0)
    inside = jnp.take_along_axis(padded, block[:, None, None], axis=1)[:, 0]  # [R, _BLOCK]
    within = jnp.cumsum(inside, axis=-1)
    reached = (within > (target[:, 0] - before)[:, None]) & (inside > 0)
    first = jnp.argmax(reached, axis=-1)
    # Rounding may leave nothing reached: then the block's last possible token.
    last = _BLOCK - 1 - jnp.argmax(inside[:, ::-1] > 0, axis=-1)
    column = jnp.where(jnp.any(reached, axis=-1), first, last)
    return (block * _BLOCK + column).astype(jnp.int32)


def sample_tokens_reference(
    logits: jax.Array, temperature: jax.Array, top_k: jax.Array, top_p: jax.Array,
    min_p: jax.Array, uniforms: jax.Array,
) -> jax.Array:
    """Plain jnp `sample_tokens`: any platform."""
    best = argmax(logits)
    finite = jnp.isfinite(jnp.max(logits, axis=-1))  # NaN wins a max, so it shows here
    greedy = temperature <= 0

    def random() -> jax.Array:
        scaled = logits / jnp.where(greedy, 1.0, temperature)[:, None]
        scaled = scaled - jnp.max(scaled, axis=-1, keepdims=True)
        filters = (top_k > 0) | (top_p < 1.0) | (min_p > 0.0)
        probs = jax.lax.cond(
            jnp.any(filters & ~greedy),
            lambda: _filter(scaled, top_k, top_p, min_p),
            lambda: jnp.exp(scaled),
        )
        return _draw(probs, uniforms)

    drawn = jax.lax.cond(jnp.all(greedy), lambda: best, random)
    return jnp.where(finite, jnp.where(greedy, best, drawn), -1)


def sample_tokens(
    logits: jax.Array, temperature: jax.Array, top_k: jax.Array, top_p: jax.Array,
    min_p: jax.Array, uniforms: jax.Array, *, rows: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Choose a token per row.

    Filters apply in this order, on the distribution after temperature: min-p (relative to the
    likeliest token), top-k, top-p (of the mass that is left). Ties at a cut are kept.

    Args:
      logits: f32[R, V]; -inf forbids a token.
      temperature: f32[R]; 0 takes the likeliest token (the first of equals).
      top_k: i32[R]; 0 keeps all.
      top_p: f32[R]; 1 keeps all.
      min_p: f32[R]; 0 keeps all.
      uniforms: f32[R] in [0, 1), the row's random number.
      rows: i32[1], number of leading rows that matter; the others' tokens are arbitrary. None: all.
      implementation: None (the fastest that can run), "ffi" or "reference".

    Returns:
      i32[R] token ids; -1 where a row's largest logit is NaN or infinite.

    Raises:
      ValueError: unknown implementation, or "ffi" where it cannot run.
    """
    if implementation not in (None, "ffi", "reference"):
        raise ValueError(
            f"implementation is {implementation!r}; allowed: None, 'ffi', 'reference'"
        )
    usable = library.available("aqua_sample")
    if implementation == "ffi" and not usable:
        raise ValueError(f"implementation 'ffi' can't be used: {library.reason() or 'no CPU'}")
    args = (logits, temperature, top_k, top_p, min_p, uniforms)
    if implementation == "reference" or not usable:
        return sample_tokens_reference(*args)
    operand = jnp.zeros((0,), jnp.int32) if rows is None else rows
    shape = jax.ShapeDtypeStruct((logits.shape[0],), jnp.int32)
    call = jax.ffi.ffi_call("aqua_sample", shape, vmap_method="sequential")
    return call(*args, operand)
