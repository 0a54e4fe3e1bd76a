"""The official client against the server: answers, streams, errors, cancellation."""

from __future__ import annotations

import asyncio
import contextlib

import openai
import pytest

from tests.server.serving import MODEL, serving, text_engine_config

CHAT = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "the quick fox"}]


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0) as made:
        yield made


def test_the_model_is_listed(client):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).object == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another")


def test_a_completion_says_what_a_second_one_says(client):
    ask = {"model": MODEL, "prompt": "the quick", "max_tokens": 8, "temperature": 0.0}
    first = client.completions.create(**ask)
    assert first.object == "text_completion" and first.id.startswith("cmpl-")
    assert first.choices[0].finish_reason in ("length", "stop")
    assert first.usage.completion_tokens <= 8 and first.usage.prompt_tokens == 2
    assert first.usage.total_tokens == first.usage.prompt_tokens + first.usage.completion_tokens
    assert client.completions.create(**ask).choices[0].text == first.choices[0].text
    assert first._request_id == first.id


def test_seeds_samples_and_the_sum_of_a_stream(client):
    ask = {
        "model": MODEL, "messages": CHAT, "max_completion_tokens": 12, "n": 3, "seed": 7,
        "temperature": 1.0, "top_p": 0.9, "extra_body": {"top_k": 50, "ignore_eos": True},
    }
    whole = client.chat.completions.create(**ask)
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert {choice.message.role for choice in whole.choices} == {"assistant"}
    assert len({choice.message.content for choice in whole.choices}) == 3
    texts, ends, usage = ["", "", ""], {}, None
    stream = client.chat.completions.create(
        **ask, stream=True, stream_options={"include_usage": True}
    )
    for piece in stream:
        usage = piece.usage or usage
        for choice in piece.choices:
            texts[choice.index] += choice.delta.content or ""
            if choice.finish_reason:
                ends[choice.index] = choice.finish_reason
    assert texts == [choice.message.content for choice in whole.choices]
    assert ends == {0: "length", 1: "length", 2: "length"}
    assert usage.completion_tokens == 36 == whole.usage.completion_tokens


def test_the_chat_template_is_applied(client):
    rendered = "<|system|>be brief\n<|user|>the quick fox\n<|assistant|>"
    ask = {"model": MODEL, "max_tokens": 6, "temperature": 0.0}
    chat = client.chat.completions.create(messages=CHAT, **ask)
    plain = client.completions.create(prompt=rendered, **ask)
    assert chat.choices[0].message.content == plain.choices[0].text
    assert chat.usage.prompt_tokens == plain.usage.prompt_tokens


def test_an_answer_can_be_given_back_as_part_of_the_conversation(client):
    ask = {"model": MODEL, "max_tokens": 3, "temperature": 0.0}
    said = client.chat.completions.create(messages=CHAT, **ask).choices[0].message
    more = {"role": "user", "content": "jumps"}
    plain = [*CHAT, {"role": "assistant", "content": said.content}, more]
    expected = client.chat.completions.create(messages=plain, **ask).choices[0].message.content
    for form in (said, said.model_dump(), {**said.model_dump(), "tool_calls": [], "name": None}):
        answer = client.chat.completions.create(messages=[*CHAT, form, more], **ask)
        assert answer.choices[0].message.content == expected


def test_several_prompts_of_either_kind_and_their_streams(client):
    common = {"model": MODEL, "max_tokens": 5, "temperature": 0.0, "n": 2}
    texts = client.completions.create(prompt=["the quick", "brown fox"], **common)
    ids = client.completions.create(prompt=[[5, 6, 7], [8, 9]], **common)
    assert [choice.index for choice in texts.choices] == [0, 1, 2, 3]
    assert texts.choices[0].text == texts.choices[1].text  # greedy samples are equal
    assert ids.usage.prompt_tokens == 5
    pieces = ["", "", "", ""]
    for piece in client.completions.create(
        prompt=["the quick", "brown fox"], stream=True, **common
    ):
        for choice in piece.choices:
            pieces[choice.index] += choice.text
    assert pieces == [choice.text for choice in texts.choices]


