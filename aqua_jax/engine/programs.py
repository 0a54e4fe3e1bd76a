"""The compiled programs of a step, and the only place that compiles anything.

A step is two programs, not one: `forward` (shape T: flat tokens) and `sample` (shape R: rows that
want a token, times its variants). One fused program would need T x R x variants compilations;
two need T + R x variants, and the second dispatch costs 0.2 ms of the host's time. Others run now
and then: `prompt_logprobs` for requests that ask for it, `moves` when pages move and no token is
computed.

Page moves stand at the head of `forward`, always, with room for `StepSpec.max_moves`: a step
without any hands over none, so there is one program with and without.

Where several devices share the model (`parallel.shards`), every program runs on each of them with
its own weights and its own kv heads, and with a vector of its own, for each has its own page moves.
Hidden rows, logits and tokens come out the same everywhere.

Everything is compiled ahead of time from shapes. After `warm_up` a shape that was not compiled
is counted (`compiles_after_warmup`) and logged with its shape.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import os
import threading
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from absl import logging

from aqua_jax.engine.batch import ForwardBatch, MoveVector, SampleBatch, VectorLayout
from aqua_jax.engine.buckets import BucketTable
from aqua_jax.engine.sampler import SampleVariant, pack_logprobs, sample
from aqua_jax.models.decoder import Decoder
from aqua_jax.models.parameters import merge
from aqua_jax.ops.attention import AttentionMetadata, paged_attention
from aqua_jax.ops.moves import enqueue_moves
from aqua_jax.ops.pages import copy_pages
from aqua_jax.ops.spaces import Spaces
from aqua_jax.parallel.shards import EVERYWHERE, HEADS, PARTS, Shards

Params = dict[str, jax.Array]
Leaves = tuple[jax.Array, ...]  # parameters in `Programs.names` order: no keys to sort per call
_LOGPROB_BLOCK = 64  # prompt rows whose logits exist at one time


@dataclasses.dataclass(frozen=True)
class StepSpec:
    """What is constant over an engine's life and shapes its programs."""

    sequences: int  # S: most sequences in a step
    table_width: int  # M: pages of the longest sequence
    buckets: BucketTable
    history_width: int  # N: tokens of the longest sequence
    deterministic: bool
    # Whether matmuls are told how many rows count. Not with XLA's in deterministic mode: there
    # every product must have the same row count, so padding is computed like the rest.
    counts_rows: bool
    attention: Literal["ffi", "reference"]  # implementation of `paged_attention`
    head_dim: int
    max_moves: int = 0  # N: page moves that one step can hand over; 0: pages never move

    def forward_layout(self, tokens: int) -> VectorLayout:
        """Layout of the forward program's vector for T `tokens`."""
        return ForwardBatch.layout(tokens, self.sequences, self.table_width, self.max_moves)


