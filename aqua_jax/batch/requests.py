"""What a line asks for: our own dialect, and the choice between it and OpenAI's. No jax."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Collection
from typing import Any

from aqua_jax.config import SamplingParams
from aqua_jax.errors import RequestError
from aqua_jax.prompts import check_messages, check_prompt, check_text

OWN, CHAT, COMPLETIONS = "own", "/v1/chat/completions", "/v1/completions"

_SAMPLING = tuple(field.name for field in dataclasses.fields(SamplingParams))
_PROMPTS = ("prompt", "messages", "prompt_token_ids")
_SCHEDULING = ("user", "weight", "priority")

RequestId = str | int


@dataclasses.dataclass(frozen=True)
class BatchRequest:
    """One request of a job.

    Attributes:
      id: its key in the job.
      line: its line in the input.
      dialect: OWN, CHAT or COMPLETIONS; what the answer looks like.
      prompt: text or token ids; None for a conversation.
      messages: the conversation, or None.
      params: with the job's defaults filled in.
      model: name of the model as the request writes it, echoed by OpenAI's dialect.
      user: whose request it is, for fair scheduling.
      weight: its share of its user's service, for fair scheduling.
      priority: lower runs first, for scheduling by priority.
      size: bytes of the line, for progress.
    """

    id: RequestId
    line: int
    dialect: str
    prompt: str | list[int] | None
    messages: list[dict[str, str]] | None
    params: SamplingParams
    model: str | None = None
    user: str = ""
    weight: float = 1.0
    priority: int = 0
    size: int = 0


def is_openai(record: dict[str, Any]) -> bool:
    """Whether a line speaks OpenAI's dialect."""
    return "custom_id" in record or "body" in record


def request_id(record: dict[str, Any]) -> RequestId:
    """The key of a line, in either dialect.

    Raises:
      RequestError: missing, or neither text nor (own dialect only) an integer.
    """
    field = "custom_id" if is_openai(record) else "id"
    value = record.get(field)
    if isinstance(value, str) and value:
        return check_text(field, value)
    if field == "id" and isinstance(value, int) and not isinstance(value, bool):
        return value
    allowed = "non-empty text" + (" or an integer" if field == "id" else "")
    raise RequestError(field, value, f"{allowed}, different on every line")


def refuse_unknown(record: dict[str, Any], known: Collection[str], prefix: str = "") -> None:
    """Raises a RequestError for the first key of `record` that isn't among `known`."""
    for key in record:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise RequestError(
                prefix + key, record[key], f"known fields ({', '.join(sorted(known))}){hint}"
            )


def parse_own(
    record: dict[str, Any], key: RequestId, line: int, size: int, defaults: SamplingParams
) -> BatchRequest:
    """A line `{"id", "prompt" | "messages" | "prompt_token_ids", sampling fields}`.

    Args:
      record: the line's object.
      key: its id.
      line: its number.
      size: its bytes.
      defaults: what fields that the line doesn't name are set to.

    Raises:
      RequestError: unknown field, wrong type, no prompt or more than one, empty.
    """
    refuse_unknown(record, ("id", *_PROMPTS, *_SAMPLING, *_SCHEDULING))
    given = [name for name in _PROMPTS if name in record]
    if len(given) != 1:
        raise RequestError(
            "prompt", given or None, "exactly one of prompt, messages, prompt_token_ids"
        )
    prompt, messages = None, None
    if given[0] == "messages":
        messages = check_messages(record["messages"])
    elif given[0] == "prompt_token_ids":
        ids = record["prompt_token_ids"]
        if not isinstance(ids, list):
            raise RequestError("prompt_token_ids", ids, "a list of token ids")
        prompt = check_prompt(ids, "prompt_token_ids")
    else:
        if not isinstance(record["prompt"], str):
            raise RequestError("prompt", record["prompt"], "text")
        prompt = check_prompt(record["prompt"])
    changes = {name: record[name] for name in _SAMPLING if name in record}
    params = dataclasses.replace(defaults, **changes)
    return BatchRequest(
        key, line, OWN, prompt, messages, params, **scheduling_fields(record), size=size
    )


def scheduling_fields(record: dict[str, Any]) -> dict[str, Any]:
    """The checked `user`, `weight` and `priority` of a line, where it has them.

    Raises:
      RequestError: wrong type or out of range.
    """
    found = {name: record[name] for name in _SCHEDULING if name in record}
    if "user" in found:
        if not isinstance(found["user"], str):
            raise RequestError("user", found["user"], "text")
        check_text("user", found["user"])
    weight = found.get("weight", 1.0)
    number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
    if not (number and 1e-3 <= weight <= 1e3):
        raise RequestError("weight", weight, "a number from 0.001 to 1000")
    priority = found.get("priority", 0)
    if not isinstance(priority, int) or isinstance(priority, bool) or abs(priority) > 1000:
        raise RequestError("priority", priority, "an integer from -1000 to 1000")
    return found
