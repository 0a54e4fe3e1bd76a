"""OpenAI's Batch dialect: lines `{custom_id, method, url, body}` and their response records.

Reference: OpenAI's "Batch API" and "Chat Completions" documentation. Extra sampling fields are
accepted in the body under vLLM's names, weight and priority as in our own lines. No jax.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from typing import Any

from aqua_jax.batch import dialect
from aqua_jax.batch.requests import (
    CHAT,
    COMPLETIONS,
    BatchRequest,
    RequestId,
    refuse_unknown,
    scheduling_fields,
)
from aqua_jax.config import LOGPROBS_LIMIT, SamplingParams
from aqua_jax.engine.outputs import CompletionOutput, RequestOutput
from aqua_jax.errors import RequestError
from aqua_jax.prompts import check_messages, check_prompt

# Fields with the same name and meaning in SamplingParams. Null means: not given.
_SAME = (
    "n", "temperature", "top_p", "seed", "stop", "presence_penalty", "frequency_penalty",
    "top_k", "min_p", "min_tokens", "stop_token_ids", "ignore_eos", "repetition_penalty",
    "include_stop_str_in_output", "skip_special_tokens",
)
_BOTH = (
    *_SAME, "model", "max_tokens", "user", "weight", "priority", "stream", "logprobs", "metadata",
    "store",
)
_CHAT_FIELDS = (*_BOTH, "messages", "max_completion_tokens", "top_logprobs", "response_format")
_COMPLETION_FIELDS = (*_BOTH, "prompt", "echo", "best_of")


def parse_openai(
    record: dict[str, Any], key: RequestId, line: int, size: int, defaults: SamplingParams
) -> BatchRequest:
    """A line `{"custom_id", "method", "url", "body"}`.

    Args:
      record: the line's object.
      key: its custom_id.
      line: its number.
      size: its bytes.
      defaults: what sampling fields that the body doesn't name are set to.

    Raises:
      RequestError: unknown field, wrong type, or something this engine doesn't do.
    """
    refuse_unknown(record, ("custom_id", "method", "url", "body"))
    if record.get("method", "POST") != "POST":
        raise RequestError("method", record["method"], "POST")
    body = record.get("body")
    if not isinstance(body, dict):
        raise RequestError("body", body, "an object with the request's fields")
    url = record.get("url", CHAT if "messages" in body else COMPLETIONS)
    if url not in (CHAT, COMPLETIONS):
        raise RequestError("url", url, f"{CHAT} or {COMPLETIONS}")
    try:
        return _parse_body(body, url, key, line, size, defaults)
    except RequestError as error:
        raise RequestError(f"body.{error.field}", error.value, error.allowed) from None


def _parse_body(
    body: dict[str, Any], url: str, key: RequestId, line: int, size: int, defaults: SamplingParams
) -> BatchRequest:
    refuse_unknown(body, _CHAT_FIELDS if url == CHAT else _COMPLETION_FIELDS)
    body = {name: value for name, value in body.items() if value is not None}
    if not isinstance(body.get("model", ""), str):
        raise RequestError("model", body["model"], "text")
    if body.get("stream", False) is not False:
        raise RequestError("stream", body["stream"], "false: a batch doesn't stream")
    changes = {name: body[name] for name in _SAME if name in body}
    prompt, messages = None, None
    if url == CHAT:
        messages = check_messages(body.get("messages"))
        changes.update(_chat_changes(body))
    else:
        prompt = _completion_prompt(body)
        changes.update(_completion_changes(body))
    return BatchRequest(
        key, line, url, prompt, messages, dataclasses.replace(defaults, **changes),
        model=body.get("model"), size=size, **scheduling_fields(body),
    )


def _chat_changes(body: dict[str, Any]) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    limits = [name for name in ("max_tokens", "max_completion_tokens") if name in body]
    if len(limits) == 2:
        raise RequestError("max_tokens", body["max_tokens"], "not beside max_completion_tokens")
    if limits:
        changes["max_tokens"] = body[limits[0]]
    wanted = body.get("logprobs", False)
    if not isinstance(wanted, bool):
        raise RequestError("logprobs", wanted, "true or false")
    alternatives = body.get("top_logprobs")
    if alternatives is not None and not wanted:
        raise RequestError("top_logprobs", alternatives, "only with logprobs true")
    if wanted:
        if isinstance(alternatives, bool) or not isinstance(alternatives or 0, int):
            raise RequestError("top_logprobs", alternatives, f"0 to {LOGPROBS_LIMIT}")
        changes["logprobs"] = alternatives or 0
    if body.get("response_format", {"type": "text"}) != {"type": "text"}:
        raise RequestError("response_format", body["response_format"], '{"type": "text"}')
    return changes


def _completion_changes(body: dict[str, Any]) -> dict[str, Any]:
    if body.get("echo", False) is not False:
        raise RequestError("echo", body["echo"], "false")
    if "best_of" in body and body["best_of"] != body.get("n", 1):
        raise RequestError("best_of", body["best_of"], "the same as n")
    return {name: body[name] for name in ("max_tokens", "logprobs") if name in body}


def _completion_prompt(body: dict[str, Any]) -> str | list[int]:
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], (str, list)):
        prompt = prompt[0]
    if not isinstance(prompt, (str, list)):
        raise RequestError("prompt", prompt, "text, a list of token ids, or a list of one of these")
    return check_prompt(prompt)


def _name(prefix: str, key: RequestId) -> str:
    """An id that is the same whenever the job is resumed."""
    return prefix + hashlib.blake2b(str(key).encode(), digest_size=12).hexdigest()


def success_record(request: BatchRequest, output: RequestOutput, model: str) -> dict[str, Any]:
    """OpenAI's record of an answered request."""
    chat = request.dialect == CHAT
    choices = [_chat_choice(one) if chat else _completion_choice(one) for one in output.outputs]
    completion_tokens = sum(len(one.token_ids) for one in output.outputs)
    body = {
        "id": _name("chatcmpl-" if chat else "cmpl-", request.id),
        "object": "chat.completion" if chat else "text_completion",
        "created": int(time.time()),
        "model": request.model or model,
        "choices": choices,
        "usage": dialect.usage(len(output.prompt_token_ids), completion_tokens),
    }
    return {
        "id": _name("batch_req_", request.id),
        "custom_id": request.id,
        "response": {"status_code": 200, "request_id": _name("req_", request.id), "body": body},
        "error": None,
    }


