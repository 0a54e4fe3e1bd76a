"""The blocking face over a real engine with random weights."""

from __future__ import annotations

import pytest

import aqua_jax
from aqua_jax import LLM, SamplingParams
from aqua_jax.errors import ConfigError, RequestError
from tests.cli.text_model import write_text_model

GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    model = write_text_model(tmp_path_factory.mktemp("llm") / "model")
    with LLM(
        str(model), load_format="dummy", dtype="float32", kv_cache_tokens=1024, max_num_seqs=4,
        max_step_tokens=64, warmup="none",
    ) as made:
        yield made


def test_every_prompt_form_says_the_same(llm):
    text = "the quick fox"
    ids = llm.get_tokenizer().encode(text)
    forms = [text, ids, {"prompt": text}, {"prompt_token_ids": ids}]
    outputs = llm.generate(forms, GREEDY, use_tqdm=False)
    assert [output.prompt_token_ids for output in outputs] == [ids] * 4
    assert len({tuple(output.outputs[0].token_ids) for output in outputs}) == 1
    assert [output.prompt for output in outputs] == [text, None, text, None]
    assert all(output.finished and len(output.outputs[0].token_ids) == 6 for output in outputs)
    for single in (text, ids, {"prompt": text}):
        (output,) = llm.generate(single, GREEDY, use_tqdm=False)
        assert output.outputs[0].token_ids == outputs[0].outputs[0].token_ids


def test_outputs_stand_in_the_prompts_order(llm):
    prompts = [f"fox {index}" for index in range(10)]
    params = [SamplingParams(max_tokens=1 + (7 * i) % 10, ignore_eos=True) for i in range(10)]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [output.prompt for output in outputs] == prompts
    assert [len(output.outputs[0].token_ids) for output in outputs] == [
        one.max_tokens for one in params
    ]
    assert llm.generate([], GREEDY) == []


def test_text_is_the_decoded_tokens(llm):
    (output,) = llm.generate("the dog", SamplingParams(max_tokens=30, seed=1), use_tqdm=False)
    sample = output.outputs[0]
    said = [token for token in sample.token_ids if token not in llm.get_tokenizer().eos_token_ids]
    assert sample.text == llm.get_tokenizer().decode(said)
    assert output.metrics.ttft_s > 0 and output.metrics.e2e_s >= output.metrics.ttft_s


def test_a_bad_prompt_names_its_index_and_nothing_has_run(llm):
    steps = llm.engine.stats()["steps"]
    cases = [
        (["fine", ""], "prompts[1].prompt"),
        (["fine", 3], "prompts[1].prompt"),
        (["fine", {"text": "x"}], "prompts[1].prompt"),
        (["fine", [1, -2]], "prompts[1].prompt[1]"),
        (["fine", [5, 10**6]], "prompts[1].prompt_token_ids"),
        (["fine", "more", [5] * 5000], "prompts[2].prompt"),
        (["fine", "\ud800"], "prompts[1].prompt"),
        ("", "prompts[0].prompt"),
        (7, "prompts"),
    ]
    for prompts, field in cases:
        with pytest.raises(RequestError) as caught:
            llm.generate(prompts, GREEDY, use_tqdm=False)
        assert caught.value.field == field
    stats = llm.engine.stats()
    assert stats["live_requests"] == 0 and stats["steps"] == steps
    assert len(llm.generate(["fine"], GREEDY, use_tqdm=False)) == 1


def test_bad_sampling_parameters(llm):
    for params, field in [
        ([GREEDY], "sampling_params"), ("hot", "sampling_params"),
        ([GREEDY, 3], "sampling_params[1]"),
        ([GREEDY, SamplingParams(stop_token_ids=(999,))], "prompts[1].stop_token_ids"),
    ]:
        with pytest.raises(RequestError) as caught:
            llm.generate(["a", "b"], params, use_tqdm=False)
        assert caught.value.field == field


def test_chat_renders_the_template(llm):
    conversation = [{"role": "system", "content": "be"}, {"role": "user", "content": "hi"}]
    (output,) = llm.chat(conversation, GREEDY, use_tqdm=False)
    assert output.prompt == "<|system|>be\n<|user|>hi\n<|assistant|>"
    assert output.prompt_token_ids == llm.get_tokenizer().encode(output.prompt, add_special=False)
    outputs = llm.chat([conversation, conversation[1:]], GREEDY, use_tqdm=False)
    assert outputs[0].outputs[0].token_ids == output.outputs[0].token_ids
    assert outputs[1].prompt == "<|user|>hi\n<|assistant|>"


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ([], "messages"),
        ("hi", "messages"),
        ([{"role": "user"}], "messages[0].content"),
        ([[{"role": "user", "content": "a"}], [{"role": "user", "content": 1}]],
         "messages[1][0].content"),
        ([[{"role": "user", "content": "a"}], []], "messages[1]"),
    ],
)
def test_bad_messages_name_the_field(llm, messages, field):
    with pytest.raises(RequestError) as caught:
        llm.chat(messages, GREEDY, use_tqdm=False)
    assert caught.value.field == field


def test_an_interrupted_call_leaves_nothing_behind(llm, monkeypatch):
    step = llm.engine.step
    calls = iter(range(100))

    def interrupted():
        if next(calls) == 2:
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(llm.engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["a", "b", "c"], GREEDY, use_tqdm=False)
    monkeypatch.undo()
    assert llm.engine.stats()["live_requests"] == 0
    (output,) = llm.generate("the dog", GREEDY, use_tqdm=False)
    assert output.finished and output.outputs[0].finish_reason == "length"


def test_progress_goes_to_stderr(llm, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    llm.generate(["a", "b"], GREEDY)
    captured = capsys.readouterr()
    assert captured.out == "" and "2 done" in captured.err and "tok/s" in captured.err


def test_configuration_errors():
    with pytest.raises(ConfigError, match="did you mean max_num_seqs"):
        LLM("x", max_num_seq=3)
    with pytest.raises(ConfigError, match="page_tokens"):
        LLM("x", page_tokens=3)


def test_public_names():
    for name in aqua_jax.__all__:
        assert getattr(aqua_jax, name) is not None
    assert set(aqua_jax.__all__) == set(dir(aqua_jax))
    with pytest.raises(AttributeError, match="no attribute 'Lama'"):
        aqua_jax.Lama  # noqa: B018
