"""OpenAI's wire format of answers: log probabilities, usage, errors. The server's too. No jax.

Reference: OpenAI's API reference, "Chat", "Completions" and "Error codes".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from aqua_jax.engine.outputs import TokenLogprobs

TokenBytes = Callable[[int], bytes | None]  # what a token stands for, if that is known


def finite(value: float) -> float:
    """A log probability that JSON can write: -9999.0 (OpenAI's least) for minus infinity."""
    return value if math.isfinite(value) else -9999.0


def token_name(token: int, table: TokenLogprobs) -> str:
    """How a token is called: its text, or its id where there is no tokenizer."""
    text = table[token].decoded_token
    return f"token_id:{token}" if text is None else text


def _named(token: int, table: TokenLogprobs, token_bytes: TokenBytes | None) -> dict[str, Any]:
    text = token_name(token, table)
    raw = None if token_bytes is None else token_bytes(token)
    # Without the tokenizer's word, what a piece of a character really is can't be told.
    raw = text.encode("utf-8", "replace") if raw is None else raw
    return {"token": text, "logprob": finite(table[token].logprob), "bytes": list(raw)}


def chat_logprobs(
    tokens: Sequence[int], tables: Sequence[TokenLogprobs], alternatives: int | None = None,
    token_bytes: TokenBytes | None = None,
) -> dict[str, Any]:
    """The `logprobs` of a chat choice, or of a streamed piece of it.

    Args:
      tokens: chosen.
      tables: one a token.
      alternatives: how many `top_logprobs` a token gets; None: all that its table has.
      token_bytes: bytes of a token; None, or None from it: those of its text.
    """
    content = []
    for token, table in zip(tokens, tables, strict=False):
        ranked = sorted(table, key=lambda other, table=table: table[other].rank)
        if alternatives is not None:
            ranked = [other for other in ranked if table[other].rank <= alternatives]
        content.append({
            **_named(token, table, token_bytes),
            "top_logprobs": [_named(other, table, token_bytes) for other in ranked],
        })
    return {"content": content}


def completion_logprobs(
    tokens: Sequence[int], tables: Sequence[TokenLogprobs | None], offset: int = 0
) -> dict[str, Any]:
    """The `logprobs` of a completion choice, or of a streamed piece of it.

    Args:
      tokens: chosen, or of the prompt.
      tables: one a token; None for the first of a prompt, which nothing predicts: its name is
        then its id's, unless the caller knows better.
      offset: characters before the first token.
    """
    names: list[str] = []
    offsets: list[int] = []
    for token, table in zip(tokens, tables, strict=False):
        offsets.append(offset)
        names.append(f"token_id:{token}" if table is None else token_name(token, table))
        offset += len(names[-1])
    return {
        "tokens": names,
        "token_logprobs": [
            None if table is None else finite(table[token].logprob)
            for token, table in zip(tokens, tables, strict=False)
        ],
        "top_logprobs": [
            None if table is None else
            {token_name(other, table): finite(table[other].logprob) for other in table}
            for table in tables[: len(tokens)]
        ],
        "text_offset": offsets,
    }


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
    """The `usage` of a response."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def error_body(
    message: str, kind: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """OpenAI's error object: what is wrong, and the field it is in."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
