"""Jobs over a scripted engine: every line answered once, whatever happens."""

from __future__ import annotations

import io
import json
import random

import pytest

from aqua_jax.batch.job import Job
from aqua_jax.batch.journal import Journal
from aqua_jax.config import SamplingParams
from aqua_jax.errors import EngineDeadError
from aqua_jax.progress import Progress
from tests.batch.scripted import ScriptedEngine
from tests.scale import scaled


def run_job(path, lines, *, stop=lambda: False, engine=None, **settings):
    """One run over `lines` (str, bytes or objects); returns (result, engine)."""
    data = b"".join(as_bytes(line) + b"\n" for line in lines)
    engine = engine or ScriptedEngine()
    journal = Journal(path)
    options = {"defaults": SamplingParams(), "max_live": 4, "model": "m", **settings}
    try:
        job = Job(journal, lambda: engine, **options)
        result = job.run(io.BytesIO(data), Progress(len(data), enabled=False), stop)
    finally:
        journal.close()
    return result, engine


def as_bytes(line):
    if isinstance(line, bytes):
        return line
    return (line if isinstance(line, str) else json.dumps(line)).encode()


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def own(count, **fields):
    return [{"id": f"r{i}", "prompt": f"prompt {i}", **fields} for i in range(count)]


def test_every_line_is_answered_once_in_its_dialect(tmp_path):
    out = tmp_path / "out.jsonl"
    lines = [
        {"id": "a", "prompt": "abc", "max_tokens": 5, "temperature": 0},
        {"id": 7, "messages": [{"role": "user", "content": "hi"}], "n": 2},
        {"id": "ids", "prompt_token_ids": [65, 66]},
        {"custom_id": "c", "method": "POST", "url": "/v1/chat/completions",
         "body": {"model": "gpt", "messages": [{"role": "user", "content": "yo"}], "n": 2}},
        {"custom_id": "d", "method": "POST", "url": "/v1/completions", "body": {"prompt": "xyz"}},
    ]
    result, engine = run_job(out, lines, max_live=2)
    assert (result.answered, result.errors, result.succeeded) == (5, 0, True)
    assert engine.most_live == 2 and engine.closed
    by_id = {record.get("custom_id", record["id"]): record for record in records(out)}
    assert len(by_id) == len(records(out)) == 5
    assert by_id["a"]["text"].startswith("cba") and by_id["a"]["finish_reason"] == "stop"
    assert by_id["a"]["token_ids"] == [99, 98, 97]
    assert by_id["a"]["usage"] == {"prompt_tokens": 3, "completion_tokens": 3}
    assert set(by_id["a"]["metrics"]) == {"ttft_s", "tpot_s", "e2e_s"}
    assert [one["index"] for one in by_id[7]["outputs"]] == [0, 1]
    chat = by_id["c"]["response"]
    assert chat["status_code"] == 200 and by_id["c"]["error"] is None
    assert chat["body"]["object"] == "chat.completion" and chat["body"]["model"] == "gpt"
    assert [choice["message"]["role"] for choice in chat["body"]["choices"]] == ["assistant"] * 2
    assert chat["body"]["usage"]["total_tokens"] == 24
    text = by_id["d"]["response"]["body"]
    assert text["object"] == "text_completion" and text["model"] == "m"
    assert text["choices"][0]["text"].startswith("zyx")


