"""The Llama-family decoder: one set of layers, used with and without a cache.

    x = embed(tokens)
    for each layer:
        y = norm(x);  x += o(attend(rope(q(y)), rope(k(y)), v(y)))
        y = norm(x);  x += down(silu(gate(y)) * up(y))
    logits = head(norm(x))

What differs between the family's members is data (`ModelConfig`): biases, norms on q and k, head
size, windows, rotary scaling, tied head. What differs between a researcher's dense forward and
the engine's paged one is the `attend` function that is passed in; the cache it reads and writes is
threaded through the layers as an opaque value.

Legend: T tokens of one call, flat over sequences; B batch; d model width; F MLP width; H query
heads; K kv heads; D head dim; V vocabulary; R rows whose logits are wanted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from aqua_jax.models import rope
from aqua_jax.models.attention import dense_attention
from aqua_jax.models.config import ModelConfig
from aqua_jax.models.layers import Embedding, Linear, RMSNorm
from aqua_jax.ops.activation import gated_mlp
from aqua_jax.ops.projection import qkv_rotary


class Attend(Protocol):
    """Attention of one layer, with whatever cache it keeps.

    The window is `config.window(layer)`; scores are scaled by D ** -0.5.
    """

    def __call__(
        self, layer: int, q: jax.Array, k: jax.Array, v: jax.Array, cache: Any
    ) -> tuple[jax.Array, Any]:
        """q [T, H, D], k and v [T, K, D], f32, q and k already rotated -> ([T, H, D], cache)."""


class Shards(Protocol):
    """How the parts of one model on several devices become whole (`aqua_jax.parallel.Shards`).

    Each device then runs a `Decoder` of its part of heads, hidden units and vocabulary.
    """

    def sum_parts(self, x: jax.Array) -> jax.Array:
        """The sum of what each device has."""

    def rows_parts(
        self, look_up: Callable[[jax.Array], jax.Array], tokens: jax.Array
    ) -> jax.Array:
        """Rows f32 [T, d] of a table cut by vocabulary: tokens i32 [T]."""

    def columns_parts(self, y: jax.Array) -> jax.Array:
        """Logits [R, a part of V] of each device side by side, [R, V]."""


class Attention(nnx.Module):
    """Grouped-query attention: fused q, k, v projection, optional q/k norm, rotary, output.

    The layer's norm and residual go into the projections, where they cost no extra pass.
    """

    def __init__(self, config: ModelConfig, *, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs | None):
        self.config = config
        d, wide = config.hidden_size, config.query_size + 2 * config.kv_size
        self.qkv = Linear(d, wide, use_bias=config.qkv_bias, dtype=dtype, rngs=rngs)
        self.o = Linear(config.query_size, d, use_bias=config.o_bias, dtype=dtype, rngs=rngs)
        eps = config.rms_norm_eps
        self.q_norm = RMSNorm(config.head_dim, eps=eps, rngs=rngs) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, eps=eps, rngs=rngs) if config.qk_norm else None

    def __call__(
        self,
        x: jax.Array,
        norm: RMSNorm,
        angles: tuple[jax.Array, jax.Array],
        layer: int,
        attend: Attend,
        cache: Any,
        shards: Shards | None = None,
        **matmul: Any,
    ) -> tuple[jax.Array, Any]:
        """x + attention(norm(x)): x f32 [T, d], angles (cos, sin) [T, D/2] -> ([T, d], cache)."""
        c, qkv = self.config, self.qkv
        q, k, v = qkv_rotary(  # [T, H or K, D]
            x,
            qkv.kernel[...],
            *angles,
            features=qkv.in_features,
            heads=c.num_heads,
            kv_heads=c.num_kv_heads,
            head_dim=c.head_dim,
            bias=None if qkv.bias is None else qkv.bias[...],
            norm=norm.operand,
            query_norm=None if self.q_norm is None else self.q_norm.operand,
            key_norm=None if self.k_norm is None else self.k_norm.operand,
            **matmul,
        )
        out, cache = attend(layer, q, k, v, cache)  # [T, H, D]
        out = out.reshape(x.shape[0], c.query_size)
        if shards is not None:
            return x + shards.sum_parts(self.o(out, **matmul)), cache
        return self.o(out, residual=x, **matmul), cache


class MLP(nnx.Module):
    """Gated feed-forward layer, down(silu(gate) * up) (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig, *, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs | None):
        d, f, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_up = Linear(d, 2 * f, use_bias=bias, dtype=dtype, rngs=rngs)
        self.down = Linear(f, d, use_bias=bias, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: jax.Array, norm: RMSNorm, shards: Shards | None = None, **matmul: Any
    ) -> jax.Array:
        """x + mlp(norm(x)): x f32 [T, d] -> f32 [T, d]."""
        gate_up, down = self.gate_up, self.down
        out = gated_mlp(
            x,
            gate_up.kernel[...],
            down.kernel[...],
            features=down.out_features,
            hidden=down.in_features,
            gate_up_bias=None if gate_up.bias is None else gate_up.bias[...],
            down_bias=None if down.bias is None else down.bias[...],
            norm=norm.operand,
            residual=x if shards is None else None,
            **matmul,
        )
        return out if shards is None else x + shards.sum_parts(out)


class Layer(nnx.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config: ModelConfig, *, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs | None):
        self.input_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, rngs=rngs)
        self.attention = Attention(config, dtype=dtype, rngs=rngs)
        self.post_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, rngs=rngs)
        self.mlp = MLP(config, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        angles: tuple[jax.Array, jax.Array],
        layer: int,
        attend: Attend,
        cache: Any,
        shards: Shards | None = None,
        **matmul: Any,
    ) -> tuple[jax.Array, Any]:
        """Residual stream in and out: x f32 [T, d] -> (f32 [T, d], cache)."""
        x, cache = self.attention(
            x, self.input_norm, angles, layer, attend, cache, shards, **matmul
        )
        return self.mlp(x, self.post_norm, shards, **matmul), cache


