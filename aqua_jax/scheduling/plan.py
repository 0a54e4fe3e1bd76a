"""What one step does: the whole of what the scheduler tells the engine."""

from __future__ import annotations

import dataclasses

from aqua_jax.paging.moves import Move
from aqua_jax.scheduling.sequence import Sequence


@dataclasses.dataclass(frozen=True, slots=True)
class Chunk:
    """`count` tokens of one sequence, from position `start` on, computed in one step.

    The tokens are `sequence.tokens[start : start + count]`, except when `start` lies beyond them:
    then it is the one token sampled last in the sequence's slot, still on the device.
    """

    sequence: Sequence
    start: int
    count: int
    sample: bool  # the chunk ends at the last token, so the next one is sampled


@dataclasses.dataclass(frozen=True)
class Plan:
    """One step. Every plan is dispatched, in the order made, before the next call of `plan`.

    Page tables are read off `chunk.sequence.pages` when the step is dispatched.
    """

    step_id: int
    chunks: tuple[Chunk, ...]  # running sequences first, in the policy's order
    copies: tuple[tuple[int, int], ...]  # page ids (source, target), all copied before any chunk
    preempted: tuple[Sequence, ...]  # lost their pages and slot in this plan
    num_tokens: int
    # Copies to hand over at the head of the step, before anything else; a plan may be only these.
    moves: tuple[Move, ...] = ()
