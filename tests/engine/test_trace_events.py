"""The timeline: what is in it, that tracks nest, that it opens after a kill; what it costs."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import pathlib
import signal
import subprocess
import sys
import types

import pytest

from aqua_jax.engine.trace_events import TraceEvents
from aqua_jax.errors import ConfigError
from aqua_jax.paging.moves import Move
from aqua_jax.paging.pages import PageHandle
from aqua_jax.scheduling.plan import Chunk, Plan
from aqua_jax.scheduling.sequence import Sequence

ROOT = pathlib.Path(__file__).resolve().parents[2]


@dataclasses.dataclass
class Pool:
    in_use: int = 0


@dataclasses.dataclass
class Store:
    name: str
    slot_bytes: int = 1
    capacity: int = 10
    free_slots: int = 10
    lost: bool = False


def read_events(path):
    """Events of a timeline, complete or cut off by a kill."""
    text = pathlib.Path(path).read_text().rstrip().removesuffix("]").rstrip().removesuffix(",")
    return json.loads(text + "]")


def make_sequence(number, prompt=4, **fields):
    return Sequence(number, f"r{number}", list(range(prompt)), 20, **fields)


def make_plan(step_id, chunks=(), preempted=(), moves=()):
    return Plan(
        step_id, tuple(chunks), (), tuple(preempted), sum(one.count for one in chunks),
        tuple(moves),
    )


def record(plan):
    rows = tuple(chunk.sequence for chunk in plan.chunks if chunk.sample)
    return types.SimpleNamespace(step_id=plan.step_id, rows=rows)


def run_step(trace, clock, plan, device_s=0.5):
    began = clock.time
    clock.time += 0.001
    trace.dispatched(plan, began)
    waiting = clock.time
    clock.time += device_s
    trace.taken_in(record(plan), waiting)


class Clock:
    time = 100.0

    def perf_counter(self):
        return self.time


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("aqua_jax.engine.trace_events.time", clock)
    return clock


def nested(events, thread):
    """Slices of a request's track as (depth, name, start, end) after checking that they nest."""
    found, stack = [], []
    for event in [one for one in events if one.get("tid") == thread and one["pid"] == 2]:
        if event["ph"] == "B":
            if stack:
                assert event["ts"] >= stack[-1][1]
            stack.append((event["name"], event["ts"]))
        elif event["ph"] == "E":
            name, start = stack.pop()
            assert event["ts"] >= start
            found.append((len(stack), name, start, event["ts"]))
    assert not stack
    inner = [one for one in found if one[0] == 1]
    for event in [one for one in events if one["ph"] == "X" and one["pid"] == 2]:
        if event["tid"] == thread:
            ends = event["ts"] + event["dur"]
            assert any(start <= event["ts"] + 1e-3 and ends <= end + 1e-3
                       for _, _, start, end in inner), event
    return found


