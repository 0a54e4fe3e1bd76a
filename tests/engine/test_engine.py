"""The engine end to end on a tiny model with random weights: every path a request can take."""

from __future__ import annotations

import gc
import random

import jax
import pytest

from aqua_jax.config import EngineConfig, SamplingParams
from aqua_jax.errors import ConfigError, EngineDeadError, RequestError
from tests.engine.driving import run_all, tiny_engine

VOCAB = 131


def prompt(length: int, seed: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(3, VOCAB) for _ in range(length)]


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """One warm engine for the tests that leave it as they found it."""
    with tiny_engine(tmp_path_factory.mktemp("model")) as engine:
        yield engine
        assert engine.stats()["pages"]["in_use"] == 0


def greedy(max_tokens: int, **more) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, **more)


def test_a_batch_says_what_each_request_says_alone(engine):
    prompts = [prompt(n, n) for n in (1, 5, 16, 17, 40, 70)]
    together = run_all(engine, [(p, greedy(12)) for p in prompts])
    for index, p in enumerate(prompts):
        alone = run_all(engine, [(p, greedy(12))])[0]
        assert together[index].outputs[0].token_ids == alone.outputs[0].token_ids
        assert together[index].outputs[0].finish_reason == "length"
        assert len(alone.outputs[0].token_ids) == 12


def test_chunked_prefill_and_prefix_hits_change_nothing(tmp_path):
    p = prompt(90, 4)
    answers = []
    for chunk, caching in ((None, False), (7, False), (16, True), (33, True)):
        with tiny_engine(
            tmp_path, max_chunk_tokens=chunk, prefix_caching=caching
        ) as engine:
            for _ in range(2):
                out = run_all(engine, [(p, greedy(10))])[0]
                answers.append(out.outputs[0].token_ids)
            assert (out.metrics.num_cached_tokens > 0) == caching
            assert engine.stats()["pages"]["in_use"] == 0
    assert all(answer == answers[0] for answer in answers)


def test_preemption_by_recompute_changes_nothing(tmp_path):
    work = [(prompt(20, 50 + i), greedy(120)) for i in range(5)]
    with tiny_engine(tmp_path) as roomy:
        expected = [o.outputs[0].token_ids for o in run_all(roomy, work)]
    with tiny_engine(tmp_path, kv_cache_tokens=256) as tight:
        got = run_all(tight, work)
        stats = tight.stats()
    assert [o.outputs[0].token_ids for o in got] == expected
    assert stats["preemptions"] > 0 and stats["pages"]["in_use"] == 0
    assert stats["pool_resets"] == 0
    assert sum(output.metrics.num_preemptions for output in got) == stats["preemptions"]


def test_samples_of_one_prompt_share_it_and_differ(engine):
    params = SamplingParams(n=4, temperature=1.0, seed=11, max_tokens=12, ignore_eos=True)
    out = run_all(engine, [(prompt(21, 9), params)])[0]
    texts = [tuple(sample.token_ids) for sample in out.outputs]
    assert [sample.index for sample in out.outputs] == [0, 1, 2, 3]
    assert len(set(texts)) == 4 and all(len(text) == 12 for text in texts)
    again = run_all(engine, [(prompt(21, 9), params)])[0]
    assert [tuple(sample.token_ids) for sample in again.outputs] == texts


def test_a_seed_fixes_the_answer_whatever_runs_beside_it(engine):
    params = SamplingParams(temperature=0.9, top_k=30, top_p=0.95, seed=5, max_tokens=10)
    alone = run_all(engine, [(prompt(12, 1), params)])[0]
    crowd = [(prompt(8 + i, 70 + i), SamplingParams(max_tokens=14)) for i in range(5)]
    beside = run_all(engine, [*crowd, (prompt(12, 1), params)])[-1]
    assert beside.outputs[0].token_ids == alone.outputs[0].token_ids


def test_stop_token_min_tokens_and_eos(engine):
    free = run_all(engine, [(prompt(10, 2), greedy(20))])[0].outputs[0].token_ids
    stop = free[5]
    first = free.index(stop)
    params = SamplingParams(temperature=0.0, max_tokens=20, stop_token_ids=[stop], ignore_eos=True)
    out = run_all(engine, [(prompt(10, 2), params)])[0].outputs[0]
    assert out.token_ids == free[: first + 1]
    assert (out.finish_reason, out.stop_reason) == ("stop", stop)
    late = SamplingParams(
        temperature=0.0, max_tokens=20, min_tokens=15, stop_token_ids=[stop], ignore_eos=True
    )
    out = run_all(engine, [(prompt(10, 2), late)])[0].outputs[0]
    assert len(out.token_ids) >= 15 and stop not in out.token_ids[:15]


