"""Checks a request at the door: prompt forms, lengths and ids, before anything is accepted."""

from __future__ import annotations

import hashlib
from typing import Any

from aqua_jax import prompts
from aqua_jax.config import SamplingParams
from aqua_jax.errors import RequestError
from aqua_jax.prompts import Prompt


def tokenize_prompt(prompt: Prompt, tokenizer: Any | None) -> tuple[str | None, list[int]]:
    """Normalise a prompt in any of the forms of `aqua_jax.prompts`.

    Args:
      prompt: text, token ids, or vLLM's `{"prompt": ...}` / `{"prompt_token_ids": ...}`.
      tokenizer: the model's, or None when it has none (token ids only).

    Returns:
      (the text if there was one, the token ids).

    Raises:
      RequestError: not one of the forms, or text without a tokenizer.
    """
    checked = prompts.check_prompt(prompt)
    if isinstance(checked, list):
        return prompts.prompt_text(prompt), checked
    if tokenizer is None:
        raise RequestError("prompt", checked, "token ids: this model came without a tokenizer")
    return checked, tokenizer.encode(checked)


def check_tokens(ids: list[int], vocab_size: int, max_model_len: int) -> None:
    """Check length and range of a tokenized prompt.

    Raises:
      RequestError: empty, too long to generate even one token, or an id outside the vocabulary.
    """
    if not ids:
        raise RequestError("prompt", ids, "at least one token")
    if len(ids) >= max_model_len:
        raise RequestError(
            "prompt", f"{len(ids)} tokens",
            f"at most {max_model_len - 1} tokens (max_model_len {max_model_len}, one to generate)",
        )
    low, high = min(ids), max(ids)
    if low < 0 or high >= vocab_size:
        raise RequestError(
            "prompt_token_ids", low if low < 0 else high, f"ids from 0 to {vocab_size - 1}"
        )


def check_params(params: SamplingParams, vocab_size: int, ban_width: int, eos: int) -> None:
    """Check what depends on the model.

    Args:
      params: the request's.
      vocab_size: of the model.
      ban_width: most token ids that min_tokens can hold back.
      eos: number of the model's end-of-sequence ids.

    Raises:
      RequestError: a stop token id outside the vocabulary, or too many with min_tokens.
    """
    for token in params.stop_token_ids:
        if token >= vocab_size:
            raise RequestError("stop_token_ids", token, f"ids from 0 to {vocab_size - 1}")
    if params.min_tokens and len(params.stop_token_ids) + eos > ban_width:
        raise RequestError(
            "stop_token_ids", list(params.stop_token_ids),
            f"at most {ban_width - eos} ids together with min_tokens",
        )


def request_key(seed: int | None, engine_seed: int, number: int) -> tuple[int, int]:
    """Sampling key of a request as two 32-bit words.

    With a seed it depends on nothing else; without, on the engine's seed and the request's
    number of arrival.
    """
    if seed is None:
        digest = hashlib.blake2b(f"{engine_seed}:{number}".encode(), digest_size=8).digest()
        seed = int.from_bytes(digest, "little")
    seed &= 2**64 - 1
    return seed >> 32, seed & 0xFFFFFFFF
