"""What transformers writes and reads, against our loaders: weights, tokens, chat prompts."""

from __future__ import annotations

import os
import pathlib
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import pre_tokenizers

from aqua_jax.loading import load, load_tokenizer
from aqua_jax.loading.gguf_config import llama3_factors
from aqua_jax.loading.resolve import demo_path
from aqua_jax.models.huggingface import hf_tensor_map
from tests.loading.vocabularies import TEXTS, byte_level, with_bos
from tests.parity.families import FAMILIES, hf_config_dict, make_hf_model

MORE_TEXTS = [
    "What is the capital of France?", "3.14159265 and 1,000,000", "ALL CAPS and camelCase",
    "print('hello')  # comment\n\n\nclass A(B):\n    pass\n", "Ωμέγα здравствуйте こんにちは שלום",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", "https://example.org/?a=1&b=%20",
    "  \n\t \n", "🏳️‍🌈 e\u0301 ﬁ", "a" * 1000, "she'll've I'D",
]  # fmt: skip
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "hi"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "  spaces  "}],
    [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2\n"},
     {"role": "user", "content": "<é & \"quotes\">"}],
]  # fmt: skip


def compare(params: dict[str, Any], theirs: dict[str, torch.Tensor], config: Any) -> None:
    """Every parameter equals what transformers holds, rounded to the parameter's dtype."""
    for name, source in hf_tensor_map(config).items():
        joined = source.join([theirs[part].float().numpy() for part in source.names])
        found = np.asarray(params[name])
        np.testing.assert_array_equal(found, joined.astype(found.dtype), err_msg=name)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_saved_models_load_equal(tmp_path: pathlib.Path, family: str) -> None:
    model = make_hf_model(family)
    model.save_pretrained(tmp_path)
    kind = hf_config_dict(model)["model_type"]
    loaded = load(str(tmp_path), dtype="float32", config_overrides={"model_type": kind})
    compare(loaded.params, model.state_dict(), loaded.config)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_shards_and_dtypes(tmp_path: pathlib.Path, dtype: torch.dtype) -> None:
    model = make_hf_model("llama_biases").to(dtype)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    loaded = load(str(tmp_path))
    assert loaded.dtype == ("float32" if dtype == torch.float32 else "bfloat16")
    compare(loaded.params, model.state_dict(), loaded.config)


def test_saved_tokenizers_load_equal(tmp_path: pathlib.Path) -> None:
    template = (
        "{{ bos_token }}{% for m in messages %}\n    {%- if m.role == 'system' %}\n[{{ m.content "
        "| tojson }}]\n    {% else %}\n{{ m.role }}: {{ m.content | trim }}{% generation %}"
        "{{ eos_token }}{% endgeneration %}\n    {% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=with_bos(byte_level(), "<|user|>"), bos_token="<|user|>",
        eos_token="<|end|>", chat_template=template,
    )  # fmt: skip
    theirs.save_pretrained(tmp_path)
    ours = load_tokenizer(str(tmp_path))
    assert ours.bos_token_id == theirs.bos_token_id
    assert ours.eos_token_ids == (theirs.eos_token_id,)
    for text in [*TEXTS, *MORE_TEXTS]:
        ids = theirs(text)["input_ids"]
        assert ours.encode(text) == ids
        assert ours.encode(text, False) == theirs(text, add_special_tokens=False)["input_ids"]
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(
                ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False
            )
    for chat in CHATS:
        for opening in (True, False):
            assert ours.apply_chat_template(chat, opening) == theirs.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=opening
            )


def test_llama3_factors() -> None:
    config = transformers.LlamaConfig(
        hidden_size=256, num_attention_heads=2, max_position_embeddings=131072,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        },
    )  # fmt: skip
    scaled, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1 / 500000.0 ** (np.arange(0, 128, 2) / 128)
    np.testing.assert_allclose(
        llama3_factors(128, 500000.0, 8.0, 8192), plain / scaled.numpy(), rtol=1e-5
    )


def test_demo_weights(demo_reference: dict[str, Any]) -> None:
    loaded, theirs = load("demo", dtype="float32"), demo_reference
    ours = loaded.config
    compare(loaded.params, theirs["tensors"], ours)
    config = theirs["config"]
    assert ours.tied_embeddings == config["tie_word_embeddings"]
    assert ours.num_layers == config["num_hidden_layers"]
    assert ours.num_kv_heads == config["num_key_value_heads"]
    assert ours.rope_theta == config["rope_theta"]
    assert ours.max_position == config["max_position_embeddings"]
    assert ours.bos_token_id == config["bos_token_id"]
    assert loaded.eos_token_ids == (config["eos_token_id"],)
    assert np.isclose(ours.rms_norm_eps, config["rms_norm_eps"])


def test_demo_tokenizer() -> None:
    folder, file = os.path.split(demo_path())
    theirs = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file)
    # transformers drops the file's pre-tokenizer name: SmolLM2's own tokenizer.json splits every
    # numeric character off first, which only shows on ones like '½' after a space.
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    ours = load_tokenizer(demo_path())
    for text in [*TEXTS, *MORE_TEXTS]:
        ids = theirs(text)["input_ids"]
        assert ours.encode(text) == ids, text
        assert ours.decode(ids, False) == theirs.decode(ids, clean_up_tokenization_spaces=False)
    for chat in CHATS:
        for opening in (True, False):
            assert ours.apply_chat_template(chat, opening) == theirs.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=opening
            )
