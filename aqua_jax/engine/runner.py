"""Carries plans to the device: owns the weights, the KV pool and the arrays indexed by slot.

`dispatch` turns a `Plan` into two packed vectors, enqueues the programs and returns a
`StepRecord` at once; `read` waits for a record's one packed array. Between the two the host
plans the next step. Nothing here decides anything.
"""

from __future__ import annotations

import array
import dataclasses
import struct
import time
from collections.abc import Callable
from collections.abc import Sequence as Sequence_
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from aqua_jax.engine.batch import (
    SAMPLE_COLUMNS,
    SAMPLE_WORDS,
    MoveVector,
    SampleBatch,
    VectorLayout,
)
from aqua_jax.engine.pager import Pager
from aqua_jax.engine.programs import Params, Programs, StepSpec
from aqua_jax.engine.request import Request, Sample
from aqua_jax.engine.sampler import SampleVariant
from aqua_jax.ops.spaces import Spaces
from aqua_jax.scheduling.plan import Chunk, Plan
from aqua_jax.scheduling.sequence import Sequence

_COMMON = SampleVariant()  # of most steps
# What changes with each token in a packed row of sampling parameters: where, in bytes.
_COUNT = struct.Struct("<i")
_HISTORY_AT, _INDEX_AT = (
    4 * cast(int, SAMPLE_COLUMNS[name]) for name in ("history_lens", "token_index")
)
Lookup = Callable[[Sequence], tuple[Request, Sample]]  # of a live, scheduled sequence


@dataclasses.dataclass(frozen=True)
class PromptRows:
    """Which rows of a step's prompt log probabilities belong to which prompt tokens."""

    sequence: Sequence
    first_row: int
    first_position: int  # the row of position p holds the log probability of token p + 1
    count: int


@dataclasses.dataclass(frozen=True)
class StepRecord:
    """A dispatched step whose tokens the host has not read yet."""

    step_id: int
    plan: Plan
    rows: tuple[Sequence, ...]  # whose token each row is; it may have ended since
    packed: jax.Array | None  # i32[R, W], None when no row wanted a token
    prompt_rows: tuple[PromptRows, ...]
    prompt_packed: jax.Array | None  # i32[T, W]
    fence: jax.Array  # ready once the step's forward pass is done
    prefill: int  # prompt tokens in it, recomputed ones included
    decodes: int
    dispatched: float  # `time.perf_counter()`


