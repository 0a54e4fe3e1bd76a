"""The demo model as transformers reads it, once for all tests that compare with it."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import transformers

from aqua_jax.loading import load
from aqua_jax.loading.resolve import demo_path

# On models this small a second thread only waits, spinning: twelve times the processor time.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def demo_reference() -> dict[str, Any]:
    """`{"config": ..., "tensors": ...}`: what from_pretrained reads, less the model it builds.

    (It also wants the accelerate package, which nothing else here needs.)
    """
    # Not for the tests that make models of their own: they run where gguf isn't installed, too.
    import gguf
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    ours = load("demo", dtype="float32").config
    with torch.device("meta"):
        shape = transformers.LlamaConfig(
            vocab_size=ours.vocab_size, hidden_size=ours.hidden_size,
            intermediate_size=ours.intermediate_size, num_hidden_layers=ours.num_layers,
            num_attention_heads=ours.num_heads, num_key_value_heads=ours.num_kv_heads,
        )  # fmt: skip
        empty = transformers.LlamaForCausalLM(shape)
    # transformers makes this table anew for each of the model's 397 modules.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map))
        return load_gguf_checkpoint(demo_path(), return_tensors=True, model_to_load=empty)
