"""The demo model as transformers reads it, once for all tests that compare with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from aqua_jax.loading import load
from aqua_jax.loading.resolve import demo_path


@pytest.fixture(scope="session")
def demo_reference() -> dict[str, Any]:
    """`{"config": ..., "tensors": ...}`: what from_pretrained reads, less the model it builds.

    (It also wants the accelerate package, which nothing else here needs.)
    """
    ours = load("demo", dtype="float32").config
    with torch.device("meta"):
        shape = transformers.LlamaConfig(
            vocab_size=ours.vocab_size, hidden_size=ours.hidden_size,
            intermediate_size=ours.intermediate_size, num_hidden_layers=ours.num_layers,
            num_attention_heads=ours.num_heads, num_key_value_heads=ours.num_kv_heads,
        )  # fmt: skip
        empty = transformers.LlamaForCausalLM(shape)
    return load_gguf_checkpoint(demo_path(), return_tensors=True, model_to_load=empty)
