"""Architecture of a decoder, as plain data: what a checkpoint's config.json or GGUF header says.

No jax here: loaders, the scheduler's sizing and the simulator read it too.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

RopeKind = Literal["none", "linear", "dynamic", "llama3", "yarn"]


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched past the trained context.

    Sources: linear (kaiokendev's position interpolation), dynamic (NTK-aware by length),
    llama3 (Llama 3.1's frequency bands), yarn (Peng et al. 2023, arXiv 2309.00071).
    Field names follow Hugging Face's `rope_scaling`.
    """

    kind: RopeKind = "none"
    factor: float = 1.0
    original_max_position: int | None = None  # tokens; None: the model's max_position
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn; None: computed from factor and mscale
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn: round the correction range to whole dimensions


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape of a Llama-family decoder (Llama, CodeLlama, Mistral, Qwen2, Qwen3, SmolLM2)."""

    family: str  # "llama" | "mistral" | "qwen2" | "qwen3"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int  # longest trained context, tokens
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling = RopeScaling()
    # Window of each layer in tokens (a query sees itself and the window-1 tokens before); None: all.
    layer_windows: tuple[int | None, ...] = ()
    tied_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm over head_dim on q and k before rotary (Qwen3)
    hidden_act: str = "silu"
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def window(self, layer: int) -> int | None:
        """Attention window of `layer` in tokens; None when it sees everything."""
        return self.layer_windows[layer] if self.layer_windows else None

    @property
    def query_size(self) -> int:
        """Width of all query heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key (or value) heads together."""
        return self.num_kv_heads * self.head_dim