def test_logprobs_agree_with_the_choice(engine):
    params = SamplingParams(
        temperature=0.0, max_tokens=6, logprobs=3, prompt_logprobs=2, ignore_eos=True
    )
    ids = prompt(40, 3)
    out = run_all(engine, [(ids, params)])[0]
    sample = out.outputs[0]
    assert len(sample.logprobs) == 6
    for token, entry in zip(sample.token_ids, sample.logprobs, strict=True):
        assert entry[token].rank == 1 and len(entry) == 3
        assert entry[token].logprob == max(e.logprob for e in entry.values()) <= 0
    assert sample.cumulative_logprob == pytest.approx(
        sum(e[t].logprob for t, e in zip(sample.token_ids, sample.logprobs, strict=True))
    )
    assert out.prompt_logprobs[0] is None and len(out.prompt_logprobs) == 40
    assert all(ids[i] in out.prompt_logprobs[i] for i in range(1, 40))
    # The log probability of a prompt token is that of the same token when it was generated.
    full = ids + sample.token_ids
    again = run_all(engine, [(full, SamplingParams(max_tokens=1, prompt_logprobs=0))])[0]
    for position in range(1, 40):
        token = ids[position]
        assert again.prompt_logprobs[position][token].logprob == pytest.approx(
            out.prompt_logprobs[position][token].logprob, abs=1e-3
        )
    for offset, token in enumerate(sample.token_ids[:-1]):
        assert again.prompt_logprobs[40 + offset][token].logprob == pytest.approx(
            sample.logprobs[offset][token].logprob, abs=1e-3
        )


def test_penalties_follow_the_definition(engine):
    strong = SamplingParams(
        temperature=0.0, max_tokens=30, ignore_eos=True, frequency_penalty=2.0,
        presence_penalty=2.0, repetition_penalty=5.0,
    )
    plain = run_all(engine, [(prompt(10, 8), greedy(30))])[0].outputs[0].token_ids
    penalised = run_all(engine, [(prompt(10, 8), strong)])[0].outputs[0].token_ids
    assert len(set(penalised)) > len(set(plain))


def test_abort_frees_everything_and_reports(engine):
    engine.add_request("gone", prompt(30, 6), greedy(50))
    engine.add_request("stays", prompt(30, 7), greedy(5))
    outputs = {}
    for _ in range(3):
        outputs.update({o.request_id: o for o in engine.step()})
    engine.abort("gone")
    engine.abort("never existed")
    while engine.has_unfinished():
        outputs.update({o.request_id: o for o in engine.step()})
    assert outputs["gone"].finished and outputs["gone"].outputs[0].finish_reason == "abort"
    assert outputs["stays"].outputs[0].finish_reason == "length"
    assert engine.stats()["pages"]["in_use"] == 0


@pytest.mark.parametrize(
    ("bad", "params", "field"),
    [
        ([], {}, "prompt"),
        ([1, VOCAB], {}, "prompt_token_ids"),
        ([3] * 600, {}, "prompt"),
        ("text without a tokenizer", {}, "prompt"),
        (3.5, {}, "prompt"),
        ([3], {"stop_token_ids": [VOCAB]}, "stop_token_ids"),
        ([3], {"min_tokens": 2, "stop_token_ids": list(range(20)), "max_tokens": 5},
         "stop_token_ids"),
    ],
)
def test_bad_requests_name_the_field_and_lose_nothing_else(engine, bad, params, field):
    engine.add_request("good", prompt(5, 1), greedy(4))
    with pytest.raises(RequestError) as caught:
        engine.add_request("bad", bad, SamplingParams(**params))
    assert caught.value.field.startswith(field)
    with pytest.raises(RequestError, match="request_id"):
        engine.add_request("good", [3], greedy(1))
    outputs = []
    while engine.has_unfinished():
        outputs += engine.step()
    assert outputs[-1].request_id == "good" and outputs[-1].finished


