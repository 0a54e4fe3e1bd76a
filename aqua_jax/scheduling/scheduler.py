"""Decides what each step runs: continuous batching with chunked prefill over a paged pool.

One call of `plan` goes through these stages.

0. *Turns*, for policies that have them (`Policy.yielding`). While the head of the queue doesn't
   fit, running sequences whose turn is over give way to it, if together they make enough room;
   otherwise nobody does, and since nobody overtakes the head, room gathers for it. The head gets
   slot and pages here, and its first chunk in stage 1, within what decodes leave of the budget.
1. *Running sequences*, in the policy's order. Decodes need one token each, and one token of the
   budget is set aside for every decode still to come, so a long prompt never holds up a decode.
   A sequence that needs a page when none is left makes the policy's victim give way: the victim
   loses its pages and slot and goes back to its place in the queue. But while some sequence only
   waits for its last token to arrive, or pages are being copied to a store, pages are about to
   come back, and the one in need sits out a step instead.
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

*With stores below the pool* (`paging.residency`) giving way is cheap, and four things differ.
Whoever gives way is copied out, or recomputed where that costs less (`cost`); its pages come free
when the copies have ended, at once if they were made ahead (*write-behind*: full pages of the
sequences next to go, as many as those who come next will need). Whoever comes back holds slot and
pages while its own are copied in, and runs once they have arrived. Pages that will be short within
a few steps make the victim go now, so that nobody sits out while they are copied (`_make_room`).
And while stores have room, newcomers need none to grow: what they displace comes back cheaply.

Running ahead. `plan` for step n+1 is called while step n is on the device, and perhaps before the
tokens of n or n-1 are known: `num_inflight` counts them, to any depth. A sequence whose length
stop is known ahead is not scheduled again. A preempted one resumes once its tokens in flight have
been accepted, because recomputing needs all its tokens on the host.

Everything accepted ends: `add` refuses what the whole pool could not hold, whoever takes another's
page computes a token with it in the same plan, a turn ends only after it has brought tokens (or,
under strict priority, for a better rank, which never changes), and a blocked head waits only for
sequences that run.
"""

from __future__ import annotations

import dataclasses
import itertools

from aqua_jax.errors import SequenceStateError
from aqua_jax.paging.moves import Move
from aqua_jax.paging.pages import PagePool
from aqua_jax.paging.prefix import PrefixCache
from aqua_jax.paging.residency import Residency
from aqua_jax.scheduling.ahead import Ahead
from aqua_jax.scheduling.bounds import WaitingBound
from aqua_jax.scheduling.cost import Costs
from aqua_jax.scheduling.forks import Queue
from aqua_jax.scheduling.guard import Guard
from aqua_jax.scheduling.holdings import Found, Holdings
from aqua_jax.scheduling.limits import SchedulerConfig, SchedulerCounters, check_request
from aqua_jax.scheduling.plan import Draft, Plan
from aqua_jax.scheduling.policies import Policy
from aqua_jax.scheduling.relocation import relocate
from aqua_jax.scheduling.room import Room
from aqua_jax.scheduling.sequence import Sequence, Status
from aqua_jax.scheduling.slots import Slots
from aqua_jax.scheduling.steady import Coast, holds


