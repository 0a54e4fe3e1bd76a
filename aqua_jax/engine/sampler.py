"""From logits to tokens inside the sampling program: penalties, bans, the draw, log probabilities.

The rare parts (`edits`: penalties and banned tokens; `logprobs`) are static variants, so the
common program carries neither. Letters: R rows, V vocabulary, N history width.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from aqua_jax.config import LOGPROBS_LIMIT
from aqua_jax.engine.batch import SampleBatch
from aqua_jax.ops import sampling


@dataclasses.dataclass(frozen=True)
class SampleVariant:
    """Which rare parts a sampling program contains."""

    edits: bool = False  # penalties and banned tokens
    logprobs: bool = False  # log probabilities of the chosen and the likeliest tokens


def apply_edits(logits: jax.Array, batch: SampleBatch, history: jax.Array) -> jax.Array:
    """Penalise past tokens and forbid banned ones.

    Presence and frequency look at output tokens, repetition at prompt and output, as vLLM does.

    Args:
      logits: f32[R, V].
      batch: parameters of the rows.
      history: i32[R, N], known tokens of the row's sequence, the last sampled one included;
        -1 past `batch.history_lens`.

    Returns:
      f32[R, V].
    """
    rows, vocab = logits.shape
    column = jnp.arange(history.shape[1])
    row = jnp.arange(rows)[:, None]
    known = jnp.where(column < batch.history_lens[:, None], history, vocab)
    output = jnp.where(column >= batch.prompt_lens[:, None], known, vocab)
    zeros = jnp.zeros((rows, vocab), jnp.float32)
    seen = zeros.at[row, known].max(1.0, mode="drop")
    counts = zeros.at[row, output].add(1.0, mode="drop")
    repeated = jnp.where(
        logits > 0,
        logits / batch.repetition_penalty[:, None],
        logits * batch.repetition_penalty[:, None],
    )
    logits = jnp.where(seen > 0, repeated, logits)
    logits = logits - counts * batch.frequency_penalty[:, None]
    logits = logits - (counts > 0) * batch.presence_penalty[:, None]
    banned = jnp.where(batch.banned < 0, vocab, batch.banned)
    return logits.at[row, banned].set(-jnp.inf, mode="drop")


def pack_logprobs(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Log probability and rank of `tokens`, and the likeliest alternatives, as one i32 array.

    Args:
      logits: f32[R, V], unedited.
      tokens: i32[R].

    Returns:
      i32[R, 2 + 2 * width]: bits of the token's log probability, its rank (1 is likeliest), then
      `width` token ids and the bits of their log probabilities, likeliest first; width is
      min(LOGPROBS_LIMIT, V).
    """
    normal = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)
    rank = 1 + jnp.sum(logits > chosen, axis=-1, keepdims=True, dtype=jnp.int32)
    values, ids = jax.lax.top_k(logits, min(LOGPROBS_LIMIT, logits.shape[-1]))

    def bits(x: jax.Array) -> jax.Array:
        return jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)

    return jnp.concatenate([bits(chosen - normal), rank, ids, bits(values - normal)], axis=-1)


def sample(
    logits: jax.Array, batch: SampleBatch, last_tokens: jax.Array, history: jax.Array | None,
    variant: SampleVariant, implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Choose each row's token and file it under its slot.

    Args:
      logits: f32[R, V].
      batch: parameters of the rows.
      last_tokens: i32[S], last sampled token of each slot.
      history: i32[R, N] with the edits variant, else None. -2 stands for the slot's last token,
        which the host has not seen yet.
      variant: which rare parts to run.
      implementation: of `ops.sampling.sample_tokens`.

    Returns:
      (last_tokens i32[S], packed i32[R, W]): column 0 is the token, or -1 when the row's logits
      are not finite; with logprobs, the columns of `pack_logprobs` follow.
    """
    edited = logits
    if variant.edits:
        assert history is not None
        last = last_tokens[jnp.minimum(batch.slots, last_tokens.shape[0] - 1)]
        history = jnp.where(history == -2, last[:, None], history)
        edited = apply_edits(logits, batch, history)
    uniforms = sampling.request_uniforms(batch.key_data, batch.sample_index, batch.token_index)
    tokens = sampling.sample_tokens(
        edited, batch.temperature, batch.top_k, batch.top_p, batch.min_p, uniforms,
        rows=batch.counts, implementation=implementation,
    )
    last_tokens = last_tokens.at[batch.slots].set(jnp.maximum(tokens, 0), mode="drop")
    packed = tokens[:, None]
    if variant.logprobs:
        alternatives = pack_logprobs(logits, jnp.maximum(tokens, 0))
        packed = jnp.concatenate([packed, alternatives], axis=-1)
    return last_tokens, packed
