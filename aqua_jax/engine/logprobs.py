"""Turns a row of the packed log-probability read into vLLM's dictionaries."""

from __future__ import annotations

from typing import Any

import numpy as np

from aqua_jax.engine.outputs import Logprob, TokenLogprobs


def unpack_row(
    row: np.ndarray, token: int, alternatives: int, tokenizer: Any | None
) -> TokenLogprobs:
    """One position's log probabilities.

    Args:
      row: i32[W] as `sampler.pack_logprobs` lays it out.
      token: the chosen (or, in a prompt, given) token.
      alternatives: how many of the likeliest tokens to add; 0 gives the token alone.
      tokenizer: names the tokens; None leaves `decoded_token` empty.

    Returns:
      The token first, then the alternatives, likeliest first.
    """
    width = (len(row) - 2) // 2
    entries = {token: Logprob(float(row[:1].view(np.float32)[0]), int(row[1]))}
    ids = row[2 : 2 + width][:alternatives].tolist()
    values = row[2 + width :].view(np.float32)[:alternatives].tolist()
    for rank, (other, value) in enumerate(zip(ids, values, strict=True), 1):
        entries.setdefault(other, Logprob(value, rank))
    if tokenizer is not None:
        for other, entry in entries.items():
            entry.decoded_token = tokenizer.decode([other], skip_special=False)
    return entries