def test_a_request_waits_runs_gives_way_and_ends(tmp_path, clock):
    pool, peer = Pool(3), Store("peer")
    trace = TraceEvents(str(tmp_path / "t.json"), pool, [peer])
    one, other = make_sequence(0, user="ann", weight=2.0), make_sequence(1)
    trace.added(one)
    clock.time += 1
    trace.added(other)
    run_step(trace, clock, make_plan(1, [Chunk(one, 0, 4, True)]))
    run_step(trace, clock, make_plan(2, [Chunk(one, 4, 1, True)]))
    one.swapped = True  # its pages are in a store
    move = Move(PageHandle(1, 1), peer, (0, 1), 0, 5, False)
    peer.free_slots = 9
    run_step(trace, clock, make_plan(3, [Chunk(other, 0, 4, True)], [one], [move]))
    trace.move_finished(move, True)
    back = Move(PageHandle(1, 2), peer, (0, 1), 0, 5, True)
    run_step(trace, clock, make_plan(4, [Chunk(one, 5, 1, True), Chunk(other, 4, 1, True)], (),
                                     [back]))
    trace.move_finished(back, False)
    trace.ended(other, "length")
    trace.ended(one, "stop")
    trace.ended(one, "stop")  # nothing more
    trace.close()
    trace.close()

    text = (tmp_path / "t.json").read_text()
    events = json.loads(text)
    assert events == read_events(tmp_path / "t.json")
    slices = nested(events, 1)
    assert [(depth, name) for depth, name, *_ in slices] == [
        (1, "waiting"), (1, "running"), (1, "swapped out"), (1, "running"), (0, "r0"),
    ]
    # Away exactly while step 3 ran without it: from its start to step 4's.
    steps = {
        event["args"]["step"]: event for event in events
        if event["ph"] == "X" and event["tid"] == 2 and event["pid"] == 1
    }
    _, _, gone, again = slices[2]
    assert gone == pytest.approx(steps[3]["ts"]) and again == pytest.approx(steps[4]["ts"])
    assert [steps[number]["name"] for number in (1, 2, 3, 4)] == [
        "prefill", "decode", "prefill", "decode",
    ]
    assert steps[3]["args"] == {
        "step": 3, "prefill tokens": 4, "decode tokens": 0, "sequences": 1, "preempted": 1,
        "pages out": 1, "pages in": 0, "host us": 1000, "wait us": 500000,
    }
    assert steps[1]["dur"] == pytest.approx(500_000)
    firsts = [event for event in events if event.get("name") == "first token"]
    assert [event["tid"] for event in firsts] == [1, 2]
    asked = next(event for event in events if event.get("name") == "r0")
    assert asked["args"] == {"prompt tokens": 4, "user": "ann", "weight": 2.0, "priority": 0}
    moves = [event for event in events if event["ph"] in "be"]
    assert [(event["name"], event["ph"]) for event in moves] == [
        ("out to peer", "b"), ("out to peer", "e"), ("in from peer", "b"), ("in from peer", "e"),
    ]
    assert moves[1]["args"] == {"failed": 0} and moves[3]["args"] == {"failed": 1}
    counters = [(event["name"], event["args"]) for event in events if event["ph"] == "C"]
    assert ("pool pages", {"in use": 3}) in counters and ("peer pages", {"in use": 1}) in counters
    assert counters.count(("pool pages", {"in use": 3})) == 1  # only what has changed
    assert counters[-1][1]["running"] == 2


def test_running_ahead_keeps_tracks_in_order(tmp_path, clock):
    """Step 2 is dispatched before 1 is read; a sequence that ended at 1 is still in 2."""
    trace = TraceEvents(str(tmp_path / "t.json"), Pool())
    one, other = make_sequence(0), make_sequence(1)
    trace.added(one)
    trace.added(other)
    first = make_plan(1, [Chunk(one, 0, 4, True), Chunk(other, 0, 4, True)])
    second = make_plan(2, [Chunk(one, 4, 1, True)], [other])
    trace.dispatched(first, clock.time)
    clock.time += 0.1
    trace.dispatched(second, clock.time)
    clock.time += 0.4
    trace.taken_in(record(first), clock.time - 0.4)
    trace.ended(one, "stop")
    clock.time += 0.5
    trace.taken_in(record(second), clock.time - 0.5)
    trace.ended(other, "abort")
    trace.close()
    events = read_events(tmp_path / "t.json")
    assert [name for _, name, *_ in nested(events, 1)] == ["waiting", "running", "r0"]
    assert [name for _, name, *_ in nested(events, 2)] == [
        "waiting", "running", "preempted", "r1",
    ]
    steps = [one for one in events if one["ph"] == "X" and one["pid"] == 1 and one["tid"] == 2]
    assert steps[1]["ts"] == pytest.approx(steps[0]["ts"] + steps[0]["dur"])


def test_a_plan_of_moves_only_has_nothing_to_read(tmp_path, clock):
    trace = TraceEvents(str(tmp_path / "t.json"), Pool())
    one, other = make_sequence(0), make_sequence(1)
    trace.added(one)
    trace.added(other)
    run_step(trace, clock, make_plan(1, [Chunk(one, 0, 4, True)]))
    one.swapped = True
    move = Move(PageHandle(1, 1), Store("host"), (0, 1), 0, 4, False)
    trace.dispatched(make_plan(2, (), [one], [move]), clock.time)
    clock.time += 0.1
    trace.move_finished(move, True)
    run_step(trace, clock, make_plan(3, [Chunk(other, 0, 4, True)]))
    trace.ended(one, "abort")
    trace.ended(other, "stop")
    trace.close()
    events = read_events(tmp_path / "t.json")
    assert [name for _, name, *_ in nested(events, 1)] == [
        "waiting", "running", "swapped out", "r0",
    ]
    assert sum(event["ph"] == "e" for event in events) == 1


