"""The engine's loop under a virtual clock.

What `Engine.step` does, with a device that only takes time: plan, dispatch, and then, one step
behind, wait for the oldest step's tokens. Steps run one after another; the host's work hides
behind them unless it takes longer. Moves begin with their step and end when their link has carried
them; the first plan after that knows, and before it is made the host waits a moment for pages that
are about to arrive (`Pager.linger`; without that a sequence that came back sat out one more step,
and automatic slices, which follow from that, were twice as long as the engine's). Everything is a
function of the requests, the machine and the policy: there is no randomness and no real time.

Most steps repeat the one before. A plan says for how many steps that can go on (`Plan.holds`), and
the loop skips them: it adds up times, and the scheduler books tokens and pages (`steady.Coast`),
until something arrives or ends or somebody's turn is over. What comes out is the same to the last
bit. Under overload arrivals and ends are a few steps apart, so no more than two of three steps are
skipped.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Sequence as Sequence_
from typing import Protocol

from aqua_jax.bench.open_loop import Run, Sample, Served, sample_due
from aqua_jax.bench.traces import MOONCAKE_BLOCK, TraceRequest
from aqua_jax.errors import SimulationError
from aqua_jax.paging.moves import Move, Store
from aqua_jax.paging.pages import PagePool
from aqua_jax.paging.residency import Residency
from aqua_jax.scheduling.cost import Costs
from aqua_jax.scheduling.limits import SchedulerCounters
from aqua_jax.scheduling.plan import Plan
from aqua_jax.scheduling.scheduler import Scheduler
from aqua_jax.scheduling.sequence import Sequence, Status
from aqua_jax.simulation.cost import StepCost
from aqua_jax.simulation.links import CopyQueue
from aqua_jax.simulation.work import Work, moved_bytes, work_of

RUN_AHEAD = 1  # steps dispatched beyond the one whose tokens the host waits for, as in the engine
_OWN = 1 << 40  # token ids of a request's own from here on: no two requests share one


class SchedulerLike(Protocol):
    """What the loop needs of a scheduler; `scheduling.Scheduler` is one."""

    pool: PagePool
    counters: SchedulerCounters

    @property
    def num_live(self) -> int:
        """Sequences added and not ended."""

    @property
    def num_running(self) -> int:
        """Sequences that have a place in the steps."""

    def add(self, sequence: Sequence) -> None:
        """Queues a new sequence."""

    def plan(self, now: float) -> Plan | None:
        """The next step."""

    def accept(self, sequence: Sequence, token: int) -> None:
        """Takes a token."""

    def finish(self, sequence: Sequence) -> None:
        """Ends a sequence."""


@dataclasses.dataclass
class Outcome:
    """What a simulated run came to.

    Attributes:
      run: every request, and samples of the engine, as a real run has them.
      counters: the scheduler's.
      steps: that ran.
      device_s: time in steps.
      end_s: when the last token came.
      bytes_out, bytes_in: moved from the pool to stores, and back.
      link_s: time that links were busy.
      wait_s: time that steps waited for moves (only under schedulers that make them wait).
    """

    run: Run
    counters: SchedulerCounters
    steps: int
    device_s: float
    end_s: float
    bytes_out: int
    bytes_in: int
    link_s: float
    wait_s: float


@dataclasses.dataclass(frozen=True)
class _Step:
    """A dispatched step."""

    sampled: list[Sequence]  # in the order of their chunks
    work: Work
    begin: float
    end: float


def prompt_of(request: TraceRequest, number: int) -> list[int]:
    """Token ids that are equal where two requests share blocks of their prompts, and nowhere else.

    They stand for a text, and name no word of any vocabulary.
    """
    ids: list[int] = []
    for block in request.blocks:
        if len(ids) >= request.prompt:
            break
        ids += range(block * MOONCAKE_BLOCK, (block + 1) * MOONCAKE_BLOCK)
    own = _OWN + (number << 24)
    ids += range(own, own + max(0, request.prompt - len(ids)))
    return ids[: request.prompt]


class Simulator:
    """One run of one scheduler over one load."""

    def __init__(
        self, scheduler: SchedulerLike, cost: StepCost, requests: Sequence_[TraceRequest], *,
        queue: CopyQueue | None = None, host_s: float = 0.0, run_ahead: int | None = None,
        max_tokens: Sequence_[int] | None = None, skip: bool = True,
    ) -> None:
        """
        Args:
          scheduler: fresh.
          cost: of a step.
          requests: by arrival.
          queue: carries the moves; None: the scheduler plans none.
          host_s: the host's work per step.
          run_ahead: steps dispatched beyond the one waited for; None: what the scheduler says,
            or as the engine.
          max_tokens: of each request, where its output is to end earlier than it might; None: it
            goes on to its limit.
          skip: steps that repeat the one before are not planned one by one.
        """
        self._scheduler = scheduler
        self._cost = cost
        self._queue = CopyQueue((), scheduler.pool.page_tokens) if queue is None else queue
        self._residency: Residency | None = getattr(scheduler, "residency", None)
        self._costs: Costs | None = getattr(scheduler, "costs", None)
        stores = getattr(scheduler, "stores", ())
        if self._residency is not None:
            stores = self._residency.tiers.stores
        self._stores: tuple[Store, ...] = tuple(stores)
        self._coaster: Scheduler | None = None
        if skip and isinstance(scheduler, Scheduler):
            self._coaster = scheduler
            scheduler.foresight = True
        self._steps_wait = bool(getattr(scheduler, "steps_wait_for_moves", False))
        self._host_s = host_s
        if run_ahead is None:
            run_ahead = getattr(scheduler, "run_ahead", RUN_AHEAD)
        self._run_ahead = run_ahead
        self._max_tokens = [one.output for one in requests] if max_tokens is None else max_tokens
        self._served = [Served(request, request.arrival_s) for request in requests]
        self._clock = 0.0
        self._device_free = 0.0
        self._device_s = self._wait_s = 0.0
        self._pending: collections.deque[_Step] = collections.deque()
        self._by_sequence: dict[Sequence, Served] = {}
        self._samples: list[Sample] = []
        self._sent = self._started = self._finished = self._steps = self._taken = 0
        self._tokens = 1 << 60

    def run(self) -> Outcome:
        """Runs the load to its end.

        Raises:
          RequestError: a request can never be served.
          SimulationError: the scheduler has live sequences and nothing that could ever happen.
        """
        served, scheduler = self._served, self._scheduler
        while self._sent < len(served) or scheduler.num_live:
            self._send_due()
            if not scheduler.num_live:
                self._clock = max(self._clock, served[self._sent].due)
                continue
            self._step()
        return Outcome(
            Run(
                served, self._samples, scheduler.pool.num_pages,
                {store.name: store.capacity for store in self._stores},
            ),
            scheduler.counters, self._steps,
            self._device_s, self._clock, self._queue.bytes_out, self._queue.bytes_in,
            self._queue.busy_s, self._wait_s,
        )

    def _send_due(self) -> None:
        served = self._served
        while self._sent < len(served) and served[self._sent].due <= self._clock:
            one = served[self._sent]
            request = one.request
            sequence = Sequence(
                seq_id=self._sent, request_id=str(self._sent),
                tokens=prompt_of(request, self._sent),
                max_total_tokens=request.prompt + self._max_tokens[self._sent], arrival=one.due,
                priority=request.priority, user=request.user, weight=request.weight,
            )
            self._scheduler.add(sequence)
            self._by_sequence[sequence] = one
            one.sent_step = self._taken
            self._sent += 1

    def _step(self) -> None:
        self._linger()
        now = self._clock
        self._report_moves(now)
        plan = self._scheduler.plan(now)
        self._clock += self._host_s
        runs, finished = plan is not None and bool(plan.chunks), self._finished
        if plan is not None:
            self._dispatch(plan)
        if self._pending and (not runs or len(self._pending) > self._run_ahead):
            self._take_in(self._pending.popleft())
        elif plan is None:
            self._idle()
        if (
            plan is not None and plan.holds and self._coaster is not None
            and finished == self._finished
        ):
            self._skip(self._coaster, plan)

    def _dispatch(self, plan: Plan) -> None:
        begin = self._hand_over(plan.moves)
        if plan.chunks:
            work = work_of(plan, self._scheduler.pool.page_tokens)
            self._launch(
                _Step([one.sequence for one in plan.chunks if one.sample], work, begin,
                      begin + self._cost.seconds(work))
            )

    def _hand_over(self, moves: Sequence_[Move]) -> float:
        """Moves begin with a step that begins when the device is free; returns that time."""
        begin = max(self._clock, self._device_free)
        self._queue.hand_over(moves, begin)
        if self._steps_wait and moves:
            ready = max(begin, self._queue.last_end())
            self._wait_s += ready - begin
            begin = ready
        return begin

    def _launch(self, step: _Step) -> None:
        self._device_s += step.end - step.begin
        self._device_free = step.end
        self._steps += 1
        self._pending.append(step)

    def _skip(self, scheduler: Scheduler, plan: Plan) -> None:
        """Runs the steps after `plan`, dispatched, as long as they are the same decodes."""
        served = [self._by_sequence[chunk.sequence] for chunk in plan.chunks]
        first = {chunk.sequence for chunk in plan.chunks}
        # The step whose tokens end a request is taken in as any other.
        left = min(one.request.output - len(one.tokens) for one in served) - 1
        if left <= 0 or not all(one.tokens for one in served) or any(
            len(step.sampled) != len(first) or not first.issuperset(step.sampled)
            for step in self._pending
        ):
            return
        due = math.inf
        if self._sent < len(self._served):
            due = self._served[self._sent].due
        coast, work = scheduler.coast(plan), work_of(plan, scheduler.pool.page_tokens)
        clocks: list[float] = []
        taken = self._taken
        while left and self._clock < due:
            before = self._clock
            self._linger()
            self._report_moves(self._clock)
            if not coast.step(self._clock):
                self._clock = before  # the next plan is yet to wait
                break
            left -= 1
            self._clock += self._host_s
            work = work._replace(
                decode_context=work.decode_context + work.decodes,
                moved_bytes=moved_bytes(coast.moves, scheduler.pool.page_tokens),
            )
            begin = self._hand_over(coast.moves)
            self._launch(_Step(coast.order, work, begin, begin + self._cost.seconds(work)))
            if len(self._pending) > self._run_ahead:
                self._pass(self._pending.popleft())
                coast.accept(self._tokens + 1)
                self._tokens += len(first)
                clocks.append(self._clock)
                self._sample()
        for one in served:
            one.tokens += clocks
            one.steps += range(taken + 1, self._taken + 1)

    def _pass(self, step: _Step) -> None:
        """A step is over, and its tokens are read."""
        self._clock = max(self._clock, step.end)
        self._taken += 1
        if self._costs is not None:
            work = step.work
            self._costs.observe_step(work.prefill_tokens, work.decodes, step.end - step.begin)

    def _take_in(self, step: _Step) -> None:
        self._pass(step)
        clock, scheduler, token = self._clock, self._scheduler, self._tokens
        for sequence in step.sampled:
            if sequence.status is Status.FINISHED:
                continue
            token += 1
            scheduler.accept(sequence, token)
            one = self._by_sequence[sequence]
            self._started += not one.tokens
            one.tokens.append(clock)
            one.steps.append(self._taken)
            if len(one.tokens) >= one.request.output:
                scheduler.finish(sequence)
                self._finished += 1
                del self._by_sequence[sequence]
                sequence.tokens = []  # a long run keeps only what is still needed
        self._tokens = token
        self._sample()

    def _sample(self) -> None:
        """Notes the state, now and then and at the end."""
        clock, scheduler = self._clock, self._scheduler
        ended = self._finished == len(self._served)
        if sample_due(self._samples, clock) or ended:
            self._samples.append(Sample(
                clock, self._sent - self._started, self._sent - self._finished,
                scheduler.pool.in_use, scheduler.num_running,
                {store.name: store.capacity - store.free_slots for store in self._stores},
                self._queue.bytes_out, self._queue.bytes_in,
            ))

    def _idle(self) -> None:
        """Nothing can run: the next thing that happens is a move's end or an arrival."""
        due = math.inf
        if self._sent < len(self._served):
            due = self._served[self._sent].due
        happens = min(self._queue.next_end(), due)
        if happens == math.inf:
            raise SimulationError(
                f"{self._scheduler.num_live} sequences are live at {self._clock:.6g} s and nothing "
                "can run or happen"
            )
        self._clock = max(self._clock, happens)

    def _linger(self) -> None:
        """As the engine's pager: while a step runs, moves into the pool get a moment more."""
        if self._residency is not None and self._costs is not None and self._pending:
            limit = self._clock + self._costs.patience_s
            self._clock = max(self._clock, min(self._queue.last_arrival(), limit))

    def _report_moves(self, now: float) -> None:
        ended = self._queue.ended(now)
        if not ended or self._residency is None:
            return
        for move in ended:
            self._residency.finished(move, True, None)
        if self._costs is not None:
            pages = sum(move.count for move in ended) / self._scheduler.pool.page_tokens
            self._costs.observe_moves(pages, sum(map(self._queue.seconds, ended)))
