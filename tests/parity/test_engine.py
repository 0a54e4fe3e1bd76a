"""Every family through the paged engine against transformers: log probabilities and greedy text.

Pages of 4 tokens, prompt chunks of 13 and a step budget of 16 make prompts cross pages, windows,
chunks and steps, with several requests in each step.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from aqua_jax.config import EngineConfig, SamplingParams
from aqua_jax.engine.engine import Engine
from tests.engine.driving import run_all
from tests.parity.families import FAMILIES, hf_config_dict, make_hf_model

NEW_TOKENS = 14
TOLERANCE = 2e-4  # of the largest logit


def save_model(hf_model, folder):
    """Write config.json and model.safetensors as save_pretrained would lay them out."""
    tensors = {k: v.contiguous().numpy() for k, v in hf_model.state_dict().items()}
    if hf_model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight")
    save_file(tensors, folder / "model.safetensors")
    fields = {**hf_config_dict(hf_model), "eos_token_id": None}
    (folder / "config.json").write_text(json.dumps(fields, default=str))


def reference(hf_model, prompt):
    """Greedy tokens, and the logits of every position of prompt + tokens: f32[n, V]."""
    ids = torch.tensor([prompt])
    # transformers' cache keeps the last window - 1 tokens as `[-window + 1:]`: with a window of 1
    # that is all of them, so its own cached and uncached answers differ.
    use_cache = getattr(hf_model.config, "sliding_window", None) != 1
    with torch.no_grad():
        # First: dynamic scaling keeps the longest length it has seen, generation's included.
        prompt_logits = hf_model(ids).logits[0]
        full = hf_model.generate(
            ids, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False,
            use_cache=use_cache, output_logits=True, return_dict_in_generate=True, pad_token_id=0,
        )
    new = full.sequences[0, len(prompt):].tolist()
    logits = torch.cat([prompt_logits[:-1], *full.logits])
    return new, logits.numpy()


def log_softmax(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


@pytest.mark.parametrize(
    ("name", "devices"),
    [*((name, 1) for name in FAMILIES), ("llama_biases", 2), ("qwen3_tied_bias", 2),
     ("llama_mqa", 2)],
)
def test_engine_matches_transformers(name, devices, tmp_path):
    hf_model = make_hf_model(name)
    save_model(hf_model, tmp_path)
    config = EngineConfig(
        model=str(tmp_path), dtype="float32", page_tokens=4, max_chunk_tokens=13,
        max_step_tokens=16, max_num_seqs=4, kv_cache_tokens=400, warmup="none",
        tensor_parallel=devices,
    )
    generator = np.random.default_rng(1)
    with Engine(config) as engine:
        longest = min(engine.max_model_len - NEW_TOKENS, 90)
        prompts = [
            generator.integers(3, 131, size=n).tolist() for n in (1, 9, longest // 2, longest)
        ]
        params = SamplingParams(
            temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=20,
            prompt_logprobs=20,
        )
        outputs = run_all(engine, [(prompt, params) for prompt in prompts])
        assert engine.stats()["pages"]["in_use"] == 0
    for prompt, output in zip(prompts, outputs, strict=True):
        expected, logits = reference(hf_model, prompt)
        allowed = 2 * TOLERANCE * np.abs(logits).max()  # a log probability is a difference
        entries = output.prompt_logprobs[1:] + output.outputs[0].logprobs
        wanted = log_softmax(logits.astype(np.float64))
        got = output.outputs[0].token_ids
        for step, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
            row = wanted[len(prompt) - 1 + step]
            if ours != theirs:  # only a tie may part them, and then the texts go apart
                assert abs(row[ours] - row[theirs]) <= allowed, f"token {step}"
                entries = entries[: len(prompt) + step]
                break
        for position, entry in enumerate(entries):
            for token, value in entry.items():
                assert abs(value.logprob - wanted[position, token]) <= allowed, (
                    f"position {position}, token {token}"
                )