def test_a_lost_pool_starts_all_anew(tmp_path, clock):
    trace = TraceEvents(str(tmp_path / "t.json"), Pool())
    one = make_sequence(0)
    trace.added(one)
    run_step(trace, clock, make_plan(1, [Chunk(one, 0, 4, True)]))
    move = Move(PageHandle(1, 1), Store("host"), (0, 1), 0, 4, False)
    lost = make_plan(2, [Chunk(one, 4, 1, True)], (), [move])
    trace.dispatched(lost, clock.time)
    trace.reset()
    trace.taken_in(record(lost), clock.time)  # of before: ignored
    trace.move_finished(move, True)
    run_step(trace, clock, make_plan(3, [Chunk(one, 0, 5, True)]))
    trace.ended(one, "length")
    trace.close()
    events = read_events(tmp_path / "t.json")
    assert [name for _, name, *_ in nested(events, 1)] == [
        "waiting", "running", "preempted", "running", "r0",
    ]
    assert sum(event["ph"] == "b" for event in events) == 1 == sum(
        event["ph"] == "e" for event in events
    )
    assert sum(event.get("name") == "first token" for event in events) == 1


def test_names_are_escaped_and_bad_paths_refused(tmp_path, clock):
    trace = TraceEvents(str(tmp_path / "t.json"), Pool())
    trace.added(Sequence(0, 'a "quoted"\n\\ name', [1], 4))
    trace.close()
    assert any(one.get("name") == 'a "quoted"\n\\ name' for one in read_events(tmp_path / "t.json"))
    with pytest.raises(ConfigError, match="trace_events: got"):
        TraceEvents(str(tmp_path / "none" / "t.json"), Pool())


def test_a_full_disk_ends_the_timeline_only(clock):
    trace = TraceEvents("/dev/full", Pool())
    trace.added(make_sequence(0))
    clock.time += 10
    run_step(trace, clock, make_plan(1))
    trace.close()


def test_memory_is_bounded(tmp_path, clock):
    """Ten thousand steps and two thousand requests leave a buffer and nothing else."""
    trace = TraceEvents(str(tmp_path / "t.json"), Pool())
    buffered = 0
    for number in range(2000):
        one = make_sequence(number)
        trace.added(one)
        for _ in range(5):
            run_step(trace, clock, make_plan(number, [Chunk(one, 0, 4, True)]), 0.0001)
            buffered = max(buffered, sum(map(len, trace._file._lines)))
        trace.ended(one, "stop")
    assert buffered < 70_000
    assert not trace._tracks and not trace._steps and not trace._moves
    assert (tmp_path / "t.json").stat().st_size > 1_000_000
    trace.close()


def test_forgotten_and_exited_engines_end_their_file(tmp_path):
    trace = TraceEvents(str(tmp_path / "a.json"), Pool())
    trace.added(make_sequence(0))
    del trace
    gc.collect()
    assert json.loads((tmp_path / "a.json").read_text())
    subprocess.run(
        [sys.executable, "-c", (
            "import sys; sys.path.insert(0, '.');"
            "from aqua_jax.engine.trace_events import TraceEvents;"
            "from tests.engine.test_trace_events import Pool, make_sequence;"
            f"t = TraceEvents({str(tmp_path / 'b.json')!r}, Pool()); t.added(make_sequence(7))"
        )], cwd=ROOT, check=True, timeout=120,
    )
    assert any(one.get("name") == "r7" for one in json.loads((tmp_path / "b.json").read_text()))


def test_a_killed_process_leaves_a_timeline_that_opens(tmp_path):
    path = tmp_path / "t.json"
    child = subprocess.Popen(
        [sys.executable, "-c", (
            "import sys; sys.path.insert(0, '.');"
            "from aqua_jax.engine.trace_events import TraceEvents;"
            "from tests.engine.test_trace_events import *\n"
            f"trace, number = TraceEvents({str(path)!r}, Pool()), 0\n"
            "import time\n"
            "while True:\n"
            "    one = make_sequence(number); number += 1; trace.added(one)\n"
            "    plan = make_plan(number, [Chunk(one, 0, 4, True)])\n"
            "    trace.dispatched(plan, time.perf_counter())\n"
            "    trace.taken_in(record(plan), time.perf_counter()); trace.ended(one, 'stop')\n"
        )], cwd=ROOT,
    )
    try:
        while not path.exists() or path.stat().st_size < 1_000_000:
            assert child.poll() is None
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    assert not path.read_text().rstrip().endswith("]")
    events = read_events(path)
    assert len(events) > 1000 and events[-1]["pid"] in (1, 2)