class Programs:
    """Compiles, keeps and hands out the programs of one engine."""

    def __init__(
        self, graphdef: Any, params: Params, kv: jax.Array | jax.ShapeDtypeStruct, spec: StepSpec,
        spaces: Spaces | None = None, shards: Shards | None = None,
    ):
        """Args:
          graphdef: of the decoder, or of one device's part of it.
          params: weights by dotted name.
          kv: the KV pool, [P, L, 2, page_tokens, K, D].
          spec: constants.
          spaces: memory of ours that holds pages behind the pool's; with `shards` each device's
            part of the table.
          shards: the devices that share the model; None: it is on one.
        """
        self._graphdef, self._spec, self.shards = graphdef, spec, shards
        self.names = tuple(params)
        # What logits are made with. Passing all parameters costs the host 1 us each, unused or not.
        head = "lm_head." if any(name.startswith("lm_head.") for name in params) else "embed."
        self.head_names = tuple(name for name in params if name.startswith(head))
        self._hidden_size = params["norm.scale"].shape[0]
        self._params = tuple(self._shape_of(array) for array in params.values())
        self._kv = self._shape_of(kv)
        self._spaces = jax.tree.map(self._shape_of, spaces)
        self._compiled: dict[tuple, jax.stages.Compiled] = {}
        self._lock = threading.Lock()
        self._warm = False
        self.compiles = 0
        self.compiles_after_warmup = 0
        self.compile_seconds = 0.0

    # The programs, as plain functions.

    def _model(self, params: Leaves) -> Decoder:
        return merge(self._graphdef, dict(zip(self.names, params, strict=True)))

    def _head(self, head: Leaves) -> Decoder:
        """A model that has only what `Decoder.logits` asks for."""
        leaves: dict[str, Any] = dict(zip(self.names, self._params, strict=True))
        return merge(self._graphdef, leaves | dict(zip(self.head_names, head, strict=True)))

    def _rows(self, counts: jax.Array) -> jax.Array | None:
        return counts[:1] if self._spec.counts_rows else None

    def _forward(
        self, params: Leaves, kv: jax.Array, vector: jax.Array, last_tokens: jax.Array,
        spaces: Spaces | None = None,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        spec, vector = self._spec, vector.reshape(-1)
        tokens = self._tokens_of(vector)
        batch = ForwardBatch.unpack(vector, spec.forward_layout(tokens))
        if spec.max_moves:
            with jax.named_scope("moves"):
                kv = enqueue_moves(kv, batch.moves, batch.move_head, spaces=spaces)
        with jax.named_scope("copy_on_write"):
            kv = copy_pages(
                kv, batch.copy_sources, batch.copy_targets, batch.counts[2:3],
                implementation=spec.attention, spaces=spaces,
            )
        ids = jnp.where(
            batch.tokens < 0,
            last_tokens[jnp.clip(-1 - batch.tokens, 0, spec.sequences - 1)],
            batch.tokens,
        )
        meta = AttentionMetadata(
            positions=batch.positions, query_starts=batch.query_starts, kv_lens=batch.kv_lens,
            page_table=batch.page_table, num_seqs=batch.counts[1:2],
        )
        model = self._model(params)

        def attend(
            layer: int, q: jax.Array, k: jax.Array, v: jax.Array, cache: jax.Array
        ) -> tuple[jax.Array, jax.Array]:
            cache, out = paged_attention(
                cache, q, k, v, meta, layer=layer, scale=spec.head_dim**-0.5,
                window=model.config.window(layer), deterministic=spec.deterministic,
                implementation=spec.attention, spaces=spaces,
            )
            return out, cache

        hidden, kv = model.forward(
            ids, batch.positions, attend, kv, prompt_lens=batch.prompt_lens,
            rows=self._rows(batch.counts), shards=self.shards,
        )
        return kv, hidden[batch.sample_rows], hidden

    def _sample(
        self, rows: int, variant: SampleVariant, head: Leaves, picked: jax.Array,
        vector: jax.Array, last_tokens: jax.Array, history: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array]:
        batch = SampleBatch.unpack(vector, SampleBatch.layout(rows))
        with jax.named_scope("logits"):
            logits = self._head(head).logits(
                picked[:rows], rows=self._rows(batch.counts), shards=self.shards
            )
        with jax.named_scope("sample"):
            return sample(logits, batch, last_tokens, history, variant)

    def _prompt_logprobs(
        self, head: Leaves, hidden: jax.Array, targets: jax.Array
    ) -> jax.Array:
        """hidden f32[T, d], targets i32[T] -> i32[T, W] (see `pack_logprobs`), block by block."""
        tokens = hidden.shape[0]
        block = min(_LOGPROB_BLOCK, tokens)
        blocks = -(-tokens // block)
        pad = blocks * block - tokens
        hidden = jnp.pad(hidden, ((0, pad), (0, 0))).reshape(blocks, block, -1)
        targets = jnp.pad(targets, (0, pad)).reshape(blocks, block)
        model = self._head(head)
        packed = jax.lax.map(
            lambda x: pack_logprobs(model.logits(x[0], shards=self.shards), x[1]),
            (hidden, targets),
        )
        return packed.reshape(blocks * block, -1)[:tokens]

    def _moves(self, kv: jax.Array, vector: jax.Array, spaces: Spaces | None = None) -> jax.Array:
        fields = dict(MoveVector.layout(self._spec.max_moves).unpack(vector.reshape(-1)))
        with jax.named_scope("moves"):
            return enqueue_moves(kv, fields["moves"], fields["move_head"], spaces=spaces)

    # Getting a compiled one.

    def forward(self, tokens: int) -> jax.stages.Compiled:
        """Compiled `(params, kv, vector, last_tokens, spaces)`.

        Its results are (kv, picked [S,d], hidden [T,d]).
        """
        return self._get(("forward", tokens))

    def sample(self, rows: int, variant: SampleVariant) -> jax.stages.Compiled:
        """Compiled `(head, picked, vector, last_tokens, history) -> (last_tokens, packed)`."""
        return self._get(("sample", rows, variant))

    def prompt_logprobs(self, tokens: int) -> jax.stages.Compiled:
        """Compiled `(head, hidden, targets) -> packed`."""
        return self._get(("prompt_logprobs", tokens))

    def moves(self) -> jax.stages.Compiled:
        """Compiled `(kv, vector, spaces) -> kv`: hands page moves over, and nothing else."""
        return self._get(("moves",))

    def warm_up(self, level: str, progress: Callable[[int, int], None] | None = None) -> None:
        """Compile ahead of time, several at a time where there are cores for it.

        Args:
          level: "none", "largest" (those with the largest peak of memory, to measure it),
            "minimal" (every size of the common programs) or "full" (the rare variants too).
          progress: called with (done, total) after each program.
        """
        keys: list[tuple] = []
        buckets = self._spec.buckets
        if level == "largest":
            keys += [("forward", buckets.tokens[-1]), ("sample", buckets.rows[-1], SampleVariant())]
        elif level != "none":
            # Largest first: the longest compile should not be the last to start.
            keys += [("forward", t) for t in reversed(buckets.tokens)]
            keys += [("sample", r, SampleVariant()) for r in reversed(buckets.rows)]
            keys += [("moves",)] if self._spec.max_moves else []
        if level == "full":
            keys += [
                ("sample", r, SampleVariant(edits, logprobs))
                for r in reversed(buckets.rows)
                for edits, logprobs in ((True, False), (False, True), (True, True))
            ]
            keys += [("prompt_logprobs", t) for t in reversed(buckets.tokens)]
        with concurrent.futures.ThreadPoolExecutor(_compilers(), "aqua-compile") as pool:
            futures = [pool.submit(self._get, key) for key in keys]
            for done, future in enumerate(concurrent.futures.as_completed(futures), 1):
                future.result()
                if progress is not None:
                    progress(done, len(keys))
        self._warm = level not in ("none", "largest")

    @property
    def spec(self) -> StepSpec:
        """What shapes them."""
        return self._spec

    def memory_analyses(self) -> list[Any]:
        """The compiler's own analysis of each program compiled so far, where it has one."""
        with self._lock:
            compiled = list(self._compiled.values())
        return [found for found in (one.memory_analysis() for one in compiled) if found is not None]

    def temp_bytes(self, tokens: int) -> int:
        """Scratch of the forward program, from the compiler's own analysis."""
        analysis = self.forward(tokens).memory_analysis()
        assert analysis is not None, "this platform has no memory analysis"
        return int(analysis.temp_size_in_bytes)

    def _get(self, key: tuple) -> jax.stages.Compiled:
        compiled = self._compiled.get(key)
        if compiled is not None:
            return compiled
        started = time.monotonic()
        compiled = self._compile(key)
        with self._lock:
            self._compiled[key] = compiled
            self.compiles += 1
            self.compile_seconds += time.monotonic() - started
            if self._warm:
                self.compiles_after_warmup += 1
                logging.warning("compiled %s after warm-up; --warmup=full avoids it", key)
        return compiled

    def _compile(self, key: tuple) -> jax.stages.Compiled:
        function, args, donated = self._program(key)
        lowered = jax.jit(function, donate_argnums=donated).lower(*args)
        return lowered.compile(compiler_options=compiler_options(self._spec.deterministic))

    def _program(
        self, key: tuple
    ) -> tuple[Callable[..., Any], tuple[Any, ...], tuple[int, ...]]:
        """A program's function, the shapes of its arguments, and which of them it consumes."""
        spec, shards = self._spec, self.shards
        hidden_size = self._hidden_size
        head = tuple(
            shape for name, shape in zip(self.names, self._params, strict=True)
            if name in self.head_names
        )
        function: Callable[..., Any]
        args: tuple[Any, ...]
        outputs: Any = (EVERYWHERE, EVERYWHERE)
        donated: tuple[int, ...] = ()
        last = self._shape((spec.sequences,))
        if key[0] == "forward":
            function, donated = self._forward, (1,)
            vector = self._vector(spec.forward_layout(key[1]).size)
            args = (self._params, self._kv, vector, last, self._spaces)
            outputs = (HEADS, EVERYWHERE, EVERYWHERE)
        elif key[0] == "moves":
            function, donated = self._moves, (0,)
            vector = self._vector(MoveVector.layout(spec.max_moves).size)
            args = (self._kv, vector, self._spaces)
            outputs = HEADS
        elif key[0] == "sample":
            rows, variant = key[1:]
            function = functools.partial(self._sample, rows, variant)
            history = self._shape((rows, spec.history_width)) if variant.edits else None
            args = (
                head, self._shape((spec.sequences, hidden_size), jnp.float32),
                self._shape((SampleBatch.layout(rows).size,)), last, history,
            )
        else:
            function, outputs = self._prompt_logprobs, EVERYWHERE
            args = (
                head, self._shape((key[1], hidden_size), jnp.float32),
                self._shape((key[1],)),
            )
        if shards is not None:
            inputs = jax.tree.map(lambda shape: shape.sharding.spec, args)
            function = shards.over(function, inputs, outputs)
        return function, args, donated

    def _shape(
        self, shape: tuple[int, ...], dtype: jax.typing.DTypeLike = jnp.int32,
        lies: jax.sharding.PartitionSpec = EVERYWHERE,
    ) -> jax.ShapeDtypeStruct:
        sharding = None if self.shards is None else self.shards.sharding(lies)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def _vector(self, size: int) -> jax.ShapeDtypeStruct:
        if self.shards is None:
            return self._shape((size,))
        return self._shape((self.shards.size, size), lies=PARTS)

    def _shape_of(self, array: jax.Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        sharding = None if self.shards is None else array.sharding
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

    def _tokens_of(self, vector: jax.Array) -> int:
        fixed = self._spec.forward_layout(0).size
        return (vector.shape[0] - fixed) // 3  # tokens, positions, prompt_lens


def compiler_options(deterministic: bool) -> dict[str, str | bool] | None:
    """What XLA is told beyond its defaults, for the platform in use.

    On a GPU it adds up with atomics where that is faster, and takes whichever implementation of a
    product was fastest when it tried them: sums in an order that differs from run to run.
    """
    if deterministic and jax.default_backend() == "gpu":
        return {"xla_gpu_deterministic_ops": True}
    return None


def _compilers() -> int:
    """Programs to compile at a time: each has threads of its own for a part of the work."""
    return max(2, min(8, len(os.sched_getaffinity(0)) // 2))