class SlotState:
    """Sampling parameters and page tables of resident sequences, by slot (host arrays).

    Attributes:
      rows: i32[slots, SAMPLE_WORDS], as sampling takes them but for what changes with each token.
      sampling: the same as views by field name.
      packed: the same as bytes: joined they are there sooner than by NumPy.
      page_table: i32[M] for each slot.
      rare: slots that need more than the common sampling program: penalties, `min_tokens`, log
        probabilities.
      prompt_logprobs: slots whose prompts' log probabilities are wanted.
    """

    def __init__(self, slots: int, table_width: int, lookup: Lookup):
        self.rows = np.zeros((slots, SAMPLE_WORDS), np.int32)
        self.packed = [bytearray(4 * SAMPLE_WORDS) for _ in range(slots)]
        self.sampling = SampleBatch.columns(self.rows)
        self.page_table = [
            memoryview(array.array("i", [-1] * table_width)) for _ in range(slots)
        ]
        self.rare: set[int] = set()
        self.prompt_logprobs: set[int] = set()
        self.min_tokens = np.zeros(slots, np.int32)  # 0 where no id is held back until then
        self.penalised = np.zeros(slots, bool)
        self.logprobs = np.zeros(slots, bool)
        self._lookup = lookup
        self._owner = [(-1, -1)] * slots  # (seq_id, epoch)
        self._filled = [0] * slots

    def refresh(self, chunks: Sequence_[Chunk]) -> None:
        """Bring the slots of scheduled sequences up to date: O(chunks and new pages)."""
        owner, filled = self._owner, self._filled
        for chunk in chunks:
            sequence = chunk.sequence
            slot, pages = sequence.slot, sequence.pages
            if owner[slot] != (sequence.seq_id, sequence.epoch):
                owner[slot] = (sequence.seq_id, sequence.epoch)
                filled[slot] = 0
                self._fill_sampling(slot, *self._lookup(sequence))
            have, now = filled[slot], len(pages)
            if have < now:
                ids = array.array("i", [handle.id for handle in pages[have:]])
                self.page_table[slot][have:now] = ids
                filled[slot] = now

    def refill(self, slot: int) -> None:
        """The pages of a slot's sequence are others now."""
        self._filled[slot] = 0

    def _fill_sampling(self, slot: int, request: Request, sample: Sample) -> None:
        params, views = request.params, self.sampling
        views["slots"][slot] = slot
        views["temperature"][slot] = 0.0 if params.greedy else params.temperature
        views["top_k"][slot] = max(params.top_k, 0)
        for name in (
            "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"
        ):
            views[name][slot] = getattr(params, name)
        views["key_data"][slot] = request.key_data
        views["sample_index"][slot] = sample.output.index
        views["prompt_lens"][slot] = sample.sequence.prompt_len
        views["banned"][slot] = -1
        views["banned"][slot, : len(sample.banned)] = sample.banned
        self.packed[slot][:] = self.rows[slot].tobytes()
        self.min_tokens[slot] = params.min_tokens if sample.banned else 0
        self.penalised[slot] = params.penalised
        self.logprobs[slot] = params.logprobs is not None
        rare = bool(sample.banned) or params.penalised or params.logprobs is not None
        _mark(self.rare, slot, rare)
        prompted = params.prompt_logprobs is not None and sample.output.index == 0
        _mark(self.prompt_logprobs, slot, prompted)


def _mark(slots: set[int], slot: int, member: bool) -> None:
    (slots.add if member else slots.discard)(slot)


