"""JSONL from anywhere: any bytes give one outcome per line, in bounded memory."""

from __future__ import annotations

import io
import json
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aqua_jax.batch.lines import json_line, parse_json, parse_object, read_lines
from aqua_jax.batch.openai import parse_openai
from aqua_jax.batch.requests import BatchRequest, is_openai, parse_own, request_id
from aqua_jax.config import SamplingParams
from aqua_jax.errors import RequestError


@given(st.binary(max_size=200), st.integers(1, 50))
def test_lines_cover_the_input(data, limit):
    lines = list(read_lines(io.BytesIO(data), limit))
    assert sum(line.size for line in lines) == len(data)
    assert [line.number for line in lines] == list(range(1, len(lines) + 1))
    assert len(lines) == data.count(b"\n") + (not data.endswith(b"\n") and data != b"")
    raw = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    for line, expected in zip(lines, raw, strict=False):
        assert (line.data is None) == (line.size > limit and len(expected) >= limit)
        assert line.data is None or line.data == expected.rstrip(b"\r")


def test_marks_and_line_ends_are_dropped():
    lines = [line.data for line in read_lines(io.BytesIO(b"\xef\xbb\xbf{}\r\n[]\n\n1"))]
    assert lines == [b"{}", b"[]", b"", b"1"]


def test_a_line_over_the_limit_is_skipped_without_being_held():
    class Endless(io.RawIOBase):
        """A line of 256 MiB, then a short one."""

        left = 256 << 20

        def readline(self, size: int | None = -1) -> bytes:
            assert size is not None and size > 0
            if self.left > 0:
                piece = min(size, self.left)
                self.left -= piece
                return b"x" * piece if self.left else b"x" * (piece - 1) + b"\n"
            self.left -= 1
            return b"{}" if self.left == -1 else b""

    tracemalloc.start()
    lines = list(read_lines(Endless(), limit=1000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [(line.data, line.size) for line in lines] == [(None, 256 << 20), (b"{}", 2)]
    assert peak < 8 << 20
    with pytest.raises(RequestError, match="at most"):
        parse_json(lines[0])


@given(st.text(st.characters() | st.sampled_from("\x85\u2028\u2029\x0b\x1c\r\n\ud800é")))
def test_a_written_line_is_one_line_to_every_reader(text):
    line = json_line({"text": text})
    assert line.splitlines() == [line[:-1]]
    assert json.loads(line)["text"] == text.encode("utf-8", "replace").decode()


@given(st.binary(max_size=300))
def test_any_bytes_parse_or_say_why(data):
    for line in read_lines(io.BytesIO(data)):
        try:
            assert isinstance(parse_object(line), dict)
        except RequestError as error:
            assert error.field == "line" and error.allowed


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from([
    "id", "custom_id", "method", "url", "body", "prompt", "messages", "prompt_token_ids", "n",
    "temperature", "top_p", "top_k", "stop", "seed", "max_tokens", "logprobs", "stop_token_ids",
    "model", "user", "stream", "top_logprobs", "echo", "best_of", "response_format",
])
VALUES = JSON | st.sampled_from([
    "x", 1, 0.5, ["a"], [1, 2], "POST", "/v1/completions", "/v1/chat/completions",
    [{"role": "user", "content": "hi"}],
    [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
])


def parse(record):
    key = request_id(record)
    parser = parse_openai if is_openai(record) else parse_own
    return parser(record, key, 1, 10, SamplingParams())


@given(st.dictionaries(FIELDS, VALUES, max_size=5), st.dictionaries(FIELDS, VALUES, max_size=4))
def test_any_fields_give_a_request_or_name_the_field(record, body):
    for candidate in (record, {"id": "x", **record}, {"custom_id": "x", "body": body}):
        try:
            request = parse(json.loads(json.dumps(candidate)))
        except RequestError as error:
            assert error.field and error.allowed
            json.dumps(str(error))
        else:
            assert isinstance(request, BatchRequest)
            assert (request.prompt is None) != (request.messages is None)
            assert isinstance(request.params, SamplingParams)


def test_openai_fields_become_sampling_parameters():
    body = {
        "model": "m", "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
        "max_completion_tokens": 7, "temperature": None, "top_p": 0.5, "n": 2, "stop": "end",
        "seed": 3, "logprobs": True, "top_logprobs": 4, "frequency_penalty": 0.5, "top_k": 9,
        "user": "me", "response_format": {"type": "text"}, "stream": False,
    }
    request = parse({"custom_id": "x", "url": "/v1/chat/completions", "body": body})
    assert request.messages == [{"role": "user", "content": "hi"}]
    assert request.params == SamplingParams(
        max_tokens=7, top_p=0.5, n=2, stop=("end",), seed=3, logprobs=4, frequency_penalty=0.5,
        top_k=9,
    )
    assert (request.user, request.model) == ("me", "m")
    request = parse({"custom_id": "x", "body": {"prompt": [[1, 2]], "logprobs": 2, "best_of": 1}})
    assert request.prompt == [1, 2] and request.params.logprobs == 2