class Decoder(nnx.Module):
    """Llama-family decoder with random weights; `loading` and `parameters.merge` fill in real ones.

    Example:
      Logits, and the gradient of a next-token loss::

        config = ModelConfig(family="llama", vocab_size=256, hidden_size=64, intermediate_size=128,
                             num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16,
                             max_position=128)
        model = Decoder(config, rngs=nnx.Rngs(0))
        tokens = jnp.arange(20).reshape(2, 10)
        logits = nnx.jit(lambda model, tokens: model(tokens))(model, tokens)  # f32 [2, 10, 256]

        def loss(model, tokens):
            log_probs = jax.nn.log_softmax(model(tokens[:, :-1]))
            return -jnp.mean(jnp.take_along_axis(log_probs, tokens[:, 1:, None], axis=-1))

        value, gradients = nnx.value_and_grad(loss)(model, tokens)

    Attributes:
      config: the architecture.
      embed, layers, norm, lm_head: see `models.huggingface` for every parameter's name and shape.
        lm_head is None when the embedding is tied.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs | None,
    ):
        """Makes a decoder with random weights.

        Args:
          config: the architecture.
          dtype: of matrices and of what they are multiplied with; float32 or bfloat16.
          rngs: gives the `params` stream of keys. None: parameters are shapes and nothing is
            allocated (as under `nnx.eval_shape`, but a thousand times faster).
        """
        self.config = config
        self.embed = Embedding(config.vocab_size, config.hidden_size, dtype=dtype, rngs=rngs)
        self.layers = nnx.List(
            [Layer(config, dtype=dtype, rngs=rngs) for _ in range(config.num_layers)]
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, rngs=rngs)
        self.lm_head = (
            None
            if config.tied_embeddings
            else Linear(config.hidden_size, config.vocab_size, dtype=dtype, rngs=rngs)
        )

    def __call__(self, tokens: jax.Array, *, implementation: str | None = "xla") -> jax.Array:
        """Logits of whole sequences, all starting at position 0 and attending causally.

        Args:
          tokens: i32 [B, T]. Padding on the right is harmless: no earlier token sees it.
          implementation: of the matmuls; "xla" runs everywhere and can be differentiated.

        Returns:
          f32 [B, T, V].

        Raises:
          ValueError: tokens isn't two-dimensional.
        """
        if tokens.ndim != 2:
            raise ValueError(f"tokens: got shape {tokens.shape}; allowed: [batch, length]")
        batch, length = tokens.shape
        scale = self.config.head_dim**-0.5

        def attend(
            layer: int, q: jax.Array, k: jax.Array, v: jax.Array, cache: None
        ) -> tuple[jax.Array, None]:
            q, k, v = (x.reshape(batch, length, *x.shape[1:]) for x in (q, k, v))
            out = dense_attention(q, k, v, scale=scale, window=self.config.window(layer))
            return out.reshape(batch * length, *out.shape[2:]), cache

        hidden, _ = self.forward(
            tokens.reshape(-1),
            jnp.tile(jnp.arange(length, dtype=jnp.int32), batch),
            attend,
            None,
            prompt_lens=jnp.full((batch * length,), length, jnp.int32),
            implementation=implementation,
        )
        return self.logits(hidden, implementation=implementation).reshape(batch, length, -1)

    def forward(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        attend: Attend,
        cache: Any,
        *,
        prompt_lens: jax.Array | None = None,
        rows: jax.Array | None = None,
        implementation: str | None = None,
        shards: Shards | None = None,
    ) -> tuple[jax.Array, Any]:
        """Runs the layers over a flat list of tokens, whatever sequences they belong to.

        Args:
          tokens: i32 [T].
          positions: i32 [T], of each token in its own sequence.
          attend: attention of one layer, which knows the sequences and their cache.
          cache: handed to `attend` layer after layer, and returned. Any pytree.
          prompt_lens: i32 [T], prompt length of each token's sequence; see `rope.cos_sin`.
          rows: i32 [1], leading tokens that count (the rest pads a bucket); None: all.
          implementation: of the matmuls; None picks the fastest.
          shards: this decoder is a part of a model; the others' parts. None: it is the model.

        Returns:
          (f32 [T, d] after the final norm, cache). Rows that don't count are finite nonsense.
        """
        angles = rope.cos_sin(self.config, positions, prompt_lens)
        x = self.embed(tokens) if shards is None else shards.rows_parts(self.embed, tokens)
        for index, layer in enumerate(self.layers):
            with jax.named_scope(f"layer_{index}"):
                x, cache = layer(
                    x, angles, index, attend, cache, shards, rows=rows,
                    implementation=implementation,
                )
        return self.norm(x), cache

    def logits(
        self,
        hidden: jax.Array,
        rows: jax.Array | None = None,
        *,
        implementation: str | None = None,
        shards: Shards | None = None,
    ) -> jax.Array:
        """Next-token logits: hidden f32 [R, d] from `forward` -> f32 [R, V].

        `rows` i32 [1] is the number of leading rows that count, None for all; `shards` as there.
        """
        with jax.named_scope("logits"):
            head = self.embed.attend if self.lm_head is None else self.lm_head
            part = head(hidden, rows=rows, implementation=implementation)
            return part if shards is None else shards.columns_parts(part)
