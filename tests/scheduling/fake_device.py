"""A device that executes plans and believes nothing.

Its "KV" of a position is a hash of the salt and all tokens up to that position, which is exactly
what real KV depends on. It reads what a plan says to read, out of the pages that it names, and
compares with what must be there; its "model" is a hash of the KV, so the tokens a sequence gets
are a pure function of salt, prompt and sample, whatever the schedule.
"""

from __future__ import annotations

import collections
import dataclasses
import random
import zlib

from aqua_jax.paging.pages import PageHandle
from aqua_jax.scheduling.plan import Plan
from aqua_jax.scheduling.scheduler import Scheduler
from aqua_jax.scheduling.sequence import Sequence, Status
from tests.scheduling.fake_copies import FakeCopies

STOP = 0  # the token that ends sequences which stop at it
VOCABULARY = 8


def begin(sequence: Sequence) -> int:
    """What precedes position 0. (Not `hash` of bytes, which differs from process to process.)"""
    return zlib.crc32(sequence.salt)


def extend(state: int, token: int) -> int:
    """KV of the next position."""
    return hash((state, token))


def sample(state: int, sample_index: int) -> int:
    """The token that follows."""
    return hash((state, sample_index, 0)) % VOCABULARY


def expected_tokens(sequence: Sequence, stops: bool) -> list[int]:
    """All tokens of a fresh sequence, computed without scheduler and pages."""
    tokens, state = list(sequence.tokens), begin(sequence)
    for token in tokens:
        state = extend(state, token)
    while len(tokens) < sequence.max_total_tokens:
        tokens.append(sample(state, sequence.sample_index))
        state = extend(state, tokens[-1])
        if stops and tokens[-1] == STOP:
            break
    return tokens


@dataclasses.dataclass
class _Step:
    plan: Plan
    tables: list[list[PageHandle]]
    slots: list[int]
    tokens: list[list[int]]  # of each chunk, as far as the host knows them


