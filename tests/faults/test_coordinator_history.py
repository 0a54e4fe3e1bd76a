"""Random work and random faults; afterwards the histories of all processes are checked.

Every process writes down what it was granted, wrote, read, was asked and gave back
(`history_worker.py`). Meanwhile processes are killed, stopped and woken up, the coordinator too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

from tests.coordinator.running import Running
from tests.faults.processes import ROOT, descriptors
from tests.memory.lending import new_name, wait_for
from tests.scale import scaled

TERM_S = 1.0
# By then a loss has been told: the longest stop of a holder, absence of the coordinator, two terms.
TOLD_S = 10.0
# 5,000 operations in the ordinary suite, 100,000 in `make test-long`, over two tests.
OPERATIONS = 2500 if scaled(1) == 1 else scaled(5000)


@dataclasses.dataclass
class Actor:
    """A process, and where its history is."""

    role: str
    child: subprocess.Popen
    log: pathlib.Path
    stopped_until: float = 0.0

    def lines(self) -> list[dict]:
        """Its history so far, without a line that was cut off."""
        text = self.log.read_text() if self.log.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line[-1] == "\n"]

    def signal(self, number: int) -> None:
        """Sends a signal, if it lives."""
        with contextlib.suppress(ProcessLookupError):
            self.child.send_signal(number)


class Play:
    """All processes of a test, and the one who disturbs them."""

    def __init__(self, folder: pathlib.Path, seed: int, *flags: str) -> None:
        self.folder, self.rng = folder, random.Random(seed)
        self.coordinator = Running(new_name(), f"--term_s={TERM_S}", "--drain_s=0.5", *flags)
        self.coordinator_back = 0.0
        self.coordinator_stopped = 0.0
        self.starts, self.faults = 1, 0
        self.sleeps = 0  # longer than a term
        self.restarts: list[float] = []
        self.actors: list[Actor] = []
        self.dead: list[Actor] = []
        self.words: list[str] = []

    def spawn(self, role: str) -> None:
        """Another process."""
        number = len(self.actors) + len(self.dead)
        log = self.folder / f"{number}-{role}.jsonl"
        child = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.history_worker", role, self.coordinator.path,
             str(log), str(number)],
            cwd=ROOT, stdin=subprocess.PIPE, stderr=open(f"{log}.err", "wb"),
        )
        self.actors.append(Actor(role, child, log))

    def operations(self) -> int:
        """Lines of all histories."""
        return sum(actor.log.read_bytes().count(b"\n") for actor in self.actors + self.dead
                   if actor.log.exists())

    def bury(self, actor: Actor) -> None:
        """Another one takes the place of one that is dead."""
        actor.child.wait(60)
        actor.child.stdin.close()
        self.actors.remove(actor)
        self.dead.append(actor)
        self.spawn(actor.role)

    def disturb(self) -> None:
        """One fault, or none."""
        now = time.monotonic()
        for actor in list(self.actors):
            if actor.stopped_until and now > actor.stopped_until:
                actor.signal(signal.SIGCONT)
                actor.stopped_until = 0.0
            if actor.child.poll() is not None:
                self.bury(actor)
        if self.coordinator_stopped and now > self.coordinator_stopped:
            self.coordinator.signal(signal.SIGCONT)
            self.coordinator_stopped = 0.0
        if self.coordinator_back and now > self.coordinator_back:
            self.words += self.coordinator.process.lines
            self.coordinator.start()
            self.coordinator_back = 0.0
            self.starts += 1
        role = self.rng.choice(["borrow", "borrow", "borrow", "lend"])
        actor = self.rng.choice([actor for actor in self.actors if actor.role == role])
        what = self.rng.choices(
            ["nothing", "kill", "stop", "kill coordinator", "stop coordinator"], [8, 2, 4, 0.5, 0.3]
        )[0]
        away = self.coordinator_back or self.coordinator_stopped
        if what == "kill":
            actor.signal(signal.SIGKILL)
            self.bury(actor)
        elif what == "stop" and not actor.stopped_until:
            actor.signal(signal.SIGSTOP)
            seconds = self.rng.choice([0.05, 0.3, 1.8, 2.5])
            self.sleeps += seconds > TERM_S
            actor.stopped_until = now + seconds
        elif what == "kill coordinator" and not away:
            self.coordinator.process.child.kill()
            self.coordinator.process.child.wait(60)
            self.coordinator_back = now + self.rng.choice([0.0, 0.1, 1.0])
            self.restarts.append(now)
        elif what == "stop coordinator" and not away:
            self.coordinator.signal(signal.SIGSTOP)
            self.coordinator_stopped = now + self.rng.choice([0.1, 1.5])
        else:
            return
        self.faults += 1

    def has_seen_enough(self) -> bool:
        """Whether each kind of fault has happened a few times."""
        lenders = sum(actor.role == "lend" for actor in self.dead)
        borrowers = sum(actor.role == "borrow" for actor in self.dead)
        return min(self.starts, self.sleeps / 2, lenders + 1, borrowers) >= 3

    def calm(self) -> None:
        """Wakes everybody up."""
        for actor in self.actors:
            actor.signal(signal.SIGCONT)
            actor.stopped_until = 0.0
        if self.coordinator_stopped:
            self.coordinator.signal(signal.SIGCONT)
        if self.coordinator_back:
            self.words += self.coordinator.process.lines
            self.coordinator.start()
        self.coordinator_back = self.coordinator_stopped = 0.0

    def end(self) -> None:
        """Ends everything, however it is."""
        self.words += self.coordinator.process.lines
        self.coordinator.process.end()
        for actor in self.actors:
            actor.signal(signal.SIGKILL)
            actor.child.wait(60)
            actor.child.stdin.close()


def check_nobody_saw_wrong(everybody: list[Actor]) -> None:
    """No stale, foreign or unzeroed bytes, no unexpected errors."""
    for actor in everybody:
        bad = [line for line in actor.lines() if line["e"] == "bad"]
        assert not bad, (actor.log.name, bad[:3])
        errors = pathlib.Path(f"{actor.log}.err").read_text()
        assert "Traceback" not in errors, errors[-3000:]


def holdings(everybody: list[Actor]) -> list[tuple]:
    """(arena, start, end, from, until, process): surely held then, by the holder's own words."""
    found = []
    for actor in everybody:
        if actor.role != "borrow":
            continue
        lines = actor.lines()
        held: dict = {}  # (arena, page) -> since
        for line in lines:
            if line["e"] == "granted":
                for page in range(line["s"], line["n"], 4096):
                    assert (line["a"], page) not in held
                    held[line["a"], page] = line["t"]
            elif line["e"] == "gives":
                for page in range(line["s"], line["n"], 4096):
                    since = held.pop((line["a"], page))
                    found.append((line["a"], page, since, line["t"], actor.log.name))
        last = lines[-1]["t"] if lines else 0.0
        found += [(arena, page, since, last, actor.log.name)
                  for (arena, page), since in held.items()]
    return found