def test_log_probabilities_in_both_dialects(client):
    ask = {"model": MODEL, "max_tokens": 4, "temperature": 0.0, "extra_body": {"ignore_eos": True}}
    chat = client.chat.completions.create(messages=CHAT, logprobs=True, top_logprobs=3, **ask)
    content = chat.choices[0].logprobs.content
    assert len(content) == 4
    for entry in content:
        assert len(entry.top_logprobs) == 3 and entry.logprob <= 0
        assert entry.token == entry.top_logprobs[0].token  # greedy
        values = [other.logprob for other in entry.top_logprobs]
        assert values == sorted(values, reverse=True)
    joined = bytes(byte for entry in content for byte in entry.bytes)
    assert joined.decode("utf-8", "replace") == chat.choices[0].message.content
    streamed = []
    for piece in client.chat.completions.create(
        messages=CHAT, logprobs=True, top_logprobs=3, stream=True, **ask
    ):
        if piece.choices[0].logprobs:
            streamed += piece.choices[0].logprobs.content
    assert streamed == content

    plain = client.completions.create(prompt="the quick", logprobs=2, echo=True, **ask)
    names = plain.choices[0].logprobs
    assert names.tokens[:2] == ["the", " quick"] and len(names.tokens) == 6
    assert names.token_logprobs[0] is None and all(v <= 0 for v in names.token_logprobs[1:])
    assert names.text_offset[:3] == [0, 3, 9]
    assert plain.choices[0].text.startswith("the quick")
    tokens, offsets = [], []
    for piece in client.completions.create(
        prompt="the quick", logprobs=2, echo=True, stream=True, **ask
    ):
        if piece.choices[0].logprobs:
            tokens += piece.choices[0].logprobs.tokens
            offsets += piece.choices[0].logprobs.text_offset
    assert (tokens, offsets) == (names.tokens, names.text_offset)


def test_a_prompt_can_be_scored_without_an_answer(client):
    scored = client.completions.create(
        model=MODEL, prompt="the quick brown", max_tokens=0, echo=True, logprobs=1
    )
    assert scored.choices[0].text == "the quick brown"
    assert scored.choices[0].logprobs.tokens == ["the", " quick", " brown"]
    assert scored.choices[0].finish_reason == "length" and scored.usage.completion_tokens == 0


def test_stops_end_an_answer_and_say_which(client):
    ask = {"model": MODEL, "prompt": "the quick", "max_tokens": 40, "temperature": 0.0}
    text = client.completions.create(**ask).choices[0].text
    stop = text[3:5]
    choice = client.completions.create(**ask, stop=[stop]).choices[0]
    assert choice.text == text[: text.index(stop)]
    assert choice.finish_reason == "stop" and choice.stop_reason == stop


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"temperature": 101}, "temperature", "0 to 100"),
        ({"temperature": "hot"}, "temperature", "number"),
        ({"n": 0}, "n", "1 to 128"),
        ({"n": 129}, "n", "128"),
        ({"max_tokens": -1}, "max_tokens", ">= 1"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "0 to 20"),
        ({"top_logprobs": 2}, "top_logprobs", "logprobs: true"),
        ({"stop": [""]}, "stop", "non-empty"),
        ({"messages": []}, "messages", "non-empty"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "content"),
        (
            {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}]},
            "messages[0].tool_calls", "only text",
        ),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "text"),
        ({"tools": [{"type": "function"}]}, "tools", "only []"),
        ({"response_format": {"type": "json_object"}}, "response_format", "only"),
        ({"extra_body": {"temprature": 1}}, "temprature", "did you mean temperature?"),
        ({"extra_body": {"priority": "high"}}, "priority", "integer"),
        ({"extra_body": {"weight": 0}}, "weight", "0.001"),
        ({"extra_body": {"min_tokens": 50}, "max_tokens": 2}, "min_tokens", "max_tokens"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream: true"),
        ({"messages": [{"role": "user", "content": "fox " * 3000}]}, "messages", "at most 2047"),
    ],
)
def test_bad_fields_are_named(client, fields, param, words):
    ask = {"model": MODEL, "messages": CHAT, **fields}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**ask)
    assert caught.value.param == param and caught.value.type == "invalid_request_error"
    assert caught.value.request_id.startswith("req-")
    assert words in str(caught.value)


def test_what_cannot_change_the_text_is_ignored(client):
    answer = client.chat.completions.create(
        model=MODEL, messages=CHAT, max_tokens=2, metadata={"a": "b"}, store=False,
        service_tier="auto", tools=[], response_format={"type": "text"}, user="u",
        extra_body={"safety_identifier": "x"},
    )
    assert answer.choices[0].message.role == "assistant"


