"""A request's body as a checked call: prompts, sampling parameters, how to answer."""

from __future__ import annotations

import dataclasses
from typing import Any

from aqua_jax.batch.lines import Line, parse_object
from aqua_jax.batch.requests import refuse_unknown, scheduling_fields
from aqua_jax.config import LOGPROBS_LIMIT, SamplingParams
from aqua_jax.errors import RequestError
from aqua_jax.prompts import check_messages, check_prompt
from aqua_jax.server import fields


@dataclasses.dataclass(frozen=True)
class Call:
    """What a client asks for.

    Attributes:
      chat: a conversation; else completions.
      prompts: of completions: texts or token ids, at least one.
      messages: of a chat.
      params: how tokens are chosen.
      model: as the client names it; None: it didn't.
      stream: server-sent events instead of one object.
      include_usage: end the stream with a piece that counts tokens.
      echo: begin each completion with its prompt.
      discard: ask for nothing but the echo (max_tokens was 0).
      user: fairness key.
      priority: lower runs first.
      weight: share of its user's service.
    """

    chat: bool
    prompts: list[str | list[int]]
    messages: list[dict[str, str]]
    params: SamplingParams
    model: str | None
    stream: bool
    include_usage: bool
    echo: bool
    discard: bool
    user: str
    priority: int
    weight: float


def parse_call(body: bytes, chat: bool) -> Call:
    """Checks a body field by field.

    Args:
      body: as it came.
      chat: whether it is for /v1/chat/completions.

    Raises:
      RequestError: no JSON object, an unknown field, a wrong type, a value out of range, or
        something this engine doesn't do. `body` is the field of what is no JSON object.
    """
    try:
        record = parse_object(Line(1, body, len(body)))
    except RequestError as error:
        raise RequestError("body", error.value, error.allowed) from None
    record = {name: value for name, value in record.items() if value is not None}
    known = fields.CHAT if chat else fields.COMPLETION
    _check_known(record, known)
    for name, schema in known.items():
        if name in record and schema.get("type") in ("boolean", "string"):
            flag = schema["type"] == "boolean"
            wanted, words = (bool, "true or false") if flag else (str, "text")
            if not isinstance(record[name], wanted):
                raise RequestError(name, record[name], words)
    stream = record.get("stream", False)
    changes = {name: record[name] for name in fields.SAMPLING if name in record}
    samples = changes.get("n", 1)
    if isinstance(samples, int) and not 1 <= samples <= fields.MOST_SAMPLES:
        raise RequestError("n", samples, f"an integer from 1 to {fields.MOST_SAMPLES}")
    if chat:
        changes.update(_chat_limits(record))
        prompts, messages = [], check_messages(record.get("messages"))
    else:
        changes.update(_completion_limits(record))
        prompts, messages = _prompts(record.get("prompt")), []
    scheduling = scheduling_fields(record)
    alias = record.get(fields.USER_ALIAS, "")
    if not isinstance(alias, str):
        raise RequestError(fields.USER_ALIAS, alias, "text")
    discard = not chat and record.get("max_tokens") == 0
    return Call(
        chat, prompts, messages, SamplingParams(**changes), record.get("model"), stream,
        _include_usage(record.get("stream_options"), stream), record.get("echo", False), discard,
        scheduling.get("user") or alias, scheduling.get("priority", 0),
        scheduling.get("weight", 1.0),
    )


def _check_known(record: dict[str, Any], known: dict[str, Any]) -> None:
    for name, values in fields.NEUTRAL.items():
        if name not in record:
            continue
        if name == "best_of":
            values = (record.get("n", 1),)
        if record[name] in values:
            continue
        raise RequestError(
            name, record[name], f"only {values[0]!r}: this server doesn't do more with it"
        )
    accepted = {*known, *fields.IGNORED, *fields.NEUTRAL, fields.USER_ALIAS}
    refuse_unknown(record, accepted)


def _prompts(value: Any) -> list[str | list[int]]:
    """The prompts of a completion: one or many, text or token ids."""
    if isinstance(value, str):
        return [check_prompt(value)]
    if not isinstance(value, list) or not value:
        raise RequestError("prompt", value, "text, token ids, or a non-empty list of one of these")
    if not isinstance(value[0], (str, list)):
        return [check_prompt(value)]
    found = []
    for position, prompt in enumerate(value):
        name = f"prompt[{position}]"
        if type(prompt) is not type(value[0]):
            raise RequestError(name, prompt, "the same kind as prompt[0], text or token ids")
        found.append(check_prompt(prompt, name))
    return found


def _chat_limits(record: dict[str, Any]) -> dict[str, Any]:
    """`max_tokens` and `logprobs` of SamplingParams; without a limit the model's length is one."""
    given = [name for name in ("max_completion_tokens", "max_tokens") if name in record]
    if len(given) == 2 and record[given[0]] != record[given[1]]:
        raise RequestError(
            "max_tokens", record["max_tokens"], "the same as max_completion_tokens, or neither"
        )
    changes: dict[str, Any] = {"max_tokens": record[given[0]] if given else None}
    wanted, alternatives = record.get("logprobs", False), record.get("top_logprobs")
    if alternatives is not None and not wanted:
        raise RequestError("top_logprobs", alternatives, "only beside logprobs: true")
    if wanted:
        changes["logprobs"] = _alternatives("top_logprobs", alternatives or 0)
    return changes


def _completion_limits(record: dict[str, Any]) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    if "max_tokens" in record:
        limit = record["max_tokens"]
        # Nothing to say still takes a step: one token, which is then left out.
        changes["max_tokens"] = 1 if limit == 0 and not isinstance(limit, bool) else limit
    if "logprobs" in record:
        changes["logprobs"] = _alternatives("logprobs", record["logprobs"])
        if record.get("echo"):
            changes["prompt_logprobs"] = changes["logprobs"]
    return changes


def _alternatives(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= LOGPROBS_LIMIT:
        raise RequestError(name, value, f"an integer from 0 to {LOGPROBS_LIMIT}")
    return value


def _include_usage(options: Any, stream: bool) -> bool:
    if options is None:
        return False
    if not isinstance(options, dict):
        raise RequestError("stream_options", options, "an object")
    if not stream:
        raise RequestError("stream_options", options, "only beside stream: true")
    refuse_unknown(options, ("include_usage", "include_obfuscation"), "stream_options.")
    for name, value in options.items():
        if not isinstance(value, (bool, type(None))):
            raise RequestError(f"stream_options.{name}", value, "true or false")
    return bool(options.get("include_usage"))