def check_nothing_was_granted_twice(everybody: list[Actor]) -> int:
    """At no time did two processes, or a process and the lender, have the same page."""
    spans = holdings(everybody)
    for actor in everybody:
        if actor.role != "lend":
            continue
        lines = actor.lines()
        own: dict = {}
        for line in lines:
            if line["e"] == "returned":
                own |= {(line["a"], page): line["t"] for page in range(line["s"], line["n"], 4096)}
            elif line["e"] == "lends" and "s" in line:
                for page in range(line["s"], line["n"], 4096):
                    since = own.pop((line["a"], page))
                    spans.append((line["a"], page, since, line["t"], actor.log.name))
        spans += [(*place, since, lines[-1]["t"], actor.log.name) for place, since in own.items()]
    spans.sort(key=lambda span: span[:3])
    for before, after in zip(spans, spans[1:], strict=False):
        if before[:2] == after[:2]:
            assert before[3] <= after[2], f"both had it: {before}, {after}"
    return len(spans)


def check_every_loss_was_reported(everybody: list[Actor], dead: list[Actor]) -> int:
    """Whoever held memory of a lender that died was told so, or gave it back, or died soon."""
    died = {}
    for actor in dead:
        if actor.role == "lend":
            lines = actor.lines()
            died |= {line["a"]: lines[-1]["t"] for line in lines if line["e"] == "lends"}
    reported = 0
    for actor in everybody:
        lines = actor.lines()
        if actor.role != "borrow" or not lines:
            continue
        ended = {line["g"] for line in lines if line["e"] in ("gives", "lost")}
        reported += sum(line["e"] == "lost" for line in lines)
        for line in lines:
            if line["e"] == "granted" and line["a"] in died:
                # Who was killed later may have been stopped, or the coordinator away, until then.
                soon = actor in dead and lines[-1]["t"] < died[line["a"]] + TOLD_S
                assert soon or line["g"] in ended, (actor.log.name, line)
    return reported


def slept_through(everybody: list[Actor], restarts: list[float]) -> int:
    """Pages that were held from before a restart of the coordinator until after it."""
    return sum(
        any(since < at < until for at in restarts)
        for _, _, since, until, _ in holdings(everybody)
    )


@pytest.mark.parametrize("forced", ["never", "kill"])
def test_histories(tmp_path, forced):
    before = set(os.listdir("/dev/shm"))
    play = Play(tmp_path, 1 if forced == "kill" else 2, f"--forced_reclaim={forced}")
    try:
        for role in ("lend", "lend", "borrow", "borrow", "borrow", "borrow"):
            play.spawn(role)
        wait_for(lambda: play.operations() > 50, "they work")
        while play.operations() < OPERATIONS or not play.has_seen_enough():
            play.disturb()
            time.sleep(play.rng.random() * 0.1)
        play.calm()
        # Quiet for a while: everything that was lost is reported, everything wanted comes back.
        wait_for(lambda: all(row.state == "connected" for row in play.coordinator.status().clients),
                 "all come back", 30.0)
        time.sleep(3 * TERM_S)
        survivors, dead = list(play.actors), list(play.dead)
        for actor in survivors:
            if actor.role == "borrow":
                actor.child.stdin.close()
                assert actor.child.wait(30) == 0, actor.log.name
        # Two terms after the last death nothing is held any more, and all of it is zeroed.
        wait_for(
            lambda: play.coordinator.held() == 0
            and not any(row.dirty for row in play.coordinator.status().arenas),
            "no orphan bytes", 2 * TERM_S + 10,
        )
        for actor in survivors:
            actor.signal(signal.SIGKILL)
        wait_for(lambda: not play.coordinator.status().clients, "all are forgotten")
        wait_for(lambda: descriptors(play.coordinator.process.pid) < 30, "no descriptors stay")
        assert play.coordinator.stop() == 0
        everybody = survivors + dead
        check_nobody_saw_wrong(everybody)
        spans = check_nothing_was_granted_twice(everybody)
        lost = check_every_loss_was_reported(everybody, dead)
        assert spans > OPERATIONS / 10 and play.faults > 10
        print(f"{play.operations()} operations, {play.faults} faults, {play.starts} coordinators, "
              f"{len(dead)} deaths, {spans} holdings, {lost} losses told, "
              f"{slept_through(everybody, play.restarts)} holdings through restarts")
    finally:
        play.end()
    assert not [line for line in play.words if "Traceback" in line], play.words[-40:]
    assert set(os.listdir("/dev/shm")) == before
