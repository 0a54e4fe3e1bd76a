"""Chat templates: Jinja in a sandbox, with the helpers that transformers gives them.

A template comes with a checkpoint and is untrusted code: it runs in Jinja's immutable sandbox, and
the messages it sees are rebuilt from plain JSON types. The environment (trim_blocks, lstrip_blocks,
tojson without HTML escapes, raise_exception, strftime_now, the `generation` tag) is that of
transformers' `utils/chat_template_utils.py`, so that both render the same text.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

from aqua_jax.errors import ModelLoadError, RequestError

_ROLES_HELP = "a list of objects with a string 'role' and a 'content'"


def plain(value: Any) -> Any:
    """`value` rebuilt from exact JSON types, so that no object's methods reach the sandbox.

    Raises:
      RequestError: it holds something that JSON has no form for.
    """
    if value is None or type(value) in (str, int, float, bool):
        return value
    for kind in (str, bool, int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    raise RequestError("messages", type(value).__name__, "JSON values")


def check_messages(messages: Any) -> list[dict[str, Any]]:
    """Messages as plain objects.

    Raises:
      RequestError: not a non-empty list of objects with a string role.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)) or not messages:
        raise RequestError("messages", messages, "a non-empty list")
    checked = []
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise RequestError(f"messages[{index}]", message, _ROLES_HELP)
        if "content" not in message and "tool_calls" not in message:
            raise RequestError(f"messages[{index}].content", None, "text")
        checked.append(plain(message))
    return checked


def _environment() -> Any:
    import jinja2
    import jinja2.ext
    import jinja2.nodes
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """`{% generation %}...{% endgeneration %}` marks the assistant's tokens: rendered as is."""

        tags = {"generation"}  # noqa: RUF012 (the base class declares it so)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return jinja2.nodes.Scope(body).set_lineno(line)

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def to_json(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
            sort_keys=sort_keys,
        )

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


class ChatTemplate:
    """A compiled chat template; rendering is thread-safe.

    Args:
      source: the Jinja text.
      special: `bos_token`, `eos_token` and the like, visible to the template.

    Raises:
      ModelLoadError: the text is not a valid template.
    """

    def __init__(self, source: str, special: Mapping[str, str]):
        import jinja2

        self._special = dict(special)
        try:
            self._template = _environment().from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise ModelLoadError(f"chat template: {error}") from error

    def render(
        self, messages: Any, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The conversation as prompt text.

        Args:
          messages: a non-empty list of {"role", "content"} objects.
          add_generation_prompt: whether to end with the opening of the assistant's answer.
          **variables: further names that the template may use (tools, enable_thinking, ...).

        Raises:
          RequestError: the messages are malformed, or the template refuses them.
        """
        import jinja2

        chat = check_messages(messages)
        names = {"tools": None, "documents": None, **self._special, **plain(variables)}
        try:
            return self._template.render(
                messages=chat, add_generation_prompt=add_generation_prompt, **names
            )
        except jinja2.TemplateError as error:
            raise RequestError(
                "messages", messages, f"what the model's chat template accepts: {error}"
            ) from error
        except (TypeError, ValueError, KeyError, AttributeError, OverflowError, RecursionError,
                ZeroDivisionError, MemoryError) as error:
            raise RequestError(
                "messages", messages, f"what the model's chat template can render: {error!r}"
            ) from error
