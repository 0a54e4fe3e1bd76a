"""What one step does: the whole of what the scheduler tells the engine."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from aqua_jax.paging.moves import Move
from aqua_jax.paging.pages import PageHandle
from aqua_jax.scheduling.holdings import Found
from aqua_jax.scheduling.sequence import Sequence


class Chunk(NamedTuple):
    """`count` tokens of one sequence, from position `start` on, computed in one step.

    The tokens are `sequence.tokens[start : start + count]`, except when `start` lies beyond them:
    then it is the one token sampled last in the sequence's slot, still on the device.
    """

    sequence: Sequence
    start: int
    count: int  # type: ignore[assignment]  # a tuple's method has that name
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
    moved: tuple[Sequence, ...] = ()  # whose pages are others now: some of `copies` are theirs
    # For how many further steps the same decodes go on, as `steady.holds` says; 0: nobody asked.
    holds: int = 0


@dataclasses.dataclass
class Draft:
    """A step being put together."""

    budget: int
    chunks: list[Chunk] = dataclasses.field(default_factory=list)
    copies: dict[Sequence, tuple[int, int]] = dataclasses.field(default_factory=dict)
    # Pages that `copies` read. Held until the plan is made: a page of this very plan may be filled
    # from a store, beside the step, before the copy has read it.
    sources: list[PageHandle] = dataclasses.field(default_factory=list)
    preempted: list[Sequence] = dataclasses.field(default_factory=list)
    pages_coming: bool = False  # some sequence only waits for its last token
    pages_short: bool = False  # a running sequence was refused a page
    awaited: int = 0  # pages that sequences sit out for
    again: int = 0  # tokens that were computed before their sequences gave way
    prompt_tokens: int = 0  # the other ones that come several at once
    # The head of the queue that didn't fit, and what of it needn't be computed.
    refused: tuple[Sequence | None, Found | None] = (None, None)

    def add(self, sequence: Sequence, count: int, pending: int) -> None:
        """`count` of the `pending` tokens of a sequence are computed in this step."""
        self.chunks.append(Chunk(sequence, sequence.num_computed, count, count == pending))
        self.budget -= count
        if pending > 1:
            again = sequence.num_reached - sequence.num_computed
            again = 0 if again < 0 else min(again, count)
            self.again += again
            self.prompt_tokens += count - again