class FakeDevice:
    """Executes dispatched plans in order, as late as `read` asks for them."""

    def __init__(self, scheduler: Scheduler, rng: random.Random) -> None:
        self._scheduler = scheduler
        self._size = scheduler.pool.page_tokens
        self._rng = rng
        self._queue: collections.deque[_Step] = collections.deque()
        self.copies: FakeCopies | None = None  # for a scheduler with stores
        self.kv: dict[tuple[int, int], int] = {}  # (page id, offset)
        self._written: set[tuple[PageHandle, int]] = set()
        self._last_tokens: dict[int, int] = {}  # by slot
        self.expected: dict[Sequence, list[int]] = {}
        self._states: dict[Sequence, list[int]] = {}

    def expect(self, sequence: Sequence, stops: bool) -> None:
        """Notes what a fresh sequence must become."""
        tokens = expected_tokens(sequence, stops)
        states, state = [], begin(sequence)
        # One step further than the end: a stop is noticed late, when more has been dispatched.
        for token in [*tokens, *self._overshoot(sequence, tokens)]:
            state = extend(state, token)
            states.append(state)
        self.expected[sequence], self._states[sequence] = tokens, states

    def _overshoot(self, sequence: Sequence, tokens: list[int]) -> list[int]:
        more = dataclasses.replace(sequence, tokens=tokens, max_total_tokens=len(tokens) + 4)
        return expected_tokens(more, False)[len(tokens) :]

    def __len__(self) -> int:
        return sum(bool(step.plan.chunks) for step in self._queue)

    def dispatch(self, plan: Plan) -> None:
        """Takes a snapshot of what the engine would send, checking pages and slots."""
        sequences = [chunk.sequence for chunk in plan.chunks]
        pool, slots = self._scheduler.pool, self._scheduler.slots
        writers: set[int] = set()
        for chunk in plan.chunks:
            sequence = chunk.sequence
            assert sequence.status is Status.RUNNING
            assert sequence.total_len <= sequence.max_total_tokens, "past the length stop"
            assert slots.current(sequence.slot, sequence.epoch)
            assert len(sequence.pages) >= pool.pages_for(chunk.start + chunk.count)
            for index, page in enumerate(sequence.pages):
                assert pool.references(page) >= 1
                if (index + 1) * self._size > chunk.start and index * self._size < (
                    chunk.start + chunk.count
                ):
                    # Beside its owner only copies of what it held before.
                    assert pool.references(page) == 1 + self._scheduler.holdings.pins(page)
                    assert page.id not in writers
                    writers.add(page.id)
        assert len({sequence.slot for sequence in sequences}) == len(sequences)
        self._queue.append(_Step(
            plan, [list(s.pages) for s in sequences], [s.slot for s in sequences],
            [c.sequence.tokens[c.start : c.start + c.count] for c in plan.chunks],
        ))

    def read(self) -> list[tuple[Sequence, int]]:
        """Executes the oldest step with chunks, and those before it; returns the sampled tokens."""
        self.hand_over()
        step = self._queue.popleft()
        if self.copies is not None:
            self.copies.hand_over(step.plan.moves)
            self.copies.work()
        copies = list(step.plan.copies)
        self._rng.shuffle(copies)
        for source, target in copies:
            for offset in range(self._size):
                if (source, offset) in self.kv:
                    self.kv[target, offset] = self.kv[source, offset]
        work = list(zip(step.plan.chunks, step.tables, step.slots, step.tokens, strict=True))
        self._rng.shuffle(work)
        for chunk, table, *_ in work:  # before anything is written: no chunk sees another's
            for position in range(chunk.start):
                self._check_read(chunk.sequence, table, position)
        sampled = []
        for chunk, table, slot, known in work:
            sequence, start = chunk.sequence, chunk.start
            tokens = known or [self._last_tokens[slot]]
            assert len(tokens) == chunk.count
            state = self._at(table, start - 1) if start else begin(sequence)
            for position, token in enumerate(tokens, start):
                state = extend(state, token)
                page, offset = table[position // self._size], position % self._size
                assert (page, offset) not in self._written, "a position is written once"
                self._written.add((page, offset))
                self.kv[page.id, offset] = state
            if chunk.sample:
                token = sample(state, sequence.sample_index)
                self._last_tokens[slot] = token
                sampled.append((sequence, token))
        return sampled

    def hand_over(self) -> None:
        """Executes the oldest steps as long as they are nothing but moves."""
        while self._queue and not self._queue[0].plan.chunks:
            step = self._queue.popleft()
            assert self.copies is not None
            self.copies.hand_over(step.plan.moves)

    def lose_everything(self) -> None:
        """A step fails: what is in flight and what the pool held are gone."""
        self._queue.clear()
        self.kv.clear()
        if self.copies is not None:
            self.copies.lose_everything()

    def _at(self, table: list[PageHandle], position: int) -> int:
        return self.kv[table[position // self._size].id, position % self._size]

    def _check_read(self, sequence: Sequence, table: list[PageHandle], position: int) -> None:
        assert self._at(table, position) == self._states[sequence][position], (
            f"{sequence} reads another's KV at {position}"
        )


class FakeEngine:
    """Drives scheduler and device as the engine does: plan, dispatch, read `run_ahead` late."""

    def __init__(self, scheduler: Scheduler, rng: random.Random, run_ahead: int) -> None:
        self.scheduler = scheduler
        self.device = FakeDevice(scheduler, rng)
        self.run_ahead = run_ahead
        self.stops: dict[Sequence, bool] = {}
        self.ended: dict[Sequence, str] = {}

    def add(self, sequence: Sequence, stops: bool = False) -> None:
        """Accepts a sequence; with `stops` the token STOP ends it."""
        self.device.expect(sequence, stops)
        self.stops[sequence] = stops
        self.scheduler.add(sequence)

    def abort(self, sequence: Sequence) -> None:
        """Ends a live sequence."""
        self.scheduler.abort(sequence)
        self.ended[sequence] = "abort"

    def boundary(self) -> None:
        """What comes before a plan."""
        copies = self.device.copies
        if copies is not None:
            if not len(self.device):
                self.device.hand_over()
            copies.work()
            copies.report()
            copies.respond()

    def step(self) -> Plan | None:
        """One turn of the engine's loop."""
        self.boundary()
        plan = self.scheduler.plan(0.0)
        if plan is not None:
            self.device.dispatch(plan)
        if len(self.device) > (self.run_ahead if plan is not None else 0):
            self._take_in()
        return plan

    def recover(self) -> None:
        """A step has failed: start over from tokens, and from what is in stores."""
        self.device.lose_everything()
        self.scheduler.reset()

    def _take_in(self) -> None:
        for sequence, token in self.device.read():
            if sequence.status is Status.FINISHED:
                continue
            self.scheduler.accept(sequence, token)
            expected = self.device.expected[sequence]
            assert sequence.tokens == expected[: len(sequence.tokens)]
            if self.stops[sequence] and token == STOP:
                self._finish(sequence, "stop")
            elif len(sequence.tokens) == sequence.max_total_tokens:
                self._finish(sequence, "length")

    def _finish(self, sequence: Sequence, why: str) -> None:
        assert sequence.tokens == self.device.expected[sequence]
        self.scheduler.finish(sequence)
        self.ended[sequence] = why

    def drain(self) -> None:
        """Reads what is still in flight."""
        while len(self.device):
            self._take_in()