class Runner:
    """The device side of one engine."""

    def __init__(
        self, programs: Programs, params: Params, make_kv: Callable[[], jax.Array],
        kv: jax.Array, spec: StepSpec, lookup: Lookup, pager: Pager | None = None,
        spaces: Spaces | None = None,
    ):
        """Args:
          programs: compiled programs.
          params: weights by dotted name.
          make_kv: makes an empty KV pool, for recovery after a failed step.
          kv: the KV pool, [P, L, 2, page_tokens, K, D].
          spec: constants of the programs.
          lookup: the request and sample of a scheduled sequence.
          pager: turns page moves into what the programs take; None: no plan has any.
          spaces: memory of ours that holds pages behind the pool's, as `programs` was told.
        """
        self.programs, self._spec = programs, spec
        self._params = tuple(params[name] for name in programs.names)
        self._head = tuple(params[name] for name in programs.head_names)
        self._make_kv, self._kv = make_kv, kv
        self._lookup, self._pager = lookup, pager
        # On the device once: it never changes, so that no step transfers it.
        self._spaces = jax.device_put(spaces)
        self._last_tokens = self._no_tokens()
        self._slots = SlotState(spec.sequences, spec.table_width, lookup)
        nobody = np.zeros((1, SAMPLE_WORDS), np.int32)  # where no row is
        nobody[0, SAMPLE_COLUMNS["slots"]] = spec.sequences
        nobody[0, SAMPLE_COLUMNS["banned"]] = -1
        self._no_row = nobody.tobytes()

    def dispatch(self, plan: Plan) -> StepRecord | None:
        """Enqueue one step; returns before it has run. None: there will be nothing to read."""
        packed_moves: list[bytes] = []
        if plan.moves:
            assert self._pager is not None, "moves are planned only between pool and stores"
            packed_moves = self._pager.batch(plan.moves)
        if not plan.chunks:
            if packed_moves:
                self._dispatch_moves(packed_moves)
            return None
        for sequence in plan.moved:
            self._slots.refill(sequence.slot)
        vector, bucket = self._forward_vector(plan, packed_moves)
        sampled = [chunk for chunk in plan.chunks if chunk.sample]
        forward = self.programs.forward(bucket)
        self._kv, picked, hidden = forward(
            self._params, self._kv, vector, self._last_tokens, self._spaces
        )
        packed = self._sample(sampled, picked) if sampled else None
        prompt_rows, prompt_packed = self._prompt_logprobs(plan, hidden, bucket)
        rows = tuple(chunk.sequence for chunk in sampled)
        decodes = sum(chunk.count == 1 for chunk in plan.chunks)
        return StepRecord(
            plan.step_id, plan, rows, packed, prompt_rows, prompt_packed, picked,
            plan.num_tokens - decodes, decodes, time.perf_counter(),
        )

    def _dispatch_moves(self, moves: list[bytes]) -> None:
        layout = MoveVector.layout(self._spec.max_moves)
        vector = self._for_devices(np.zeros(layout.size, np.int32), layout, moves)
        self._kv = self.programs.moves()(self._kv, vector, self._spaces)

    def _no_tokens(self) -> jax.Array:
        tokens, shards = jnp.zeros((self._spec.sequences,), jnp.int32), self.programs.shards
        return tokens if shards is None else shards.everywhere(tokens)

    def _for_devices(
        self, vector: np.ndarray, layout: VectorLayout,
        packed_moves: list[bytes],
    ) -> np.ndarray:
        """A step's vector with its moves: i32[size], or i32[N, size] for N devices, moves apart."""
        shards = self.programs.shards
        if shards is None:
            if packed_moves:
                MoveVector.write(layout, vector, *packed_moves)
            return vector
        vectors = np.tile(vector, (shards.size, 1))
        if packed_moves:
            for own, moves in zip(vectors, packed_moves, strict=True):
                MoveVector.write(layout, own, moves)
        return vectors

    @staticmethod
    def read(record: StepRecord) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Wait for a step's result: (packed i32[R, W], prompt log probabilities i32[T, W])."""
        if record.packed is None and record.prompt_packed is None:
            record.fence.block_until_ready()  # surfaces a failed step here, not three steps on
        packed = None if record.packed is None else np.asarray(record.packed)
        prompt = None if record.prompt_packed is None else np.asarray(record.prompt_packed)
        return packed, prompt

    def fence(self) -> None:
        """Wait for every dispatched step; raises what one of them failed with."""
        jax.block_until_ready((self._kv, self._last_tokens))

    def reset(self) -> None:
        """A new, empty pool after a failed step (which consumed the donated one)."""
        self._kv = self._make_kv()
        self._last_tokens = self._no_tokens()

    def close(self) -> None:
        """Drop device memory; `fence` first."""
        self._kv = None  # type: ignore[assignment]
        self._params = self._head = ()

    @property
    def kv(self) -> jax.Array:
        """The KV pool as of the last dispatched step. Reading it delays the next step."""
        return self._kv

    def _forward_vector(
        self, plan: Plan, packed_moves: list[bytes]
    ) -> tuple[np.ndarray, int]:
        spec, chunks = self._spec, plan.chunks
        bucket = spec.buckets.token_bucket(plan.num_tokens)
        layout = spec.forward_layout(bucket)
        vector = np.zeros(layout.size, np.int32)
        self._slots.refresh(chunks)
        tokens: list[int] = []
        positions: list[int] = []
        prompt_lens: list[int] = []
        starts: list[int] = []
        ends: list[int] = []
        sample_rows: list[int] = []
        slots: list[int] = []
        for sequence, start, count, sample in chunks:
            slot, known, end = sequence.slot, sequence.tokens, start + count
            slots.append(slot)
            starts.append(len(tokens))
            ends.append(end)
            if end <= len(known):
                tokens += known[start:end]
            else:  # the last one is still on the device, under its slot
                tokens += known[start:]
                tokens.append(-1 - slot)
            positions += range(start, end)
            prompt_lens += [sequence.prompt_len] * count
            if sample:
                sample_rows.append(len(tokens) - 1)
        starts += [len(tokens)] * (spec.sequences + 1 - len(chunks))
        counts = [len(tokens), len(chunks), len(plan.copies)]
        layout.fill(vector, counts, tokens, positions, prompt_lens, starts, ends, sample_rows)
        table = self._slots.page_table
        layout.put(vector, "page_table", b"".join([table[slot] for slot in slots]))
        if plan.copies:
            sources, targets = zip(*plan.copies, strict=True)
            layout.view(vector, "copy_sources")[: len(sources)] = sources
            layout.view(vector, "copy_targets")[: len(targets)] = targets
        return self._for_devices(vector, layout, packed_moves), bucket

    def _sample(self, sampled: Sequence_[Chunk], picked: jax.Array) -> jax.Array:
        spec, by_slot, column = self._spec, self._slots, SAMPLE_COLUMNS
        bucket = spec.buckets.row_bucket(len(sampled))
        layout = SampleBatch.layout(bucket)
        vector = np.empty(layout.size, np.int32)
        slots = [chunk.sequence.slot for chunk in sampled]
        count = len(slots)
        packed_rows: list[bytes | bytearray] = [_COUNT.pack(count)]
        for sequence, start, tokens, _ in sampled:
            row, before = by_slot.packed[sequence.slot], start + tokens
            _COUNT.pack_into(row, _HISTORY_AT, before)
            _COUNT.pack_into(row, _INDEX_AT, before - sequence.prompt_len)
            packed_rows.append(row)
        packed_rows += [self._no_row] * (bucket - count)
        layout.put(vector, "counts", b"".join(packed_rows))
        variant, history = _COMMON, None
        if not by_slot.rare.isdisjoint(slots):
            rows = layout.view(vector, "rows")
            holds_back = rows[:count, column["token_index"]] < by_slot.min_tokens[slots]
            rows[:count, column["banned"]][~holds_back] = -1
            variant = SampleVariant(
                edits=bool(holds_back.any() or by_slot.penalised[slots].any()),
                logprobs=bool(by_slot.logprobs[slots].any()),
            )
            history = self._history(sampled, bucket) if variant.edits else None
        self._last_tokens, packed = self.programs.sample(bucket, variant)(
            self._head, picked, vector, self._last_tokens, history
        )
        return packed

    def _history(self, sampled: Sequence_[Chunk], bucket: int) -> np.ndarray:
        history = np.full((bucket, self._spec.history_width), -1, np.int32)
        for row, chunk in enumerate(sampled):
            known = chunk.sequence.tokens
            before = chunk.start + chunk.count
            history[row, : len(known)] = known
            history[row, len(known) : before] = -2  # the slot's last token, still on the device
        return history

    def _prompt_logprobs(
        self, plan: Plan, hidden: jax.Array, bucket: int
    ) -> tuple[tuple[PromptRows, ...], jax.Array | None]:
        asking = self._slots.prompt_logprobs
        if not asking:  # most of the time
            return (), None
        wanted: list[PromptRows] = []
        targets = None
        row = 0
        for chunk in plan.chunks:
            sequence = chunk.sequence
            count = min(chunk.count, sequence.prompt_len - 1 - chunk.start)
            if count > 0 and sequence.slot in asking:
                if targets is None:
                    targets = np.zeros(bucket, np.int32)
                first = chunk.start + 1
                targets[row : row + count] = sequence.tokens[first : first + count]
                wanted.append(PromptRows(sequence, row, chunk.start, count))
            row += chunk.count
        if targets is None:
            return (), None
        program = self.programs.prompt_logprobs(bucket)
        return tuple(wanted), program(self._head, hidden, targets)
