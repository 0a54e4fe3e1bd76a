"""Answers on the wire, whatever states of the engine a reader happens to see."""

from __future__ import annotations

import json

import pytest

from aqua_jax.engine.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from aqua_jax.server.answers import Answer
from aqua_jax.server.calls import parse_call

WORDS = ["the", " quick", " brown", " fox"]


def state(count: int) -> RequestOutput:
    """After `count` of four tokens, behind a prompt of one."""
    tables = [{token: Logprob(-0.5 - token, 1, WORDS[token])} for token in range(len(WORDS))]
    ended = count == len(WORDS)
    sample = CompletionOutput(
        0, "".join(WORDS[:count]), list(range(count)), 0.0, list(tables[:count]),
        "length" if ended else None,
    )
    return RequestOutput("r", "fox", [3], [sample], ended, RequestMetrics(0.0), [None])


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("seen", [(1, 2, 3, 4), (4,), (1, 4), (2, 2, 3, 4)])
def test_pieces_add_up_to_the_whole_wherever_they_are_cut(seen, echo):
    call = parse_call(json.dumps(
        {"prompt": "fox", "stream": True, "logprobs": 0, "echo": echo}
    ).encode(), False)
    answer = Answer(call, "m", [("fox", [3])], None)
    whole = answer.whole([state(4)])["choices"][0]
    text, found = "", {name: [] for name in whole["logprobs"]}
    for count in seen:
        for line in answer.pieces(0, state(count)).decode().split("\n\n")[:-1]:
            [choice] = json.loads(line.removeprefix("data: "))["choices"]
            text += choice["text"]
            for name, values in (choice["logprobs"] or {}).items():
                found[name] += values
    assert text == whole["text"] and found == whole["logprobs"]
    assert choice["finish_reason"] == "length" == whole["finish_reason"]


@pytest.mark.parametrize("seen", [(1, 2, 3, 4), (4,), (3, 4)])
def test_pieces_of_a_chat_name_the_speaker_once(seen):
    call = parse_call(json.dumps({
        "messages": [{"role": "user", "content": "x"}], "stream": True, "logprobs": True,
    }).encode(), True)
    answer = Answer(call, "m", [("x", [3])], None)
    whole = answer.whole([state(4)])["choices"][0]
    text, found, roles = "", [], []
    for count in seen:
        for line in answer.pieces(0, state(count)).decode().split("\n\n")[:-1]:
            [choice] = json.loads(line.removeprefix("data: "))["choices"]
            text += choice["delta"].get("content", "")
            roles += [choice["delta"]["role"]] if "role" in choice["delta"] else []
            found += choice["logprobs"]["content"]
    assert text == whole["message"]["content"] and found == whole["logprobs"]["content"]
    assert roles == ["assistant"]
