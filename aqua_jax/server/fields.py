"""Fields of a request body, as JSON schemas: what is accepted, ignored and refused.

One table serves the checks and the OpenAPI document. A name that is in none of the lists is
refused with the nearest known one, as OpenAI's own server does: a misspelt `temprature` that is
silently ignored costs more time than an error. Fields of OpenAI's that can't change the text are
accepted and ignored; those that would have to change it are refused unless they ask for nothing.
"""

from __future__ import annotations

from typing import Any

from aqua_jax.config import LOGPROBS_LIMIT
from aqua_jax.prompts import SILENT_FIELDS

MOST_SAMPLES = 128  # OpenAI's limit of n

Schema = dict[str, Any]


def _number(low: float, high: float) -> Schema:
    return {"type": "number", "minimum": low, "maximum": high}


def _integer(low: int, high: int | None = None) -> Schema:
    schema: Schema = {"type": "integer", "minimum": low}
    return schema if high is None else {**schema, "maximum": high}


_TEXT: Schema = {"type": "string"}
_FLAG: Schema = {"type": "boolean"}
_TOKENS: Schema = {"type": "array", "items": _integer(0), "minItems": 1}
_PROMPT_TEXT: Schema = {"type": "string", "minLength": 1}

# Same name and meaning in SamplingParams, which checks them.
SAMPLING: dict[str, Schema] = {
    "n": _integer(1, MOST_SAMPLES),
    "temperature": _number(0, 100),
    "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    "seed": _integer(-(2**63), 2**63 - 1),
    "stop": {"anyOf": [_PROMPT_TEXT, {"type": "array", "items": _PROMPT_TEXT}]},
    "presence_penalty": _number(-2, 2),
    "frequency_penalty": _number(-2, 2),
    # vLLM's names, beyond OpenAI's:
    "top_k": _integer(-1, 2**31 - 1),
    "min_p": _number(0, 1),
    "repetition_penalty": _number(0.001, 1000),
    "min_tokens": _integer(0),
    "ignore_eos": _FLAG,
    "stop_token_ids": {"type": "array", "items": _integer(0)},
    "include_stop_str_in_output": _FLAG,
    "skip_special_tokens": _FLAG,
}
SCHEDULING: dict[str, Schema] = {
    "user": {**_TEXT, "description": "fairness key: users have equal shares unless weighed"},
    "priority": {**_integer(-1000, 1000), "description": "lower runs first"},
    "weight": {**_number(0.001, 1000), "description": "share of the user's service"},
}
_BOTH: dict[str, Schema] = {
    "model": _TEXT,
    **SAMPLING,
    **SCHEDULING,
    "stream": _FLAG,
    "stream_options": {
        "type": "object",
        "properties": {"include_usage": _FLAG, "include_obfuscation": _FLAG},
        "additionalProperties": False,
    },
}
COMPLETION: dict[str, Schema] = {
    "prompt": {
        "anyOf": [
            _PROMPT_TEXT,
            {"type": "array", "items": _PROMPT_TEXT, "minItems": 1},
            _TOKENS,
            {"type": "array", "items": _TOKENS, "minItems": 1},
        ]
    },
    **_BOTH,
    "max_tokens": _integer(0, 2**31 - 1),
    "logprobs": _integer(0, LOGPROBS_LIMIT),
    "echo": _FLAG,
}
_MESSAGE: Schema = {
    "type": "object",
    "properties": {
        "role": {"type": "string", "minLength": 1},
        "content": {
            "anyOf": [
                _TEXT,
                {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "properties": {"type": {"const": "text"}, "text": _TEXT},
                        "required": ["type", "text"],
                        "additionalProperties": False,
                    },
                },
            ]
        },
        "name": {"anyOf": [_TEXT, {"type": "null"}]},
        **{name: {"enum": [None, []]} for name in SILENT_FIELDS},
    },
    "required": ["role", "content"],
    "additionalProperties": False,
}
CHAT: dict[str, Schema] = {
    "messages": {"type": "array", "items": _MESSAGE, "minItems": 1},
    **_BOTH,
    "max_tokens": _integer(1, 2**31 - 1),
    "max_completion_tokens": _integer(1, 2**31 - 1),
    "logprobs": _FLAG,
    "top_logprobs": _integer(0, LOGPROBS_LIMIT),
}

# OpenAI's, accepted with any value: they don't change the text.
IGNORED = frozenset({
    "metadata", "store", "service_tier", "prompt_cache_key", "prompt_cache_retention",
    "parallel_tool_calls",
})
# OpenAI's successor of `user`; counts where that is missing.
USER_ALIAS = "safety_identifier"
# OpenAI's, not done here: accepted with these values only.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "best_of": (1,),
    "suffix": ("",),
}
