"""Prompts and chat messages as users write them, checked before they reach an engine. No jax."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from aqua_jax.errors import RequestError

Prompt = Any  # str | list[int] | {"prompt": str} | {"prompt_token_ids": list[int]} | both
Message = Mapping[str, Any]  # {"role": str, "content": str | list of {"type": "text", ...}}

PROMPT_FORMS = 'text, a list of token ids, {"prompt": text} or {"prompt_token_ids": [...]}'
MESSAGE_FORM = '{"role": ..., "content": text}'

# Fields that clients send along when an answer's message becomes a line of the next request.
SILENT_FIELDS = (
    "refusal", "annotations", "audio", "function_call", "tool_calls", "reasoning_content",
)


class ChatTokenizer(Protocol):
    """The part of a tokenizer that rendering a conversation needs."""

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Token ids of `text`."""
        ...

    def apply_chat_template(
        self, messages: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Prompt text of a conversation."""
        ...


def is_token(value: Any) -> bool:
    """Whether `value` can be a token id: an integer >= 0, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def check_text(field: str, text: str) -> str:
    """`text`, if it can be written as UTF-8 (JSON may smuggle in half a surrogate pair).

    Raises:
      RequestError: it can't.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(
            field, text[error.start : error.start + 8], "text without lone surrogates"
        ) from error
    return text


def check_prompt(prompt: Prompt, field: str = "prompt") -> str | list[int]:
    """Reduces any form of a prompt to its text or its token ids.

    With both in a dictionary the ids count; `prompt_text` finds the text they were made from.

    Raises:
      RequestError: wrong type, unknown key, empty, or not token ids.
    """
    if isinstance(prompt, Mapping):
        unknown = sorted(str(key) for key in set(prompt) - {"prompt", "prompt_token_ids"})
        if unknown or not prompt:
            raise RequestError(
                field, unknown[0] if unknown else {}, 'the keys "prompt", "prompt_token_ids"'
            )
        prompt_text(prompt)
        key = "prompt_token_ids" if "prompt_token_ids" in prompt else "prompt"
        value = prompt[key]
        wanted: tuple[type, ...] = (str,) if key == "prompt" else (list, tuple)
        if not isinstance(value, wanted):
            allowed = "text" if key == "prompt" else "a list of token ids"
            raise RequestError(key, value, allowed)
        return check_prompt(value, key)
    if isinstance(prompt, str):
        if not prompt:
            raise RequestError(field, prompt, "at least one character")
        return check_text(field, prompt)
    if isinstance(prompt, Sequence) and not isinstance(prompt, (bytes, bytearray)):
        ids = list(prompt)
        if not ids:
            raise RequestError(field, ids, "at least one token id")
        if set(map(type, ids)) == {int} and min(ids) >= 0:
            return ids  # a tenth of the time of the loop, which is there to name the wrong one
        for position, token in enumerate(ids):
            if not is_token(token):
                raise RequestError(f"{field}[{position}]", token, "token ids, integers >= 0")
        return ids
    raise RequestError(field, prompt, PROMPT_FORMS)


def prompt_text(prompt: Prompt) -> str | None:
    """The text that comes with a prompt, or None.

    Raises:
      RequestError: a dictionary's "prompt" is no text.
    """
    text = prompt.get("prompt") if isinstance(prompt, Mapping) else prompt
    if isinstance(prompt, Mapping) and "prompt" in prompt and not isinstance(text, str):
        raise RequestError("prompt", text, "text")
    return text if isinstance(text, str) else None


def _content(field: str, content: Any) -> str:
    if isinstance(content, str):
        return check_text(field, content)
    if not isinstance(content, (list, tuple)):
        raise RequestError(field, content, 'text, or a list of {"type": "text", "text": ...}')
    parts = []
    for position, part in enumerate(content):
        name = f"{field}[{position}]"
        if not isinstance(part, Mapping) or part.get("type") != "text":
            raise RequestError(name, part, '{"type": "text", "text": ...}')
        if not isinstance(part.get("text"), str) or set(part) != {"type", "text"}:
            raise RequestError(name, part, '{"type": "text", "text": ...}')
        parts.append(check_text(name, part["text"]))
    return "".join(parts)


def check_messages(messages: Any, field: str = "messages") -> list[dict[str, str]]:
    """A conversation with plain text contents.

    `SILENT_FIELDS` that are null or empty, and a null name, are left out: OpenAI's clients send
    them with an answer that is given back as part of the conversation.

    Raises:
      RequestError: not a non-empty list of messages, unknown key, or a content that isn't text.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise RequestError(field, messages, f"a non-empty list of {MESSAGE_FORM}")
    checked = []
    for position, message in enumerate(messages):
        name = f"{field}[{position}]"
        if not isinstance(message, Mapping):
            raise RequestError(name, message, MESSAGE_FORM)
        for key, value in message.items():
            if key in SILENT_FIELDS and value not in (None, []):
                raise RequestError(f"{name}.{key}", value, "null: this server has only text")
            if key not in ("role", "content", "name", *SILENT_FIELDS):
                raise RequestError(f"{name}.{key}", value, "the fields role, content, name")
        for key in ("role", "content"):
            if key not in message:
                raise RequestError(f"{name}.{key}", None, MESSAGE_FORM)
        role = message["role"]
        if not isinstance(role, str) or not role:
            raise RequestError(f"{name}.role", role, "text, such as system, user or assistant")
        entry = {
            "role": check_text(f"{name}.role", role),
            "content": _content(f"{name}.content", message["content"]),
        }
        if message.get("name") is not None:
            if not isinstance(message["name"], str):
                raise RequestError(f"{name}.name", message["name"], "text")
            entry["name"] = check_text(f"{name}.name", message["name"])
        checked.append(entry)
    return checked


def render_chat(tokenizer: ChatTokenizer | None, messages: Any) -> tuple[str, list[int]]:
    """A conversation as the model's template writes it: its text and its token ids.

    The template writes special tokens itself, so none is added while encoding.

    Raises:
      RequestError: the messages are malformed, the template refuses them, or there is none.
    """
    if tokenizer is None:
        raise RequestError("messages", messages, "token ids: this model came without a tokenizer")
    text = tokenizer.apply_chat_template(check_messages(messages), add_generation_prompt=True)
    return text, tokenizer.encode(text, add_special=False)
