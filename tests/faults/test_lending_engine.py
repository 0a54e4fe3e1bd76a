"""An engine that lends while borrowers die or stop, the coordinator dies, or everything does."""

from __future__ import annotations

import contextlib
import os
import pathlib
import random
import signal
import subprocess

import pytest

from aqua_jax.config import SamplingParams
from aqua_jax.engine.engine import Engine
from tests.coordinator.running import coordinator
from tests.engine.driving import run_all, tiny_engine
from tests.faults.coordinated import borrower
from tests.faults.processes import Process
from tests.memory.lending import new_name, wait_for
from tests.tiny import write_config

# 128 pages of 8 KiB, of which 96 may be lent.
SETTINGS = {
    "kv_cache_tokens": 2048, "lend": "auto", "lend_hold_s": 0.1, "lend_deadline_s": 0.3,
    "deterministic": True,
}
ALL = 96 * 8192


@pytest.fixture(scope="module")
def work() -> list[tuple[list[int], SamplingParams]]:
    """So much that all memory is needed, if it is there."""
    rng = random.Random(5)
    return [
        ([rng.randrange(3, 131) for _ in range(40)],
         SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True))
        for _ in range(24)
    ]


def tokens(outputs) -> list[list[int]]:
    """What requests say."""
    return [output.outputs[0].token_ids for output in outputs]


@pytest.fixture(scope="module")
def expected(work, tmp_path_factory) -> list[list[int]]:
    """The answers of an engine that lends nothing."""
    settings = {k: v for k, v in SETTINGS.items() if not k.startswith("lend")}
    with tiny_engine(tmp_path_factory.mktemp("alone"), **settings) as engine:
        return tokens(run_all(engine, work))


def lending(engine: Engine) -> dict:
    """What is lent, after a look."""
    engine.tend()
    return engine.stats()["lending"]


@contextlib.contextmanager
def lent_engine(folder, path: str):
    """An idle engine that lends all it may."""
    with tiny_engine(folder, coordinator=path, **SETTINGS) as engine:
        wait_for(lambda: lending(engine)["lent"] == 96, "all is lent")
        yield engine


def idle_and_lent_again(engine: Engine) -> None:
    """Waits until it lends everything as in the beginning."""
    wait_for(lambda: lending(engine)["lent"] == 96, "lent again")


def test_a_killed_borrower_leaves_its_pages_to_the_engine(tmp_path, work, expected) -> None:
    path = new_name()
    with coordinator(path), lent_engine(tmp_path, path) as engine, borrower(path) as one:
        for _ in range(16):
            assert one.ask(f"borrow {ALL // 16}") == "clean"
        assert one.ask("write 255") == "ok"
        one.signal(signal.SIGKILL)
        assert tokens(run_all(engine, work)) == expected
        wait_for(lambda: lending(engine)["extents_back"] > 0)
        idle_and_lent_again(engine)


def test_what_a_stopped_borrower_has_stays_away_until_it_wakes(tmp_path, work, expected) -> None:
    path = new_name()
    with coordinator(path, "--term_s=0.5"), lent_engine(tmp_path, path) as engine:
        with borrower(path) as one:
            for _ in range(16):
                assert one.ask(f"borrow {ALL // 16}") == "clean"
            one.signal(signal.SIGSTOP)
            # With what is never lent alone.
            assert tokens(run_all(engine, work)) == expected
            seen = lending(engine)
            assert seen["pages_back"] == 0 and seen["lent"] == 96
            one.signal(signal.SIGCONT)
            assert one.ask("write 255") == "ok"
            # As long as it has need of it: an engine that has become idle wants nothing back.
            params, rounds = SamplingParams(max_tokens=400, ignore_eos=True), 0
            while not lending(engine)["pages_back"] and rounds < 1000:
                if not engine.has_unfinished():
                    engine.add_request(f"more{rounds}", work[0][0], params)
                for _ in range(20):
                    engine.step()
                assert one.ask("obey") == "ok"
                rounds += 1
            assert lending(engine)["pages_back"] > 0
            while engine.has_unfinished():
                engine.step()


def test_while_the_coordinator_is_away_the_engine_goes_on(tmp_path, work, expected) -> None:
    path = new_name()
    with coordinator(path, "--term_s=5") as running, lent_engine(tmp_path, path) as engine:
        wait_for(lambda: sum(row.free for row in running.status().arenas) == ALL)
        running.kill()
        wait_for(lambda: not lending(engine)["connected"])
        assert tokens(run_all(engine, work)) == expected
        seen = lending(engine)
        assert (seen["lent"], seen["lost"], seen["pages_back"]) == (96, 0, 0)
        running.start()
        wait_for(lambda: lending(engine)["connected"])
        assert tokens(run_all(engine, work)) == expected
        wait_for(lambda: lending(engine)["pages_back"] > 0, "what is free comes back")
        idle_and_lent_again(engine)


def alive_with(words: str) -> list[str]:
    """Command lines of processes that mention something."""
    found = []
    for entry in pathlib.Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if entry.name.isdigit() and words in line and int(entry.name) != os.getpid():
                found.append(line)
    return found


def test_killing_everything_leaves_nothing(tmp_path) -> None:
    folder = tmp_path / "sockets"
    folder.mkdir()
    path = str(folder / "coordinator")
    model = write_config(tmp_path / "model")
    shared = set(os.listdir("/dev/shm"))
    command = (
        "-m", "aqua_jax.cli.main", "serve", f"--model={model}", "--load_format=dummy", "--port=0",
        "--kv_cache_tokens=2048", "--warmup=none",
    )
    with coordinator(path) as running, contextlib.ExitStack() as stack:
        producer = Process(*command, "--lend=auto", f"--coordinator={path}", "--lend_hold_s=0.1")
        stack.callback(producer.end)
        consumer = Process(*command, f"--peer={path}")
        stack.callback(consumer.end)
        wait_for(lambda: running.held() > 0, "one engine uses what the other lends")
        everybody = [producer, consumer, running.process]
        for process in everybody:
            process.signal(signal.SIGKILL)
        for process in everybody:
            process.child.wait(60)
    wait_for(lambda: not os.listdir(folder), "sockets are removed")
    wait_for(lambda: not alive_with(path), "no process is left")
    assert set(os.listdir("/dev/shm")) <= shared
    assert not subprocess.run(
        ["find", str(folder)], capture_output=True, text=True, check=True
    ).stdout.splitlines()[1:]