def fail_steps(engine, monkeypatch, error: Exception) -> list[int]:
    """Make dispatch raise at the steps in the returned list."""
    dispatch, failures = engine._runner.dispatch, []

    def failing(plan):
        if plan.step_id in failures:
            raise error
        return dispatch(plan)

    monkeypatch.setattr(engine._runner, "dispatch", failing)
    return failures


def test_a_failed_step_is_recomputed_and_three_in_a_row_end_the_engine(tmp_path, monkeypatch):
    with tiny_engine(tmp_path) as engine:
        expected = run_all(engine, [(prompt(20, 1), greedy(10))])[0].outputs[0].token_ids
        error = jax.errors.JaxRuntimeError("device lost")
        failures = fail_steps(engine, monkeypatch, error)
        failures.append(engine._scheduler.counters.plans + 4)
        out = run_all(engine, [(prompt(20, 1), greedy(10))])[0]
        assert out.outputs[0].token_ids == expected
        assert engine.stats()["pool_resets"] == 1
        failures += range(10_000)
        out = run_all(engine, [(prompt(20, 1), greedy(10))])[0]
        assert out.outputs[0].finish_reason == "error" and "device lost" in out.error
        with pytest.raises(EngineDeadError):
            engine.step()


def test_a_bug_on_the_host_is_not_retried(tmp_path, monkeypatch):
    with tiny_engine(tmp_path) as engine:
        failures = fail_steps(engine, monkeypatch, KeyError("ours"))
        failures.append(engine._scheduler.counters.plans + 3)
        out = run_all(engine, [(prompt(20, 1), greedy(10))])[0]
        assert out.outputs[0].finish_reason == "error" and "ours" in out.error
        assert engine.stats()["pool_resets"] == 0
        assert engine.stats()["pages"]["in_use"] == 0


def test_collections_skip_what_stays_until_the_engine_is_closed(tmp_path):
    engine = tiny_engine(tmp_path)
    assert gc.get_freeze_count() > 10_000  # what was imported alone are more
    engine.close()
    assert gc.get_freeze_count() == 0


def test_close_ends_what_is_live(tmp_path):
    engine = tiny_engine(tmp_path)
    engine.add_request("a", prompt(5, 1), greedy(4))
    engine.step()
    engine.close()
    with pytest.raises(EngineDeadError):
        engine.add_request("b", prompt(5, 1), greedy(4))


def test_nothing_compiles_after_a_full_warm_up(tmp_path):
    with tiny_engine(tmp_path, warmup="full", max_step_tokens=16, max_num_seqs=4) as engine:
        work = [(prompt(3 * i + 1, i), greedy(5)) for i in range(8)]
        work.append((prompt(30, 9), SamplingParams(logprobs=2, prompt_logprobs=1, max_tokens=4)))
        work.append((prompt(30, 9), SamplingParams(presence_penalty=1.0, n=3, max_tokens=4)))
        run_all(engine, work)
        stats = engine.stats()
    assert stats["compiles"] > 0 and stats["compiles_after_warmup"] == 0


def test_the_pool_is_updated_in_place(tmp_path):
    with tiny_engine(tmp_path, kv_cache_memory=64 << 20) as engine:
        programs, kv = engine._runner.programs, engine._runner.kv
        assert kv.nbytes > 60 << 20
        assert programs.temp_bytes(16) < kv.nbytes / 8


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"max_model_len": 4096}, "max_model_len"),
        ({"kv_cache_tokens": 3}, "kv_cache_tokens"),
        ({"kv_cache_memory": 10}, "kv_cache_memory"),
        ({"kv_cache_memory": 1 << 50}, "kv_cache_memory"),
        ({"kv_cache_tokens": 1 << 45}, "kv_cache_tokens"),
        ({"kv_cache_tokens": 64, "max_model_len": 128}, "max_model_len"),
    ],
)
def test_impossible_sizes_are_refused(tmp_path, settings, field):
    with pytest.raises(ConfigError) as caught:
        tiny_engine(tmp_path, **settings)
    assert caught.value.field == field


def test_config_refuses_bad_fields():
    for field, value in (("dtype", "int4"), ("page_tokens", 12), ("max_num_seqs", 0)):
        with pytest.raises(ConfigError) as caught:
            EngineConfig(model="m", **{field: value})
        assert caught.value.field == field