def test_user_weight_and_priority_reach_the_scheduler(client, served, monkeypatch):
    seen, scheduler = [], served.engine._engine.scheduler
    add = scheduler.add

    def note(sequence):
        seen.append((sequence.user, sequence.weight, sequence.priority))
        add(sequence)

    monkeypatch.setattr(scheduler, "add", note)
    ask = {"model": MODEL, "max_tokens": 1}
    body = {"weight": 2.5, "priority": -3}
    client.completions.create(prompt="x", user="ann", extra_body=body, **ask)
    client.chat.completions.create(messages=CHAT, user="bo", extra_body=body, n=2, **ask)
    client.completions.create(prompt="x", **ask)
    assert seen == [("ann", 2.5, -3), *[("bo", 2.5, -3)] * 2, ("", 1.0, 0)]


def test_an_unknown_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="gpt-9", prompt="x")
    assert caught.value.code == "model_not_found" and MODEL in str(caught.value)


def test_closing_a_stream_aborts_the_request(client, served):
    aborted = served.engine.stats()["requests_aborted"]
    stream = client.completions.create(
        model=MODEL, prompt="the quick", max_tokens=2000, stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    stream.close()
    assert served.idle()
    assert served.engine.stats()["requests_aborted"] == aborted + 1


def test_cancelled_tasks_abort_their_requests(served):
    async def run():
        async with openai.AsyncOpenAI(
            base_url=served.url + "/v1", api_key="none", max_retries=0
        ) as client:
            tasks = [
                asyncio.create_task(client.chat.completions.create(
                    model=MODEL, messages=CHAT, max_tokens=1900, n=2,
                    extra_body={"ignore_eos": True},
                ))
                for _ in range(6)
            ]
            while served.engine.stats()["live_requests"] < 6:
                await asyncio.sleep(0.005)
            for task in tasks:
                task.cancel()
            for task in tasks:
                with contextlib.suppress(asyncio.CancelledError, openai.OpenAIError):
                    await task

    asyncio.run(run())
    assert served.idle()


def test_keys_are_asked_for_and_stand_for_their_users(tmp_path):
    with serving(text_engine_config(tmp_path), keys=["first", "second"]) as served:
        users = []
        add = served.engine._engine.add_request

        def note(*arguments, user="", **named):
            users.append(user)
            add(*arguments, user=user, **named)

        served.engine._engine.add_request = note
        for key, user in (("second", None), ("first", None), ("first", "me")):
            with openai.OpenAI(base_url=served.url + "/v1", api_key=key) as client:
                named = {} if user is None else {"user": user}
                client.completions.create(model=MODEL, prompt="x", max_tokens=1, **named)
        assert users == ["key-1", "key-0", "me"]
        for key in ("third", "secon", "first "[:4]):
            with (
                openai.OpenAI(base_url=served.url + "/v1", api_key=key, max_retries=0) as client,
                pytest.raises(openai.AuthenticationError) as caught,
            ):
                client.models.list()
            assert caught.value.code == "invalid_api_key"


def test_a_full_queue_says_when_to_come_back(tmp_path):
    with serving(text_engine_config(tmp_path), max_live_requests=2) as served:
        with openai.OpenAI(
            base_url=served.url + "/v1", api_key="none", max_retries=0
        ) as client:
            long = {
                "model": MODEL, "prompt": "x", "max_tokens": 2000, "stream": True,
                "extra_body": {"ignore_eos": True},
            }
            streams = [client.completions.create(**long) for _ in range(2)]
            with pytest.raises(openai.RateLimitError) as caught:
                client.completions.create(model=MODEL, prompt="x")
            assert 1 <= int(caught.value.response.headers["retry-after"]) <= 60
            for stream in streams:
                stream.close()
            assert served.idle()
            with pytest.raises(openai.BadRequestError, match="at most 2"):
                client.completions.create(model=MODEL, prompt=["x"] * 3)
            assert client.completions.create(model=MODEL, prompt="x", max_tokens=1).choices


def test_a_dead_engine_is_unwell_and_says_why(tmp_path):
    with serving(text_engine_config(tmp_path)) as served:

        def fail(*_):
            raise RuntimeError("the device melted")

        served.engine._engine._scheduler.plan = fail
        with openai.OpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0) as client:
            with pytest.raises(openai.InternalServerError, match="the device melted"):
                client.completions.create(model=MODEL, prompt="x")
            with pytest.raises(openai.InternalServerError) as caught:
                client.completions.create(model=MODEL, prompt="x", stream=True)
            assert caught.value.status_code in (500, 503)
