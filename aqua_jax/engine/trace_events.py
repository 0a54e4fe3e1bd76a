"""A timeline of the engine for ui.perfetto.dev (or chrome://tracing), written while it runs.

The format is Chrome's trace events as a JSON array, whose closing bracket may be missing
(https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU). Events are
buffered and written in whole lines, so a killed process leaves a timeline that still opens.

Three kinds of tracks. The *engine*: what the host did (planning and dispatching, waiting for the
device) and the device's steps with the tokens in them. A step starts on the device when it has been
dispatched and the one before has ended, and it ends when the host has its tokens: what the host
finds late looks like a longer step. The *requests*: each waits, runs and is away in turn, in the
device's time, with its prompt chunks inside. *Counters*: pages in use of the pool and of each
store, requests by state; besides, page moves from the step they ride with until they are known to
have ended.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import time
import weakref
from collections.abc import Iterable
from typing import Protocol

from absl import logging

from aqua_jax.errors import ConfigError
from aqua_jax.paging.moves import Move, Store
from aqua_jax.scheduling.plan import Plan
from aqua_jax.scheduling.sequence import Sequence

_BUFFER_BYTES = 1 << 16
_FLUSH_EVERY_S = 1.0
_ENGINE, _REQUESTS = 1, 2  # process ids of the timeline
_HOST, _DEVICE = 1, 2  # its thread ids in the engine

WAITING, RUNNING, SWAPPED, PREEMPTED = "waiting", "running", "swapped out", "preempted"


class Pool(Protocol):
    """What is asked of the page pool."""

    @property
    def in_use(self) -> int:
        """Pages that are referred to."""


class Step(Protocol):
    """What is asked of a dispatched step."""

    @property
    def step_id(self) -> int:
        """The plan's."""

    @property
    def rows(self) -> tuple[Sequence, ...]:
        """Sequences that a token was sampled for."""


class _File:
    """Whole lines to a file, some at a time. A full disk ends the timeline, not the engine."""

    def __init__(self, path: str) -> None:
        try:
            # Unbuffered: what a killed process has written ends with a whole line.
            self._file = open(path, "wb", buffering=0)
        except OSError as error:
            raise ConfigError(
                "trace_events", path, f"a file that can be written ({error.strerror})"
            ) from error
        self._path = path
        self._lines: list[str] = ["["]
        self._size = 0
        self._written = time.perf_counter()
        self._broken = False

    def add(self, event: str) -> None:
        """One event, without its comma."""
        self._lines.append(event + ",")
        self._size += len(event)

    def flush_sometimes(self, now: float) -> None:
        """Writes when the buffer is full, or was last written a while ago."""
        if self._size >= _BUFFER_BYTES or now - self._written >= _FLUSH_EVERY_S:
            self.flush()
            self._written = now

    def flush(self) -> None:
        """Writes what there is."""
        if self._lines and not self._broken:
            data = memoryview(("\n".join(self._lines) + "\n").encode())
            try:
                while data:
                    data = data[self._file.write(data) or 0 :]
            except OSError as error:
                self._broken = True
                logging.warning("%s ends early: %s", self._path, error.strerror)
        self._lines, self._size = [], 0

    def close(self) -> None:
        """Ends the array. May be repeated."""
        if self._file.closed:
            return
        # An event without meaning, for the comma before it.
        self._lines.append('{"name":"end","ph":"M","pid":1,"args":{}}\n]')
        self.flush()
        self._file.close()


@dataclasses.dataclass(slots=True)
class _Track:
    """A live sequence on the timeline."""

    state: str = WAITING
    has_token: bool = False


@dataclasses.dataclass(slots=True)
class _Step:
    """A dispatched step whose tokens haven't been read."""

    plan: Plan
    began: float  # planning
    dispatched: float
    away: tuple[tuple[int, str], ...]  # sequences that gave way, and what they are now


@dataclasses.dataclass(eq=False, slots=True)
class _Moves:
    """Moves of one step with the same store and direction."""

    name: str
    number: int
    left: int
    failed: int = 0


