"""What a step does, in the quantities that its time depends on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from aqua_jax.paging.moves import Move
from aqua_jax.scheduling.plan import Plan


class Work(NamedTuple):
    """One step. A chunk of one token counts as a decode.

    Attributes:
      prefill_tokens: tokens of longer chunks.
      decodes: chunks of one token.
      decode_context: keys that decodes attend to, their own included, all decodes together.
      prefill_context: the same for every token of the longer chunks.
      prefill_reads: tokens whose KV the longer chunks read, once per chunk.
      sampled: rows that want logits.
      moved_bytes: handed to the copy queue with this step.
    """

    prefill_tokens: int = 0
    decodes: int = 0
    decode_context: int = 0
    prefill_context: int = 0
    prefill_reads: int = 0
    sampled: int = 0
    moved_bytes: int = 0

    @property
    def tokens(self) -> int:
        """Rows of the step's matrix products."""
        return self.prefill_tokens + self.decodes


def work_of(plan: Plan, page_tokens: int) -> Work:
    """The work of a plan; moves count by the tokens they carry."""
    prefill = decodes = decode_context = prefill_context = reads = sampled = 0
    for chunk in plan.chunks:
        count = chunk.count
        end = chunk.start + count
        sampled += chunk.sample
        if count == 1:
            decodes += 1
            decode_context += end
        else:
            prefill += count
            prefill_context += count * chunk.start + count * (count + 1) // 2
            reads += end
    moved = moved_bytes(plan.moves, page_tokens)
    return Work(prefill, decodes, decode_context, prefill_context, reads, sampled, moved)


def moved_bytes(moves: Iterable[Move], page_tokens: int) -> int:
    """What moves carry."""
    return sum(move.count * move.store.slot_bytes // page_tokens for move in moves)
