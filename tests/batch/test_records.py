"""What records say, in both dialects."""

from __future__ import annotations

import json
import math

from aqua_jax.batch.records import error_record, failure_record, success_record
from aqua_jax.batch.requests import CHAT, COMPLETIONS, OWN, BatchRequest
from aqua_jax.config import SamplingParams
from aqua_jax.engine.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from aqua_jax.errors import RequestError

TABLES = [
    {5: Logprob(-0.5, 1, "he"), 6: Logprob(-1.0, 2, "ha")},
    {7: Logprob(-math.inf, 9, "y"), 5: Logprob(-0.1, 1, "he")},
]


def output():
    sample = CompletionOutput(0, "hey", [5, 7], -1.0, TABLES, "length")
    metrics = RequestMetrics(1.0, 2.0, 5.0, 2)
    return RequestOutput("r", "p", [1, 2, 3], [sample], True, metrics, [None, *TABLES])


def request(dialect):
    return BatchRequest("k", 4, dialect, "p", None, SamplingParams(logprobs=1), model=None)


def test_own_record_has_logprobs_and_metrics():
    record = json.loads(json.dumps(success_record(request(OWN), output(), "m"), allow_nan=False))
    assert record["id"] == "k" and record["text"] == "hey" and record["finish_reason"] == "length"
    assert record["logprobs"][0]["5"] == {"logprob": -0.5, "rank": 1, "decoded_token": "he"}
    assert record["logprobs"][1]["7"]["logprob"] == -9999.0
    assert record["prompt_logprobs"][0] is None
    assert record["metrics"] == {"ttft_s": 1.0, "tpot_s": 3.0, "e2e_s": 4.0}
    assert record["usage"] == {"prompt_tokens": 3, "completion_tokens": 2}


def test_openai_records_have_openai_logprobs():
    record = success_record(request(CHAT), output(), "m")
    choice = json.loads(json.dumps(record, allow_nan=False))["response"]["body"]["choices"][0]
    content = choice["logprobs"]["content"]
    assert [entry["token"] for entry in content] == ["he", "y"]
    assert content[0]["bytes"] == [104, 101]
    assert [top["token"] for top in content[1]["top_logprobs"]] == ["he", "y"]
    record = success_record(request(COMPLETIONS), output(), "m")
    logprobs = record["response"]["body"]["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["he", "y"] and logprobs["text_offset"] == [0, 2]
    assert logprobs["token_logprobs"] == [-0.5, -9999.0]
    assert logprobs["top_logprobs"][0] == {"he": -0.5, "ha": -1.0}


def test_record_names_are_the_same_on_every_run():
    one, two = (success_record(request(CHAT), output(), "m") for _ in range(2))
    assert one["id"] == two["id"] and one["response"]["body"]["id"] == two["response"]["body"]["id"]


def test_error_values_are_short_and_writable():
    for value in ("\ud800", "x" * 10_000, [object()], {"a": 1}, 2**100, None, 1.5, float):
        for openai in (False, True):
            record = error_record("k", 3, RequestError("f", value, "good ones"), openai)
            text = json.dumps(record, allow_nan=False)
            text.encode()
            assert len(text) < 2500
            assert record["error"]["line"] == 3 and record["error"]["field"] == "f"
    record = failure_record(request(CHAT), "it broke")
    assert record["response"]["status_code"] == 500 and "it broke" in record["error"]["message"]