class TraceEvents:
    """Writes the timeline of one engine. All methods are called by the engine's thread.

    What is kept in memory: live sequences, dispatched steps, moves under way, and the buffer.
    """

    def __init__(self, path: str, pool: Pool, stores: Iterable[Store] = ()) -> None:
        """
        Args:
          path: of the file; replaced.
          pool: the page pool.
          stores: tiers below it; looked at anew each time, for they come and go.

        Raises:
          ConfigError: the file can't be written.
        """
        self._file = _File(path)
        self._pool, self._stores = pool, stores
        self._names: dict[str, int] = {}  # of stores
        self._start = time.perf_counter()
        self._tracks: dict[int, _Track] = {}
        self._states: dict[str, int] = dict.fromkeys((WAITING, RUNNING, SWAPPED, PREEMPTED), 0)
        self._steps: collections.deque[_Step] = collections.deque()
        self._moves: dict[Move, _Moves] = {}
        self._batches = 0
        self._device_free = 0.0  # when the last step that was read had ended
        self._shown: dict[str, tuple[int, ...]] = {}  # counters as last written
        for process, name in ((_ENGINE, "engine"), (_REQUESTS, "requests")):
            self._name("process_name", process, 0, name)
        self._name("thread_name", _ENGINE, _HOST, "host")
        self._name("thread_name", _ENGINE, _DEVICE, "steps on the device")
        self._file.flush()
        # At exit or when the engine is forgotten, if nobody closed it.
        self._finalizer = weakref.finalize(self, self._file.close)

    # What the engine tells.

    def added(self, sequence: Sequence) -> None:
        """A sequence was accepted and waits."""
        track = sequence.seq_id + 1
        name = sequence.request_id
        if sequence.sample_index:
            name += f"/{sequence.sample_index}"
        details = {
            "prompt tokens": sequence.prompt_len, "user": sequence.user,
            "weight": sequence.weight, "priority": sequence.priority,
        }
        now = time.perf_counter()
        self._name("thread_name", _REQUESTS, track, name)
        self._begin(track, json.dumps(name), now, json.dumps(details))
        self._tracks[sequence.seq_id] = _Track()
        self._states[WAITING] += 1
        self._begin(track, f'"{WAITING}"', now)

    def dispatched(self, plan: Plan, began: float) -> None:
        """A plan has been handed to the device.

        Args:
          plan: what it was.
          began: when planning began, seconds of `time.perf_counter()`.
        """
        now = time.perf_counter()
        away = tuple(
            (one.seq_id, SWAPPED if one.swapped else PREEMPTED)
            for one in plan.preempted
        )
        self._steps.append(_Step(plan, began, now, away))
        self._slice(_ENGINE, _HOST, '"plan and dispatch"', began, now, f'{{"step":{plan.step_id}}}')
        if plan.moves:
            self._moves_began(plan.moves, now)

    def taken_in(self, step: Step, began: float) -> None:
        """The device has ended a step; call before its tokens are given out.

        Args:
          step: steps come in the order they were dispatched.
          began: when the host began to wait for it, seconds of `time.perf_counter()`.
        """
        now = time.perf_counter()
        while self._steps and self._steps[0].plan.step_id < step.step_id:
            self._leave(self._steps.popleft())  # only moves: there was nothing to read
        if not self._steps or self._steps[0].plan.step_id != step.step_id:
            return  # dispatched before a reset
        known = self._steps.popleft()
        start = self._leave(known)
        self._device_free = now
        prefill = self._chunks(known.plan, start, now)
        for sequence in step.rows:
            track = self._tracks.get(sequence.seq_id)
            if track is not None and not track.has_token:
                track.has_token = True
                self._instant(sequence.seq_id + 1, "first token", now)
        self._slice(_ENGINE, _HOST, '"wait"', began, now, f'{{"step":{step.step_id}}}')
        self._step(known, start, now, prefill, now - began)
        self._counters(now)
        self._file.flush_sometimes(now)

    def ended(self, sequence: Sequence, reason: str) -> None:
        """A sequence is finished, aborted or failed."""
        track = self._tracks.pop(sequence.seq_id, None)
        if track is None:
            return
        now = time.perf_counter()
        self._states[track.state] -= 1
        number = sequence.seq_id + 1
        self._instant(number, f"finished: {reason}", now)
        self._end(number, now)
        output = len(sequence.tokens) - sequence.prompt_len
        self._end(
            number, now,
            f'{{"output tokens":{output},"preemptions":{sequence.preemptions}}}',
        )

    def move_finished(self, move: Move, ok: bool) -> None:
        """A planned move has ended."""
        batch = self._moves.pop(move, None)
        if batch is None:
            return
        batch.left -= 1
        batch.failed += not ok
        if not batch.left:
            self._async("e", batch, time.perf_counter(), f'{{"failed":{batch.failed}}}')

    def reset(self) -> None:
        """The pool was lost: dispatched steps and moves never end, what ran starts anew."""
        now = time.perf_counter()
        self._steps.clear()
        for batch in dict.fromkeys(self._moves.values()):
            self._async("e", batch, now, '{"lost":1}')
        self._moves.clear()
        for number, track in self._tracks.items():
            if track.state != WAITING:
                self._change(number, track, PREEMPTED, now)

    def close(self) -> None:
        """Ends the file. May be repeated."""
        self._finalizer()

    # Events.

    def _time(self, at: float) -> str:
        """Microseconds since the start, to the nanosecond."""
        return f"{(at - self._start) * 1e6:.3f}"

    def _name(self, kind: str, process: int, thread: int, name: str) -> None:
        self._file.add(
            f'{{"name":"{kind}","ph":"M","pid":{process},"tid":{thread},'
            f'"args":{{"name":{json.dumps(name)}}}}}'
        )

    def _begin(self, thread: int, name: str, at: float, details: str = "{}") -> None:
        self._file.add(
            f'{{"name":{name},"ph":"B","pid":{_REQUESTS},"tid":{thread},'
            f'"ts":{self._time(at)},"args":{details}}}'
        )

    def _end(self, thread: int, at: float, details: str = "{}") -> None:
        self._file.add(
            f'{{"ph":"E","pid":{_REQUESTS},"tid":{thread},"ts":{self._time(at)},'
            f'"args":{details}}}'
        )

    def _slice(
        self, process: int, thread: int, name: str, start: float, end: float, details: str
    ) -> None:
        self._file.add(
            f'{{"name":{name},"ph":"X","pid":{process},"tid":{thread},"ts":{self._time(start)},'
            f'"dur":{max(0.0, end - start) * 1e6:.3f},"args":{details}}}'
        )

    def _instant(self, thread: int, name: str, at: float) -> None:
        self._file.add(
            f'{{"name":"{name}","ph":"i","s":"t","pid":{_REQUESTS},"tid":{thread},'
            f'"ts":{self._time(at)}}}'
        )

    def _async(self, phase: str, batch: _Moves, at: float, details: str) -> None:
        self._file.add(
            f'{{"name":"{batch.name}","cat":"moves","ph":"{phase}","id":{batch.number},'
            f'"pid":{_ENGINE},"tid":{_DEVICE},"ts":{self._time(at)},"args":{details}}}'
        )

    # Inside.

    def _leave(self, step: _Step) -> float:
        """Who gave way for a step; returns when it began on the device."""
        start = max(step.dispatched, self._device_free)
        for number, state in step.away:
            if (track := self._tracks.get(number)) is not None:
                self._change(number, track, state, start)
        return start

    def _change(self, number: int, track: _Track, state: str, at: float) -> None:
        if track.state == state:
            return
        self._states[track.state] -= 1
        self._states[state] += 1
        track.state = state
        self._end(number + 1, at)
        self._begin(number + 1, f'"{state}"', at)

    def _chunks(self, plan: Plan, start: float, end: float) -> int:
        """What each sequence did in a step; returns the prompt tokens (recomputed ones too)."""
        prefill = 0
        for chunk in plan.chunks:
            sequence = chunk.sequence
            track = self._tracks.get(sequence.seq_id)
            is_prefill = chunk.count > 1 or chunk.start < sequence.prompt_len
            if is_prefill:
                prefill += chunk.count
            if track is None:  # ended meanwhile
                continue
            if track.state != RUNNING:
                self._change(sequence.seq_id, track, RUNNING, start)
            if is_prefill:
                self._slice(
                    _REQUESTS, sequence.seq_id + 1, '"prefill"', start, end,
                    f'{{"tokens":{chunk.count},"from":{chunk.start}}}',
                )
        return prefill

    def _step(self, step: _Step, start: float, end: float, prefill: int, waited: float) -> None:
        plan = step.plan
        inward = sum(move.inward for move in plan.moves)
        details = (
            f'{{"step":{plan.step_id},"prefill tokens":{prefill},'
            f'"decode tokens":{plan.num_tokens - prefill},"sequences":{len(plan.chunks)},'
            f'"preempted":{len(plan.preempted)},"pages out":{len(plan.moves) - inward},'
            f'"pages in":{inward},"host us":{(step.dispatched - step.began) * 1e6:.0f},'
            f'"wait us":{waited * 1e6:.0f}}}'
        )
        if prefill == 0:
            name = '"decode"'
        else:
            name = '"prefill"' if prefill == plan.num_tokens else '"prefill and decode"'
        self._slice(_ENGINE, _DEVICE, name, start, end, details)

    def _moves_began(self, moves: Iterable[Move], now: float) -> None:
        groups: dict[tuple[str, bool], list[Move]] = {}
        for move in moves:
            groups.setdefault((move.store.name, move.inward), []).append(move)
        for (store, inward), group in groups.items():
            self._batches += 1
            name = json.dumps(f"in from {store}" if inward else f"out to {store}")[1:-1]
            batch = _Moves(name, self._batches, len(group))
            tokens = sum(move.count for move in group)
            self._async("b", batch, now, f'{{"pages":{len(group)},"tokens":{tokens}}}')
            self._moves.update(dict.fromkeys(group, batch))

    def _counters(self, now: float) -> None:
        self._counter("pool pages", now, {"in use": self._pool.in_use})
        used = dict.fromkeys(self._names, 0)
        for store in self._stores:
            here = 0 if store.lost else store.capacity - store.free_slots
            used[store.name] = used.get(store.name, 0) + here
        self._names |= used  # shown from now on, if only as none
        for name, count in used.items():
            self._counter(f"{name} pages", now, {"in use": count})
        self._counter("requests", now, self._states)

    def _counter(self, name: str, now: float, values: dict[str, int]) -> None:
        key = tuple(values.values())
        if self._shown.get(name) != key:
            self._shown[name] = key
            self._file.add(
                f'{{"name":{json.dumps(name)},"ph":"C","pid":{_ENGINE},"ts":{self._time(now)},'
                f'"args":{json.dumps(values)}}}'
            )