class Scheduler:
    """Sequences in, plans out. Knows pages, slots and budgets; the policy knows the order."""

    def __init__(
        self,
        config: SchedulerConfig,
        policy: Policy,
        pool: PagePool,
        prefix: PrefixCache | None = None,
        residency: Residency | None = None,
        costs: Costs | None = None,
    ) -> None:
        """
        Args:
          config: limits.
          policy: who comes first.
          pool: pages.
          prefix: a cache over the same pool; None turns prefix caching off.
          residency: stores below the same pool; None: whoever gives way is recomputed.
          costs: what was measured so far; None: nothing was.
        """
        self.config, self.policy, self.pool = config, policy, pool
        self.prefix, self.residency = prefix, residency
        self.costs = costs or Costs(pool.page_tokens)
        self.holdings = Holdings(pool, prefix, residency)
        self.slots = Slots(config.max_num_seqs)
        self.guard = Guard(config.switch_share, self.costs)
        self.room = Room(config, policy, self.holdings, self.costs, self.slots, self.guard)
        self._ahead = Ahead(config, policy, self.holdings, self.costs, self.room)
        keeps = None if residency is None else self.room.keeps
        policy.bind(self.costs, self.room.price, keeps, self.guard)
        self.counters = SchedulerCounters()
        self.foresight = False  # whether plans say how long they hold
        self._chunk_limit = config.max_chunk_tokens or config.max_step_tokens
        self._live: set[Sequence] = set()
        self._new: set[Sequence] = set()  # of these, those that never had a page
        self._running: dict[Sequence, None] = {}
        self._queue = Queue(policy, self._live)

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
        check_request(sequence, self.config, self.pool)
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
        self._new.add(sequence)
        self._queue.push(sequence)

    def plan(self, now: float) -> Plan | None:
        """The next step, or None when nothing can run before a token arrives or one is added."""
        self.room.begin()
        self.policy.begin(now, len(self._running))
        draft, plan = self._draft(now)
        if plan is None and draft.preempted:  # the way is free now, for whoever went or another
            again, plan = self._draft(now)
            if plan is not None:
                plan = dataclasses.replace(
                    plan, preempted=tuple(dict.fromkeys(draft.preempted + again.preempted))
                )
        if plan is not None and self.foresight:
            return dataclasses.replace(plan, holds=holds(self, plan, self._running))
        return plan

    def coast(self, plan: Plan) -> Coast:
        """The steps after a plan just made, as long as they repeat it."""
        return Coast(self, plan, self._running, self._queue.head, self._commit)

    def _draft(self, now: float) -> tuple[Draft, Plan | None]:
        draft = Draft(self.config.max_step_tokens)
        if self.residency is not None:
            self.residency.cancel_unwanted()
            for owner in self.residency.take_failed():
                assert isinstance(owner, Sequence)
                self._lose(owner, draft)
        self._take_turns(draft, now)
        self._serve_running(draft, now)
        if not draft.pages_short:
            self._admit_waiting(draft, now)
        plan = self._commit(draft, now)
        self.pool.release_all(draft.sources)
        return draft, plan

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
        self.holdings.register(sequence)

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
        if self.residency is not None:
            self.residency.abandon()
        for sequence in list(self._running):
            self._preempt(sequence, None)
        for sequence in self._live:
            sequence.num_inflight = 0
            if self.residency is not None:
                self.residency.trim(sequence, len(sequence.tokens) - 1)
        self.pool.forget_cached()

    def waiting_bound(self, run_ahead: int = 1) -> WaitingBound | None:
        """How long a runnable sequence can wait under the present load, in steps; None if the
        policy promises nothing or nobody is live. Looks at every live sequence."""
        moves = 0 if self.residency is None else 2 * self.config.move_steps  # out, and in
        return self.policy.waiting_bound(
            self.config, self.pool, run_ahead + moves, self.room.dearest
        )

    # Stage 0: turns.

    def _take_turns(self, draft: Draft, now: float) -> None:
        unfinished = -1  # prompt tokens that admitted sequences wait to compute; -1: not counted
        growth = 0  # pages the running ones may claim soon
        most = self.counters.switches + self.room.switches
        while (head := self._queue.head(now)) is not None and head not in draft.preempted:
            if self.counters.switches >= most and head.preemptions:
                return  # its turn comes in the next plan
            owed = iter(self.policy.yielding(head, self._running))
            first = next(owed, None)
            if first is None:
                return
            if unfinished < 0:
                if any(sequence.complete for sequence in self._running):
                    return  # what ends now gives its place back in a moment
                unfinished = sum(s.pending for s in self._running if s.pending > 1)
                growth = self.room.growth(self._running)
            found = self.holdings.find(head)
            pending = head.total_len - found.tokens
            if pending > 1 and unfinished >= self.config.max_step_tokens - len(self._running):
                return  # its prompt could not begin in this step
            growth += self.room.growth((head,))
            headroom = self.room.headroom(head, growth)
            demand = self.holdings.demand(head, found)
            others = self.room.newcomers(head, demand, len(self._new))
            victims = self.room.victims(
                head, found, demand, itertools.chain((first,), owed),
                (growth + others, headroom) if others else (headroom,),
            )
            growth -= self.room.growth(victims)
            draining = self.pool.draining > 0
            for victim in victims:
                self._preempt(victim, draft, turn=True)
            self.counters.switches += len(victims)
            # A newcomer that fits goes in here as well, so that the copies which make room for the
            # next one are under way while its prompt is computed.
            if not victims and (headroom or not self.slots.available):
                return
            if head.parent in victims or (victims and draining):
                found = self.holdings.find(head)  # what they shared with it may be gone
            if not self._admit(head, found, draft, growth):
                return
            unfinished += head.pending

    # Stage 1: running sequences.

    def _serve_running(self, draft: Draft, now: float) -> None:
        order = self.policy.running_order(self._running, now)
        runnable = [s for s in order if len(s.tokens) + s.num_inflight < s.max_total_tokens]
        draft.pages_coming = len(runnable) < len(order)
        if self.residency is not None:
            coming = sum(len(s.pages) for s in order if s.complete) if draft.pages_coming else 0
            if arriving := self.residency.awaiting:
                runnable = [s for s in runnable if s not in arriving]
            runnable = self._make_room(runnable, coming, draft)
        size = self.pool.page_tokens
        demands = [len(s.tokens) + s.num_inflight - s.num_computed for s in runnable]
        decodes_to_come = demands.count(1)
        for index, sequence in enumerate(runnable):
            pending = demands[index]
            if pending == 1:
                decodes_to_come -= 1
            if sequence.status is not Status.RUNNING:  # gave way earlier in this plan
                continue
            count = min(pending, draft.budget - decodes_to_come, self._chunk_limit)
            if count > 0 and (
                sequence.num_computed + count <= len(sequence.pages) * size
                or self._grow(sequence, count, draft, runnable, index)
            ):
                draft.add(sequence, count, pending)

    def _make_room(self, runnable: list[Sequence], coming: int, draft: Draft) -> list[Sequence]:
        """Makes sequences go before pages run short, for copying them takes a step or two.

        Args:
          runnable: in the policy's order; those that stay are returned.
          coming: pages of sequences that end in a moment.
          draft: of this plan.
        """
        short = self.room.needs(runnable) - coming - self.holdings.available
        while short > 0 and len(runnable) > 1:
            victim = self.policy.victim(reversed(runnable))
            runnable.remove(victim)
            _, freed = next(self.holdings.freed_by((victim,), ()))
            short -= self.room.needs((victim,)) + freed
            self._preempt(victim, draft)
        return runnable

    def _grow(
        self, sequence: Sequence, count: int, draft: Draft, runnable: list[Sequence], index: int
    ) -> bool:
        """Gives `runnable[index]` the pages of its next `count` tokens; False if it can't run."""
        known = sequence.num_computed + count
        missing = self.pool.pages_for(known) - len(sequence.pages)
        while not self.holdings.extend(sequence, known):
            draft.pages_short = True
            if draft.pages_coming:
                return False
            if draft.awaited + missing <= self.holdings.leaving:
                draft.awaited += missing  # it gets the pages of somebody who has given way
                return False
            unplanned = (runnable[i] for i in range(len(runnable) - 1, index - 1, -1))
            victim = self.policy.victim(s for s in unplanned if s.status is Status.RUNNING)
            self._preempt(victim, draft)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence, draft: Draft | None, turn: bool = False) -> None:
        """Takes pages and slot away. The KV goes to a store, or is recomputed from the tokens.

        Args:
          sequence: running.
          draft: of the present plan; None: the pool's content is gone, and what is in a store
            already is all there is, and nobody's fault.
          turn: whether it is because somebody else's has come.
        """
        computed = sequence.num_computed
        if draft is not None:
            draft.preempted.append(sequence)
            # A copy into one of its pages must not hit the next owner; without it, though, the page
            # is empty.
            if draft.copies.pop(sequence, None) is not None:
                computed -= computed % self.pool.page_tokens
        unsaved = self.holdings.unsaved(sequence, computed)
        sequence.swapped = draft is not None and self.room.swaps(computed, unsaved)
        sequence.switch_price = self.costs.recompute(computed) if draft is not None else 0.0
        keep = 0
        if sequence.swapped:
            keep = computed
            sequence.switch_price = self.costs.swap(computed, unsaved)
            self.counters.swaps += 1
            self.policy.on_service(sequence, price=self.costs.swap(0, unsaved))
        elif draft is None:
            keep = computed - unsaved
        self._send_back(sequence, keep, turn)

    def _lose(self, sequence: Sequence, draft: Draft) -> None:
        """Pages of a sequence did not arrive: it goes back to the queue with those that did."""
        assert self.residency is not None
        sound = self.residency.sound_tokens(sequence)
        sequence.swapped, sequence.switch_price = True, 0.0
        draft.preempted.append(sequence)
        self._send_back(sequence, min(sound, sequence.num_computed))

    def _send_back(self, sequence: Sequence, keep: int, turn: bool = False) -> None:
        """To its place in the queue, with so many of its tokens still computed."""
        sequence.preemptions += 1
        self.counters.preemptions += 1
        self.guard.gave_way(sequence, turn)
        self._vacate(sequence, keep)
        sequence.returned = -1
        sequence.status = Status.WAITING
        self._queue.push(sequence)

    # Stage 2: waiting sequences.

    def _admit_waiting(self, draft: Draft, now: float) -> None:
        growth: int | None = None  # pages the running ones may claim soon
        while draft.budget > 0 and self.slots.available:
            sequence = self._queue.head(now)
            if sequence is None or sequence in draft.preempted:
                return
            if growth is None:
                growth = self.room.growth(self._running)
            growth += self.room.growth((sequence,))
            found = self.holdings.find(sequence)
            if not self._admit(sequence, found, draft, growth):
                draft.refused = sequence, found
                return
            if self.holdings.ready(sequence):
                count = min(sequence.pending, draft.budget, self._chunk_limit)
                draft.add(sequence, count, sequence.pending)

    def _admit(self, sequence: Sequence, found: Found, draft: Draft, growth: int) -> bool:
        """Gives a waiting sequence its slot and the pages of its tokens."""
        room = self.room.headroom(sequence, growth)
        if self.holdings.demand(sequence, found) + room > self.pool.available:
            return False
        slot = self.slots.acquire()
        if slot is None:
            raise SequenceStateError(f"{sequence}: slots changed during a plan")
        copy = self.holdings.take(sequence, found)
        if copy is not None and found.source is not None:
            draft.copies[sequence] = copy
            self.pool.retain(found.source)
            draft.sources.append(found.source)
        self.policy.remove(sequence)
        self._running[sequence] = None
        self._new.discard(sequence)
        sequence.status = Status.RUNNING
        sequence.slot, sequence.epoch = slot
        self.holdings.count_hit(sequence)
        self.counters.recomputed_tokens += self.guard.came_back(sequence)
        self.policy.admitted(sequence)
        brought = sum(count for home, _, count in found.kept if home is None)
        if found.kept:
            sequence.returned = self.counters.plans
        if brought:
            self.policy.on_service(sequence, price=self.costs.swap(brought, 0))
        return True

    # Stage 3: commit.

    def _commit(self, draft: Draft, now: float) -> Plan | None:
        moves: tuple[Move, ...] = ()
        if self.residency is not None:
            head, (refused, found) = self.policy.head(now), draft.refused
            self._ahead.begin(head, found if head is refused else None, self._running)
            moves = self.residency.take_moves(self.config.max_moves)
        if not draft.chunks and not moves:
            return None
        copies = list(draft.copies.values())
        moved = relocate(self.holdings, self.room, self._running, copies) if draft.chunks else ()
        num_tokens = self.config.max_step_tokens - draft.budget
        register, size = self.holdings.register, self.pool.page_tokens
        serve = None if self.policy.timeless else self.policy.on_service
        for sequence, _, count, sample in draft.chunks:
            if sequence.returned >= 0:
                self.costs.observe_return(self.counters.plans - sequence.returned)
                sequence.returned = -1
            sequence.num_computed += count
            if sample:
                sequence.num_inflight += 1
            if sequence.num_computed >= (sequence.num_registered + 1) * size:
                register(sequence)
            if serve is not None:
                serve(sequence, tokens=count)
            if self._queue.num_held and sequence.num_computed >= sequence.prompt_len - 1:
                self._queue.release(sequence)
        plan = Plan(
            self.counters.plans, tuple(draft.chunks), tuple(copies), tuple(draft.preempted),
            num_tokens, moves, moved,
        )
        self.guard.earn(draft.prompt_tokens, num_tokens - draft.prompt_tokens - draft.again)
        self.counters.plans += 1
        self.counters.tokens += num_tokens
        return plan

    # Ends.

    def _vacate(self, sequence: Sequence, keep: int) -> None:
        self.holdings.give_up(sequence, keep=keep)
        self.slots.release(sequence.slot, sequence.epoch)
        del self._running[sequence]
        sequence.slot = sequence.epoch = -1

    def _end(self, sequence: Sequence) -> None:
        if sequence not in self._live:
            raise SequenceStateError(f"{sequence} is not live: ended before, or never added")
        if sequence.status is Status.RUNNING:
            self._vacate(sequence, 0)
        else:
            self._queue.remove(sequence)
        if self.residency is not None:
            self.residency.drop(sequence)
        sequence.status = Status.FINISHED
        self._live.remove(sequence)
        self._new.discard(sequence)
        self._queue.release(sequence)
        self.policy.on_finish(sequence)
