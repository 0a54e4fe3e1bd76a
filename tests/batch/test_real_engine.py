"""Jobs over the real engine: whatever a line asks for, it lives and every line is answered."""

from __future__ import annotations

import io
import json
import random

from aqua_jax.batch.job import Job
from aqua_jax.batch.journal import Journal
from aqua_jax.config import EngineConfig, SamplingParams
from aqua_jax.engine.engine import Engine
from aqua_jax.progress import Progress
from tests.cli.text_model import write_text_model
from tests.scale import scaled

EXTREMES = [
    0, 1, -1, -2, 2**31 - 1, 2**31, 2**32, 2**63, 10**30, 1e-300, 1e-7, 0.5, 2.0, 100, None, True,
    "x", [], [1], ["a"], [299], [300], 20, 21,
]
FIELDS = [
    "n", "temperature", "top_k", "top_p", "min_p", "seed", "max_tokens", "min_tokens", "stop",
    "stop_token_ids", "ignore_eos", "logprobs", "prompt_logprobs", "presence_penalty",
    "frequency_penalty", "repetition_penalty", "detokenize", "skip_special_tokens",
]


def odd_request(draw, index):
    record = {"id": index, "prompt": "the fox", "max_tokens": 3}
    for field in draw.sample(FIELDS, draw.randrange(1, 4)):
        value = draw.choice(EXTREMES)
        if field == "n" and isinstance(value, int):
            value = min(value, 3)
        if field == "max_tokens" and (value is None or isinstance(value, int)):
            value = draw.choice([value, 5]) if value is not None and value < 20 else 10**30
        record[field] = value
    return record


def test_no_request_however_odd_stops_the_engine(tmp_path):
    draw = random.Random(1)
    lines = [odd_request(draw, index) for index in range(scaled(150))]
    lines += [{"id": f"{field} {value}", "prompt": "fox", "max_tokens": 3, field: value}
              for field in ("top_k", "seed", "min_tokens", "top_p") for value in EXTREMES]
    model = write_text_model(tmp_path / "model")
    engine = Engine(EngineConfig(
        model=str(model), load_format="dummy", dtype="float32", kv_cache_tokens=2048,
        max_num_seqs=8, max_step_tokens=64, warmup="none",
    ))
    out = tmp_path / "out.jsonl"
    journal = Journal(out)
    data = "\n".join(json.dumps(line) for line in lines).encode()
    job = Job(journal, lambda: engine, defaults=SamplingParams(), max_live=16)
    stats = {}
    close = engine.close
    engine.close = lambda: (stats.update(engine.stats()), close())
    result = job.run(io.BytesIO(data), Progress(0, enabled=False))
    journal.close()
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["id"] for record in records if record["id"] is None] == []
    assert sorted(str(record["id"]) for record in records) == sorted(str(x["id"]) for x in lines)
    assert all(record["error"]["field"] for record in records if "error" in record)
    assert result.answered > 30 and result.answered + result.errors == len(lines)
    assert stats["pool_resets"] == 0 and stats["pages"]["in_use"] == 0


def test_user_weight_and_priority_of_lines_reach_the_scheduler(tmp_path):
    model = write_text_model(tmp_path / "model")
    engine = Engine(EngineConfig(
        model=str(model), load_format="dummy", dtype="float32", kv_cache_tokens=512,
        max_num_seqs=4, max_step_tokens=64, warmup="none", policy="fair",
    ))
    seen, add = [], engine.scheduler.add

    def note(sequence):
        seen.append((sequence.user, sequence.weight, sequence.priority))
        add(sequence)

    engine.scheduler.add = note
    own = {"prompt": "fox", "max_tokens": 1}
    lines = [
        {"id": 0, "user": "ann", "weight": 2, "priority": -3, **own}, {"id": 1, **own},
        {"custom_id": "2", "method": "POST", "url": "/v1/completions",
         "body": {**own, "user": "bo", "weight": 0.5, "priority": 4}},
    ]
    journal = Journal(tmp_path / "out.jsonl")
    job = Job(journal, lambda: engine, defaults=SamplingParams(), max_live=1)
    data = "\n".join(json.dumps(line) for line in lines).encode()
    result = job.run(io.BytesIO(data), Progress(0, enabled=False))
    journal.close()
    assert (result.answered, result.errors) == (3, 0)
    assert seen == [("ann", 2.0, -3), ("", 1.0, 0), ("bo", 0.5, 4)]