def error_record(
    key: RequestId | None, line: int, details: dict[str, Any], status: int
) -> dict[str, Any]:
    """OpenAI's record of a line that wasn't answered.

    Args:
      key: the custom_id, or None when the line has none of its own.
      line: number of the line.
      details: line, field, value, allowed and message.
      status: 400 for a bad request, 500 for our failure.
    """
    kind = "invalid_request_error" if status == 400 else "server_error"
    name = key if key is not None else f"line {line}"
    body = dialect.error_body(details["message"], kind, details["field"])
    return {
        "id": _name("batch_req_", name),
        "custom_id": key,
        "response": {"status_code": status, "request_id": _name("req_", name), "body": body},
        "error": {"code": kind, **details},
    }


def _chat_choice(output: CompletionOutput) -> dict[str, Any]:
    logprobs = None
    if output.logprobs is not None:
        logprobs = dialect.chat_logprobs(output.token_ids, output.logprobs)
    return {
        "index": output.index,
        "message": {"role": "assistant", "content": output.text},
        "logprobs": logprobs,
        "finish_reason": output.finish_reason,
    }


def _completion_choice(output: CompletionOutput) -> dict[str, Any]:
    logprobs = None
    if output.logprobs is not None:
        logprobs = dialect.completion_logprobs(output.token_ids, output.logprobs)
    return {
        "index": output.index,
        "text": output.text,
        "logprobs": logprobs,
        "finish_reason": output.finish_reason,
    }
