"""Decides what each step runs: continuous batching with chunked prefill over a paged pool.

One call of `plan` goes through three stages.

1. *Running sequences*, in the policy's order. Decodes need one token each, and one token of the
   budget is set aside for every decode still to come, so a long prompt never holds up a decode.
   A sequence that needs a page when none is left makes the policy's victim give way by recompute:
   the victim drops its pages and slot and goes back to its place in the queue. But while some
   sequence only waits for its last token to arrive, its pages are about to come back, and the
   one in need sits out a step instead: cheaper than recomputing hundreds of tokens.
2. *Waiting sequences*, in the policy's order, unless pages ran short in stage 1. Admission takes
   the pages of all known tokens at once (so a half-done prefill is never short of pages) and asks
   that the growth of everyone admitted over the next `growth_tokens` tokens fits as well. Zero
   (vLLM's rule) preempts 48 times in a burst of 64 x (256 in, 256 out) over a pool for 8, and
   recomputes 11,200 tokens; 48 tokens preempt 13 times, recompute 4,700 and end 5% earlier, and
   reserving everything up front loses that again to small batches (scripts/admission.py). A head
   that doesn't fit waits, and nobody overtakes it: pages that come free are thereby kept for it.
3. *Commit.* Counts advance, full pages become findable, and forks of a prompt just computed
   become eligible. Nothing planned in stages 1 and 2 is visible to look-ups before this, so no
   sequence ever reads KV that the same step writes.

Running ahead. `plan` for step n+1 is called while step n is on the device, and perhaps before the
tokens of n or n-1 are known: `num_inflight` counts them, to any depth. A sequence whose length
stop is known ahead is not scheduled again. A preempted one resumes once its tokens in flight have
been accepted, because recomputing needs all its tokens on the host.

Everything accepted ends: `add` refuses what the whole pool could not hold, the first sequence in
the order never gives way to a later one, and a blocked head waits only for sequences that run.
"""

from __future__ import annotations

import dataclasses

from aqua_jax.errors import ConfigError, RequestError, SequenceStateError
from aqua_jax.paging.pages import PageHandle, PagePool, release_all
from aqua_jax.paging.prefix import PrefixCache
from aqua_jax.scheduling.plan import Chunk, Plan
from aqua_jax.scheduling.policies import Policy
from aqua_jax.scheduling.sequence import Sequence, Status
from aqua_jax.scheduling.slots import Slots


@dataclasses.dataclass(frozen=True)
class SchedulerConfig:
    """Limits of a step and of a sequence.

    Raises:
      ConfigError: a field is out of range.
    """

    max_num_seqs: int  # sequences in a step, and slots
    max_step_tokens: int  # tokens in a step, prompt chunks and decodes together
    max_model_len: int  # tokens of one sequence, prompt and output
    max_chunk_tokens: int | None = None  # longest prompt chunk of a sequence; None: the step's
    growth_tokens: int = 48  # room to grow, per running sequence, that an admission must leave

    def __post_init__(self) -> None:
        for field in ("max_num_seqs", "max_model_len"):
            if getattr(self, field) < 1:
                raise ConfigError(field, getattr(self, field), "an integer > 0")
        if self.max_step_tokens < self.max_num_seqs:
            raise ConfigError(
                "max_step_tokens", self.max_step_tokens,
                f"at least max_num_seqs ({self.max_num_seqs}), so that every decode fits a step",
            )
        if self.max_chunk_tokens is not None and self.max_chunk_tokens < 1:
            raise ConfigError("max_chunk_tokens", self.max_chunk_tokens, "an integer > 0 or None")
        if self.growth_tokens < 0:
            raise ConfigError("growth_tokens", self.growth_tokens, "an integer >= 0")


@dataclasses.dataclass
class SchedulerCounters:
    """Totals since the start."""

    plans: int = 0
    tokens: int = 0  # computed, recomputed ones included
    recomputed_tokens: int = 0  # computed before, dropped, and not found in the prefix cache
    preemptions: int = 0
    finished: int = 0
    aborted: int = 0


@dataclasses.dataclass
class _Draft:
    """A step being put together."""

    budget: int
    chunks: list[Chunk] = dataclasses.field(default_factory=list)
    copies: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    preempted: list[Sequence] = dataclasses.field(default_factory=list)
    pages_coming: bool = False  # some sequence only waits for its last token
    pages_short: bool = False  # a running sequence was refused a page

    def add(self, sequence: Sequence, count: int, pending: int) -> None:
        self.chunks.append(Chunk(sequence, sequence.num_computed, count, count == pending))
        self.budget -= count


