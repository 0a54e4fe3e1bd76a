"""AQUA's scheduler as its authors released it (github.com/aquaml/vllm_cfs, vllm/core/scheduler.py).

A baseline of its own, for it isn't a policy over our scheduler but another scheduler:

- *Prompts first.* While requests wait, every step is a prompt step: whole prompts, nobody decodes.
  Where the next one doesn't fit, running sequences give way from the front of their list, which is
  where those with the fewest tokens stand.
- *Least tokens first.* Otherwise everyone running decodes, and after `slice_steps` more steps all
  are sorted by tokens generated; as many as fit, the least served first, are next. The first that
  doesn't fit ends the list, whoever is behind it.
- *Delta out, full in.* Giving way copies the pages that were never copied and the last one of those
  that were, whole; coming back copies every page. A step waits for its copies.
- Nothing runs ahead: a step is planned when the tokens of the one before are there.

Where the released code would fail, this one goes on: pages that run short within a slice end it, a
full store makes recomputation of a copy, and a prompt that finds no slot waits for one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Sequence_

from aqua_jax.errors import SequenceStateError
from aqua_jax.paging.moves import Move
from aqua_jax.paging.pages import PagePool
from aqua_jax.scheduling.limits import SchedulerConfig, SchedulerCounters, check_request
from aqua_jax.scheduling.plan import Chunk, Plan
from aqua_jax.scheduling.sequence import Sequence, Status
from aqua_jax.simulation.stores import SlotHandle, SlotStore

SLICE_STEPS = 5  # the released constant
_WATERMARK = 0.01  # of the pool, left free by an admission: vLLM's
_MAX_PADDINGS = 256  # of a prompt step: vLLM's default then


class AquaReference:
    """Satisfies `simulation.simulator.SchedulerLike`."""

    run_ahead = 0
    steps_wait_for_moves = True

    def __init__(
        self, config: SchedulerConfig, pool: PagePool, stores: Sequence_[SlotStore],
        slice_steps: int = SLICE_STEPS,
    ) -> None:
        """
        Args:
          config: its numbers of sequences and of tokens in a step; a prompt is never cut.
          pool: pages.
          stores: tiers, the preferred one first.
          slice_steps: steps after which everyone is sorted anew.
        """
        self.config, self.pool, self.stores = config, pool, tuple(stores)
        self.counters = SchedulerCounters()
        self._slice_steps = slice_steps
        self._loop = 0
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._tree: list[Sequence] = []  # those who gave way
        self._copies: dict[Sequence, list[tuple[SlotStore, SlotHandle]]] = {}
        self._moves: list[Move] = []
        self._preempted: list[Sequence] = []

    @property
    def num_live(self) -> int:
        """Sequences added and not ended."""
        return len(self._waiting) + len(self._running) + len(self._tree)

    @property
    def num_running(self) -> int:
        """Sequences that hold pages."""
        return len(self._running)

    def add(self, sequence: Sequence) -> None:
        """Queues a new sequence.

        Raises:
          RequestError: it could not end even with the whole pool to itself.
        """
        check_request(sequence, self.config, self.pool)
        self._waiting.append(sequence)

    def plan(self, now: float) -> Plan | None:
        """The next step; None when nobody is live."""
        self._moves, self._preempted = [], []
        chunks = self._prompts() if self._waiting else []
        if not chunks:
            chunks = self._decodes()
        if not chunks:
            return None
        for chunk in chunks:
            chunk.sequence.num_computed += chunk.count
            chunk.sequence.num_inflight += 1
        tokens = sum(chunk.count for chunk in chunks)
        plan = Plan(
            self.counters.plans, tuple(chunks), (), tuple(self._preempted), tokens,
            tuple(self._moves),
        )
        self.counters.plans += 1
        self.counters.tokens += tokens
        return plan

    def accept(self, sequence: Sequence, token: int) -> None:
        """Takes a token."""
        if sequence.num_inflight != 1:
            raise SequenceStateError(f"{sequence} awaits no token")
        sequence.tokens.append(token)
        sequence.num_inflight = 0

    def finish(self, sequence: Sequence) -> None:
        """Ends a running sequence."""
        self._running.remove(sequence)
        self.pool.release_all(sequence.pages)
        sequence.pages = []
        sequence.status = Status.FINISHED
        for store, slot in self._copies.pop(sequence, ()):
            store.free(slot)
        self.counters.finished += 1

    # Prompt steps.

    def _prompts(self) -> list[Chunk]:
        while self._running and not self._can_allocate(self._waiting[0]):
            self._swap_out(self._running.pop(0))
        # vLLM's default limit: the longest prompt there may be, or more.
        limit = max(self.config.max_step_tokens, self.config.max_model_len)
        chunks: list[Chunk] = []
        while self._waiting and len(self._running) < self.config.max_num_seqs:
            sequence = self._waiting[0]
            if not self._can_allocate(sequence):
                break
            lengths = [chunk.count for chunk in chunks] + [sequence.total_len]
            padded = len(lengths) * max(lengths)
            if padded > limit or padded - sum(lengths) > _MAX_PADDINGS:
                break
            self._waiting.popleft()
            self._take_pages(sequence)
            self._running.append(sequence)
            chunks.append(Chunk(sequence, 0, sequence.total_len, True))
        return chunks

    def _can_allocate(self, sequence: Sequence) -> bool:
        left = self.pool.free - self.pool.pages_for(sequence.total_len)
        return left >= (int(_WATERMARK * self.pool.num_pages) if self._running else 0)

    # Decode steps.

    def _decodes(self) -> list[Chunk]:
        if self._loop == self._slice_steps or not self._running or self._short():
            self._sort()
            self._loop = 0
        else:
            self._loop += 1
        for sequence in self._running:
            missing = self.pool.pages_for(sequence.total_len) - len(sequence.pages)
            if missing > 0:
                self._extend(sequence, missing)
        return [Chunk(s, s.num_computed, s.pending, True) for s in self._running]

    def _short(self) -> bool:
        missing = (self.pool.pages_for(s.total_len) - len(s.pages) for s in self._running)
        return sum(missing) > self.pool.free

    def _sort(self) -> None:
        """Who runs next: of all, those with the fewest tokens, as many as fit."""
        before, self._running = self._running, []
        self._tree += before
        free = self.pool.free + sum(len(sequence.pages) for sequence in before)
        self._tree.sort(key=_generated)
        chosen: list[Sequence] = []
        for sequence in self._tree:
            need = min(self.pool.pages_for(sequence.total_len) + 1, self.pool.num_pages)
            if need > free or len(chosen) == self.config.max_num_seqs:
                break
            free -= need
            chosen.append(sequence)
        left = self._tree[len(chosen) :]
        self._tree = left[1:] + left[:1]  # the one that didn't fit goes to the end
        kept = set(chosen)
        for sequence in before:
            if sequence not in kept:
                self._tree.remove(sequence)  # `_swap_out` puts it back
                self._swap_out(sequence)
                self.counters.switches += 1
        for sequence in chosen:
            if not sequence.pages:
                self._swap_in(sequence)
        self._running = chosen

    # Pages and copies.

    def _swap_out(self, sequence: Sequence) -> None:
        copies = self._copies.setdefault(sequence, [])
        dirty = max(0, len(copies) - 1)  # the last page of a copy has been written to since
        for _ in sequence.pages[len(copies) :]:
            place = self._slot()
            if place is None:
                self._forget(sequence)
                return
            copies.append(place)
        size = self.pool.page_tokens
        for page, (store, slot) in zip(sequence.pages[dirty:], copies[dirty:], strict=True):
            self._moves.append(Move(page, store, slot, 0, size, inward=False))
        self._vacate(sequence)
        self._tree.append(sequence)

    def _forget(self, sequence: Sequence) -> None:
        """No store has room: it starts over as a prompt."""
        for store, slot in self._copies.pop(sequence):
            store.free(slot)
        self.counters.recomputed_tokens += sequence.num_computed
        self._vacate(sequence)
        sequence.num_computed = 0
        self._waiting.append(sequence)

    def _slot(self) -> tuple[SlotStore, SlotHandle] | None:
        for store in self.stores:
            slots = store.allocate(1)
            if slots:
                return store, slots[0]
        return None

    def _vacate(self, sequence: Sequence) -> None:
        self.pool.release_all(sequence.pages)
        sequence.pages = []
        sequence.status = Status.WAITING
        sequence.preemptions += 1
        self.counters.preemptions += 1
        self._preempted.append(sequence)

    def _swap_in(self, sequence: Sequence) -> None:
        copies, size = self._copies[sequence], self.pool.page_tokens
        self._extend(sequence, len(copies))
        for page, (store, slot) in zip(sequence.pages, copies, strict=True):
            self._moves.append(Move(page, store, slot, 0, size, inward=True))
        sequence.status = Status.RUNNING

    def _take_pages(self, sequence: Sequence) -> None:
        self._extend(sequence, self.pool.pages_for(sequence.total_len))
        sequence.status = Status.RUNNING

    def _extend(self, sequence: Sequence, count: int) -> None:
        pages = self.pool.allocate(count)
        if pages is None:
            raise SequenceStateError(f"{sequence}: no {count} pages, though they were counted")
        sequence.pages += pages


def _generated(sequence: Sequence) -> int:
    return sequence.total_len - sequence.prompt_len
