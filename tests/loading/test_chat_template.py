"""Chat templates: what they render, what they may not do, and how they refuse."""

from __future__ import annotations

import datetime
from typing import Any

import pytest

from aqua_jax.errors import ModelLoadError, RequestError
from aqua_jax.loading.chat_template import ChatTemplate

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
USER = [{"role": "user", "content": "hi"}]


def render(source: str, messages: Any = USER, *arguments: Any, **variables: Any) -> str:
    return ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"}).render(
        messages, *arguments, **variables
    )


def test_chatml() -> None:
    opened = "<|im_start|>user\nhi<|im_end|>\n"
    assert render(CHATML) == opened + "<|im_start|>assistant\n"
    assert render(CHATML, USER, False) == opened


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ bos_token }}{{ eos_token }}", "<s></s>"),
        ("  {% if true %}\n  x\n  {% endif %}\n", "  x\n"),  # trim_blocks, lstrip_blocks
        ("{{ messages | tojson }}", '[{"role": "user", "content": "hi"}]'),
        ("{{ '<é&>' | tojson }}", '"<é&>"'),
        ("{{ {'b': 1, 'a': 2} | tojson(sort_keys=True, separators=(',', ':')) }}",
         '{"a":2,"b":1}'),
        ("{{ {'a': 1} | tojson(indent=1) }}", '{\n "a": 1\n}'),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{% generation %}a{{ 1 }}{% endgeneration %}b", "a1b"),
        ("{% set ns = namespace(x=1) %}{% set ns.x = 2 %}{{ ns.x }}", "2"),
        ("{{ tools is none }}{{ documents is none }}{{ nothing is defined }}", "TrueTrueFalse"),
        ("{{ '%05.1f' | format(2) }}", "002.0"),
    ],
)  # fmt: skip
def test_environment(source: str, expected: str) -> None:
    assert render(source) == expected


def test_today() -> None:
    assert render("{{ strftime_now('%Y') }}") == str(datetime.datetime.now().year)


def test_variables_reach_the_template() -> None:
    assert render("{{ enable_thinking }}{{ tools[0].name }}", enable_thinking=False,
                  tools=[{"name": "f"}]) == "Falsef"  # fmt: skip


def test_a_template_can_refuse() -> None:
    source = "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}"
    assert render(source) == ""
    with pytest.raises(RequestError, match=r"messages.*user first"):
        render(source, [{"role": "tool", "content": "x"}])


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages.__class__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__globals__['os'] }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ self._TemplateReference__context }}{{ ''|attr('__class__')|attr('__mro__') }}",
    ],
)
def test_the_sandbox_holds(source: str) -> None:
    with pytest.raises(RequestError, match="messages"):
        assert render(source) == ""
        raise RequestError("messages", None, "nothing leaked")


@pytest.mark.parametrize(
    "source",
    ["{{ 1 / 0 }}", "{{ messages[0].content + 1 }}", "{{ messages[5].role }}",
     "{{ range(10**9) | list }}", "{{ nothing.at.all }}",
     "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"],
)  # fmt: skip
def test_a_template_that_fails_blames_the_messages(source: str) -> None:
    with pytest.raises(RequestError, match="messages"):
        render(source)


@pytest.mark.parametrize("source", ["{% if %}", "{{ 'x' ", "{% nope %}", "{% endfor %}"])
def test_broken_templates(source: str) -> None:
    with pytest.raises(ModelLoadError, match="chat template"):
        render(source)


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ([], "messages"), ("hi", "messages"), (None, "messages"), ({"role": "user"}, "messages"),
        (["hi"], r"messages\[0\]"), ([{"content": "x"}], r"messages\[0\]"),
        ([*USER, {"role": 3, "content": "x"}], r"messages\[1\]"),
        ([{"role": "user"}], r"messages\[0\]\.content"),
        ([{"role": "user", "content": object()}], "messages"),
    ],
)  # fmt: skip
def test_malformed_messages(messages: Any, field: str) -> None:
    with pytest.raises(RequestError, match=field):
        render(CHATML, messages)


def test_messages_are_copied_as_plain_data() -> None:
    class Text(str):
        def __add__(self, other: str) -> str:
            raise AssertionError("an object's own method ran in the sandbox")

    assert "hello" in render(CHATML, [{"role": "user", "content": Text("hello")}])
