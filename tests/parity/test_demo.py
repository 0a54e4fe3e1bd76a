"""SmolLM2's real weights on real prompts: the engine against transformers on the same GGUF file."""

from __future__ import annotations

import numpy as np
import torch
import transformers

from aqua_jax.config import EngineConfig, SamplingParams
from aqua_jax.engine.engine import Engine
from tests.engine.driving import run_all

CHATS = [
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "List three prime numbers and say why 9 is not one.",
]
TEXTS = [
    "def fibonacci(n):\n",
    "The quick brown fox jumps over the lazy dog. " * 12,
]
NEW_TOKENS = 24


def test_prompt_logprobs_and_greedy_text(demo_reference):
    tensors = demo_reference["tensors"]
    config = transformers.LlamaConfig(**demo_reference["config"])
    model = transformers.LlamaForCausalLM(config).eval()
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected
    model.tie_weights()
    settings = EngineConfig(
        model="demo", dtype="float32", kv_cache_tokens=2048, max_chunk_tokens=50,
        max_num_seqs=8, max_step_tokens=64, warmup="none",
    )
    with Engine(settings) as engine:
        words = engine.tokenizer
        prompts = [words.encode(text) for text in TEXTS]
        for text in CHATS:
            rendered = words.apply_chat_template([{"role": "user", "content": text}])
            prompts.append(words.encode(rendered, add_special=False))
        params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, prompt_logprobs=0)
        outputs = run_all(engine, [(prompt, params) for prompt in prompts])
    for prompt, output in zip(prompts, outputs, strict=True):
        said = output.outputs[0].token_ids
        with torch.no_grad():
            logits = model(torch.tensor([prompt + said])).logits[0].double()
        wanted = torch.log_softmax(logits, -1).numpy()
        allowed = 4e-4 * float(logits.abs().max())
        for position in range(1, len(prompt)):
            token = prompt[position]
            ours = output.prompt_logprobs[position][token].logprob
            assert abs(ours - wanted[position - 1, token]) <= allowed, (position, token)
        # Greedy: every token the engine said is transformers' best one (ties aside).
        for step, token in enumerate(said):
            row = wanted[len(prompt) - 1 + step]
            assert row[token] >= np.max(row) - allowed, step
        assert len(said) == NEW_TOKENS or said[-1] == config.eos_token_id