class Scheduler:
    """Sequences in, plans out. Knows pages, slots and budgets; the policy knows the order."""

    def __init__(
        self,
        config: SchedulerConfig,
        policy: Policy,
        pool: PagePool,
        prefix: PrefixCache | None = None,
    ) -> None:
        """`prefix` is a cache over the same pool; None turns prefix caching off."""
        self.config = config
        self.policy = policy
        self.pool = pool
        self.prefix = prefix
        self.slots = Slots(config.max_num_seqs)
        self.counters = SchedulerCounters()
        self._chunk_limit = config.max_chunk_tokens or config.max_step_tokens
        self._live: set[Sequence] = set()
        self._running: dict[Sequence, None] = {}
        self._held: dict[Sequence, list[Sequence]] = {}  # parent -> forks that await its prompt

    @property
    def num_live(self) -> int:
        """Sequences added and not ended."""
        return len(self._live)

    @property
    def num_running(self) -> int:
        """Sequences that hold a slot."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences without a slot: new, preempted, or forks that await their parent."""
        return len(self._live) - len(self._running)

    def add(self, sequence: Sequence) -> None:
        """Queues a new sequence; hashes its prompt.

        Raises:
          RequestError: it could not end even with the whole pool to itself.
          SequenceStateError: it is not new, or its parent is not of the same prompt.
        """
        if sequence in self._live or sequence.status is not Status.WAITING:
            raise SequenceStateError(f"{sequence} was added before")
        self._check_length(sequence)
        parent = sequence.parent
        if parent is not None and (
            parent.parent is not None
            or parent.salt != sequence.salt
            or parent.tokens[: sequence.prompt_len] != sequence.tokens
        ):
            raise SequenceStateError(f"{sequence} is not a fork of the prompt of {parent}")
        if self.prefix is not None:
            sequence.chain = self.prefix.chain(sequence.salt)
            sequence.chain.extend(sequence.tokens)
        self._live.add(sequence)
        self._enqueue(sequence)

    def plan(self, now: float) -> Plan | None:
        """The next step, or None when nothing can run before a token arrives or one is added."""
        draft = _Draft(self.config.max_step_tokens)
        self._serve_running(draft, now)
        if not draft.pages_short:
            self._admit_waiting(draft, now)
        return self._commit(draft) if draft.chunks else None

    def accept(self, sequence: Sequence, token: int) -> None:
        """Takes a sampled token that has reached the host, in the order of sampling.

        Tokens of ended sequences are the engine's to drop; those of preempted ones belong here.

        Raises:
          SequenceStateError: the sequence has ended, or has no token in flight.
        """
        if sequence not in self._live or sequence.num_inflight == 0:
            raise SequenceStateError(f"{sequence} awaits no token")
        sequence.tokens.append(token)
        sequence.num_inflight -= 1
        self._register(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Ends a sequence that has all it needs; its pages and slot are free for the next plan.

        Raises:
          SequenceStateError: it has ended before.
        """
        self._end(sequence)
        self.counters.finished += 1

    def abort(self, sequence: Sequence) -> None:
        """Ends a sequence, whatever its state; as `finish`, counted apart."""
        self._end(sequence)
        self.counters.aborted += 1

    def reset(self) -> None:
        """Starts all over from tokens, after a step failed and took the pool's contents with it.

        Tokens in flight are lost and will be sampled again; no page holds anything.
        """
        for sequence in list(self._running):
            self._preempt(sequence)
        for sequence in self._live:
            sequence.num_inflight = 0
        self.pool.forget_cached()

    # Stage 1: running sequences.

    def _serve_running(self, draft: _Draft, now: float) -> None:
        order = self.policy.running_order(self._running, now)
        runnable = [sequence for sequence in order if not sequence.complete]
        draft.pages_coming = len(runnable) < len(order)
        demands = [sequence.pending for sequence in runnable]
        decodes_to_come = demands.count(1)
        for index, sequence in enumerate(runnable):
            pending = demands[index]
            if pending == 1:
                decodes_to_come -= 1
            if sequence.status is not Status.RUNNING:  # gave way earlier in this plan
                continue
            count = min(pending, draft.budget - decodes_to_come, self._chunk_limit)
            if count > 0 and self._grow(sequence, count, draft, runnable, index):
                draft.add(sequence, count, pending)

    def _grow(
        self, sequence: Sequence, count: int, draft: _Draft, runnable: list[Sequence], index: int
    ) -> bool:
        """Gives `runnable[index]` the pages of its next `count` tokens; False if it can't run."""
        missing = self.pool.pages_for(sequence.num_computed + count) - len(sequence.pages)
        while missing > 0:
            pages = self.pool.allocate(missing)
            if pages is not None:
                sequence.pages += pages
                return True
            draft.pages_short = True
            if draft.pages_coming:
                return False
            unplanned = (runnable[i] for i in range(len(runnable) - 1, index - 1, -1))
            victim = self.policy.victim(s for s in unplanned if s.status is Status.RUNNING)
            self._preempt(victim)
            draft.preempted.append(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Takes pages and slot away; the KV will be recomputed from the tokens."""
        sequence.preemptions += 1
        sequence.num_dropped = sequence.num_computed
        self.counters.preemptions += 1
        self._vacate(sequence)
        sequence.status = Status.WAITING
        self._enqueue(sequence)

    # Stage 2: waiting sequences.

    def _admit_waiting(self, draft: _Draft, now: float) -> None:
        growth: int | None = None  # pages the running ones may claim soon
        while draft.budget > 0 and self.slots.available:
            sequence = self.policy.head(now)
            if sequence is None or sequence.num_inflight > 0:
                return
            if self._awaits_parent(sequence):  # which was preempted meanwhile
                self.policy.remove(sequence)
                self._enqueue(sequence)
                continue
            if growth is None:
                growth = sum(map(self._growth, self._running))
            growth += self._growth(sequence)
            if not self._admit(sequence, draft, growth):
                return

    def _growth(self, sequence: Sequence) -> int:
        """Pages a sequence will ask for in its next `growth_tokens` tokens."""
        known = sequence.total_len
        soon = min(known + self.config.growth_tokens, sequence.max_total_tokens - 1)
        return max(0, self.pool.pages_for(soon) - self.pool.pages_for(known))

    def _admit(self, sequence: Sequence, draft: _Draft, growth: int) -> bool:
        """Gives a waiting sequence its slot, the pages of its tokens and a first chunk."""
        pool = self.pool
        shared, source, computed = self._reusable(sequence)
        fresh = pool.pages_for(sequence.total_len) - len(shared)
        taken = fresh + sum(pool.references(page) == 0 for page in shared)
        if taken + growth > pool.available:
            return False
        for page in shared:  # before allocating, which may evict what nobody holds
            pool.retain(page)
        pages = pool.allocate(fresh)
        slot = self.slots.acquire()
        if pages is None or slot is None:
            raise SequenceStateError(f"{sequence}: pages or slots changed during a plan")
        if source is not None:
            draft.copies.append((source.id, pages[0].id))
        self.policy.remove(sequence)
        self._running[sequence] = None
        sequence.status = Status.RUNNING
        sequence.slot, sequence.epoch = slot
        sequence.pages = shared + pages
        sequence.num_computed = computed
        sequence.num_registered = len(shared)
        if sequence.parent is None:  # what forks share is no merit of the cache
            if sequence.preemptions == 0:
                sequence.num_cached_tokens = computed
            if self.prefix is not None and not sequence.no_prefix_read:
                self.prefix.count(sequence.total_len, computed)
        lost = max(0, sequence.num_dropped - computed)
        sequence.num_lost += lost
        self.counters.recomputed_tokens += lost
        sequence.num_dropped = 0
        count = min(sequence.pending, draft.budget, self._chunk_limit)
        draft.add(sequence, count, sequence.pending)
        return True

    def _reusable(self, sequence: Sequence) -> tuple[list[PageHandle], PageHandle | None, int]:
        """What needn't be computed: (pages to share, page to copy, tokens they hold).

        At least one token is left to compute, for something has to be sampled from. A page that
        is partly filled is still being written by its owner, so it is copied, not shared; the
        owner can't lose it in this plan, because nobody is preempted once admission has begun.
        """
        if sequence.no_prefix_read:
            return [], None, 0
        size = self.pool.page_tokens
        pages: list[PageHandle] = []
        if self.prefix is not None and sequence.chain is not None:
            pages = self.prefix.match(sequence.chain, sequence.total_len - 1)
        parent, prompt = sequence.parent, sequence.prompt_len - 1
        if (
            parent is not None
            and parent.status is Status.RUNNING
            and parent.num_computed >= prompt > len(pages) * size
        ):
            whole = prompt // size
            return parent.pages[:whole], parent.pages[whole] if prompt % size else None, prompt
        return pages, None, len(pages) * size

    # Stage 3: commit.

    def _commit(self, draft: _Draft) -> Plan:
        num_tokens = self.config.max_step_tokens - draft.budget
        for chunk in draft.chunks:
            sequence = chunk.sequence
            sequence.num_computed += chunk.count
            if chunk.sample:
                sequence.num_inflight += 1
            self._register(sequence)
            self.policy.on_service(sequence, tokens=chunk.count)
            if sequence in self._held and sequence.num_computed >= sequence.prompt_len - 1:
                self._release_forks(sequence)
        plan = Plan(
            self.counters.plans, tuple(draft.chunks), tuple(draft.copies), tuple(draft.preempted),
            num_tokens,
        )
        self.counters.plans += 1
        self.counters.tokens += num_tokens
        return plan

    def _register(self, sequence: Sequence) -> None:
        """Makes pages findable that are full of tokens known here and dispatched there."""
        if self.prefix is None or sequence.chain is None:
            return
        full = min(sequence.num_computed, len(sequence.tokens)) // self.pool.page_tokens
        if full <= sequence.num_registered:
            return
        sequence.chain.extend(sequence.tokens)
        for index in range(sequence.num_registered, full):
            self.prefix.register(sequence.pages[index], sequence.chain.digests[index])
        sequence.num_registered = full

    # Queues.

    def _enqueue(self, sequence: Sequence) -> None:
        """Into the policy's queue, or, for a fork that can share its parent's prompt soon, aside:
        there it blocks nobody, and it comes back when the prompt is computed or the parent ends."""
        if self._awaits_parent(sequence):
            assert sequence.parent is not None
            self._held.setdefault(sequence.parent, []).append(sequence)
        else:
            self.policy.push(sequence)

    def _awaits_parent(self, sequence: Sequence) -> bool:
        parent = sequence.parent
        return (
            parent is not None
            and parent in self._live
            and sequence.preemptions == 0
            and parent.num_computed < sequence.prompt_len - 1
        )

    def _release_forks(self, parent: Sequence) -> None:
        for fork in self._held.pop(parent, ()):
            self.policy.push(fork)

    def _vacate(self, sequence: Sequence) -> None:
        release_all(self.pool, sequence.pages)
        self.slots.release(sequence.slot, sequence.epoch)
        del self._running[sequence]
        sequence.pages = []
        sequence.slot = sequence.epoch = -1
        sequence.num_computed = sequence.num_registered = 0

    def _end(self, sequence: Sequence) -> None:
        if sequence not in self._live:
            raise SequenceStateError(f"{sequence} is not live: ended before, or never added")
        forks = self._held.get(sequence.parent, []) if sequence.parent is not None else []
        if sequence.status is Status.RUNNING:
            self._vacate(sequence)
        elif sequence in forks:
            forks.remove(sequence)
        else:
            self.policy.remove(sequence)
        sequence.status = Status.FINISHED
        self._live.remove(sequence)
        self._release_forks(sequence)
        self.policy.on_finish(sequence)

    def _check_length(self, sequence: Sequence) -> None:
        limit = min(self.config.max_model_len, self.pool.num_pages * self.pool.page_tokens + 1)
        why = (
            f"max_model_len ({self.config.max_model_len})"
            if limit == self.config.max_model_len
            else f"what the KV pool of {self.pool.num_pages} pages holds ({limit})"
        )
        if not 1 <= sequence.prompt_len < limit:
            raise RequestError(
                "prompt", f"{sequence.prompt_len} tokens", f"1 token or more, fewer than {why}"
            )
        if not sequence.prompt_len < sequence.max_total_tokens <= limit:
            raise RequestError(
                "max_tokens", sequence.max_total_tokens - sequence.prompt_len,
                f"1 or more; with the prompt's {sequence.prompt_len} at most {why}",
            )