BAD_LINES = [
    (b"not json", "line"),
    (b'{"id": "x", "prompt": NaN}', "line"),
    (b'{"id": "x", "temperature": 1e999}', "line"),
    (b"\xff\xfe", "line"),
    (b"", "line"),
    (b"[1, 2]", "line"),
    (b"[" * 100_000, "line"),
    (b"1" * 10_000, "line"),
    ({"prompt": "no id"}, "id"),
    ({"id": None, "prompt": "p"}, "id"),
    ({"id": True, "prompt": "p"}, "id"),
    ({"id": "", "prompt": "p"}, "id"),
    ({"id": 1.5, "prompt": "p"}, "id"),
    ({"id": "x", "prompt": "p", "temprature": 1}, "temprature"),
    ({"id": "x"}, "prompt"),
    ({"id": "x", "prompt": "p", "messages": []}, "prompt"),
    ({"id": "x", "prompt": ""}, "prompt"),
    ({"id": "x", "prompt": ["a"]}, "prompt"),
    ({"id": "x", "prompt": None}, "prompt"),
    ({"id": "x", "prompt": "\ud800"}, "prompt"),
    ({"id": "x", "prompt": "p" * 2000}, "prompt"),
    ({"id": "x", "prompt_token_ids": []}, "prompt_token_ids"),
    ({"id": "x", "prompt_token_ids": [1, "2"]}, "prompt_token_ids[1]"),
    ({"id": "x", "messages": []}, "messages"),
    ({"id": "x", "messages": [{"role": "user"}]}, "messages[0].content"),
    ({"id": "x", "messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
    ({"id": "x", "prompt": "p", "temperature": "hot"}, "temperature"),
    ({"id": "x", "prompt": "p", "temperature": -1}, "temperature"),
    ({"id": "x", "prompt": "p", "max_tokens": 0}, "max_tokens"),
    ({"id": "x", "prompt": "p", "max_tokens": 1.5}, "max_tokens"),
    ({"id": "x", "prompt": "p", "stop": [""]}, "stop"),
    ({"id": "x", "prompt": "p", "top_p": 0}, "top_p"),
    ({"custom_id": "x", "body": 3}, "body"),
    ({"custom_id": "x", "method": "GET", "body": {}}, "method"),
    ({"custom_id": "x", "url": "/v1/embeddings", "body": {}}, "url"),
    ({"custom_id": 5, "body": {"prompt": "p"}}, "custom_id"),
    ({"custom_id": "x", "body": {"prompt": "p"}, "extra": 1}, "extra"),
    ({"custom_id": "x", "body": {"prompt": "p", "tools": []}}, "body.tools"),
    ({"custom_id": "x", "body": {"prompt": "p", "stream": True}}, "body.stream"),
    ({"custom_id": "x", "body": {"prompt": "p", "n": 0}}, "body.n"),
    ({"custom_id": "x", "body": {"prompt": "p", "weight": 0}}, "body.weight"),
    ({"custom_id": "x", "body": {"prompt": "p", "priority": "high"}}, "body.priority"),
    ({"custom_id": "x", "body": {"messages": "hi"}}, "body.messages"),
    ({"custom_id": "x", "body": {"messages": [{"role": "user", "content": "a"}],
                                 "top_logprobs": 2}}, "body.top_logprobs"),
]


@pytest.mark.parametrize(("line", "field"), BAD_LINES)
def test_a_bad_line_becomes_one_error_record_and_the_rest_goes_on(tmp_path, line, field):
    out = tmp_path / "out.jsonl"
    lines = [own(1)[0], line, {"id": "last", "prompt": "zzz"}]
    for _ in range(2):
        result, _ = run_job(out, lines)
        assert not result.succeeded
        assert len(records(out)) == 3
    bad = [record for record in records(out) if record.get("error")]
    assert len(bad) == 1
    error = bad[0]["error"]
    assert error["line"] == 2 and error["field"] == field and error["allowed"]
    assert "value" in error and "line 2" in error["message"]
    if "custom_id" in bad[0]:
        assert bad[0]["response"]["status_code"] == 400
    assert result.skipped == 3


def test_a_duplicate_id_is_an_error_of_the_later_line_only(tmp_path):
    out = tmp_path / "out.jsonl"
    lines = [*own(2), {"id": "r0", "prompt": "again"}, {"id": "r0", "prompt": "and again"}]
    for _ in range(3):
        result, _ = run_job(out, lines)
    assert result.answered == result.errors == 0 and result.errors_before == 2
    assert sorted(str(record["id"]) for record in records(out)) == ["None", "None", "r0", "r1"]
    errors = [record["error"] for record in records(out) if "error" in record]
    assert [error["line"] for error in errors] == [3, 4]
    assert all((error["field"], error["value"]) == ("id", "r0") for error in errors)


def test_ids_of_different_json_types_differ(tmp_path):
    result, _ = run_job(tmp_path / "o", [{"id": 1, "prompt": "a"}, {"id": "1", "prompt": "b"}])
    assert result.succeeded and result.answered == 2


def test_a_request_that_the_engine_fails_is_an_error_record(tmp_path):
    out = tmp_path / "out.jsonl"
    lines = [{"id": "x", "prompt": "fail"}, {"custom_id": "y", "body": {"prompt": "fail"}}]
    result, _ = run_job(out, [*lines, *own(2)])
    assert (result.answered, result.errors) == (2, 2)
    by_id = {record.get("custom_id", record["id"]): record for record in records(out)}
    assert "it broke" in by_id["x"]["error"]["message"]
    assert by_id["y"]["response"]["status_code"] == 500


def test_a_dead_engine_leaves_its_requests_to_the_next_run(tmp_path):
    out = tmp_path / "out.jsonl"
    lines = [*own(6), {"id": "bad", "prompt": "die"}, *own(8)[6:]]
    with pytest.raises(EngineDeadError):
        run_job(out, lines)
    assert all("error" not in record for record in records(out))
    result, _ = run_job(out, [line for line in lines if line["id"] != "bad"])
    assert result.succeeded and sorted(r["id"] for r in records(out)) == [f"r{i}" for i in range(8)]


def test_a_finished_job_needs_no_engine(tmp_path):
    out = tmp_path / "out.jsonl"
    run_job(out, own(3))
    before = out.read_bytes()
    journal = Journal(out)
    job = Job(journal, lambda: pytest.fail("built"), defaults=SamplingParams(), max_live=1)
    data = b"".join(as_bytes(line) + b"\n" for line in own(3))
    assert job.run(io.BytesIO(data), Progress(0, enabled=False)).skipped == 3
    journal.close()
    assert out.read_bytes() == before


def test_sampling_defaults_and_seeds(tmp_path):
    """A request's seed comes from the job's seed and its id, wherever the job was interrupted."""
    lines = own(4, temperature=1.0)
    defaults = SamplingParams(max_tokens=9, temperature=0.0)
    _, engine = run_job(tmp_path / "a", lines, defaults=defaults, seed=3)
    seeds = {prompt: params.seed for prompt, params in engine.asked}
    assert len(set(seeds.values())) == 4 and None not in seeds.values()
    assert {params.max_tokens for _, params in engine.asked} == {9}
    _, engine = run_job(tmp_path / "b", lines[::-1], defaults=defaults, seed=3)
    assert {prompt: params.seed for prompt, params in engine.asked} == seeds
    _, engine = run_job(tmp_path / "c", own(1), defaults=defaults, seed=3)
    assert engine.asked[0][1].seed is None  # greedy: needs none
    _, engine = run_job(tmp_path / "d", own(1, seed=5, temperature=1.0), defaults=defaults)
    assert engine.asked[0][1].seed == 5


def test_stopping_and_resuming_at_random_moments(tmp_path):
    """Whatever mixture of good and bad lines: in the end each has exactly one record."""
    draw = random.Random(5)
    for case in range(scaled(10)):
        out = tmp_path / f"{case}.jsonl"
        lines = []
        for index in range(draw.randrange(1, 30)):
            kind = draw.randrange(6)
            if kind == 0:
                lines.append(draw.choice(BAD_LINES)[0])
            elif kind == 1 and lines:
                lines.append(draw.choice(lines))
            elif kind == 2:
                lines.append({"custom_id": f"c{index}", "body": {"prompt": f"p{index}"}})
            else:
                lines.append({"id": f"i{index}", "prompt": f"p{index}"})
        data = None
        for _ in range(200):
            steps = draw.randrange(1, 6)
            calls = iter(range(1000))
            result, _ = run_job(
                out, lines, stop=lambda c=calls, n=steps: next(c) >= n,
                max_live=draw.randrange(1, 5),
            )
            if draw.random() < 0.3:
                tear(out, draw)
                continue
            if not result.interrupted:
                data = out.read_bytes()
                break
        assert data is not None
        result, _ = run_job(out, lines)
        assert out.read_bytes() == data and result.skipped == len(lines)
        keys = [r.get("custom_id", r["id"]) for r in records(out)]
        named = [key for key in keys if key is not None]
        assert len(keys) == len(lines) and len(set(map(repr, named))) == len(named)


def tear(path, draw):
    """What a kill in the middle of a write leaves: the last record cut somewhere."""
    data = path.read_bytes()
    if data:
        last = data.rfind(b"\n", 0, len(data) - 1) + 1
        path.write_bytes(data[: draw.randrange(last, len(data))])
