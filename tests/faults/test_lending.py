"""Lenders and borrowers as real processes, killed and stopped at bad moments."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from aqua_jax.errors import LenderError
from aqua_jax.memory.borrower import Borrower, connect
from aqua_jax.memory.stores import PeerStore
from tests.faults.processes import ROOT, borrower, descriptors, lender, shared_memory
from tests.memory.leftovers import leftovers
from tests.memory.lending import new_name, wait_for
from tests.scale import scaled

MIB = 1 << 20


def lent(path):
    """Bytes the lender at `path` has lent."""
    with Borrower(path) as status:
        return status.status()["lent"]


def test_a_killed_lender_takes_nothing_with_it(tmp_path):
    path = str(tmp_path / "socket")
    with leftovers() as left, lender(path, "8MiB") as process, Borrower(path) as ours:
        store = PeerStore(ours.borrow(8 * MIB), 256 << 10, 16)
        slots = store.allocate(store.capacity)
        for slot in slots:
            store.fill(slot, 16)
        copying = store.lease.address
        process.signal(signal.SIGKILL)
        process.wait()
        wait_for(lambda: store.lost)
        # The copy that was under way ends without harm; what it wrote is a miss.
        store.lease.write(0, b"x" * 8 * MIB)
        assert store.lease.address == copying
        assert not any(store.holds(slot) for slot in slots) and store.allocate(1) is None
        for slot in slots:
            store.free(slot)
        with pytest.raises(LenderError):
            ours.borrow(MIB)
        # Its socket file is stale, and the next lender takes its place.
        with lender(path, "1MiB") as next_one, connect(path, MIB) as again:
            assert again.read(0, MIB) == bytes(MIB)
            again.close()
            next_one.signal(signal.SIGTERM)
            assert next_one.wait() == 0
        store.close()
    assert os.listdir(tmp_path) == []
    assert not left()


def test_a_stopped_lender_stops_nobody_else():
    path = new_name()
    with lender(path, "4MiB") as process, leftovers() as left:
        with Borrower(path, timeout_s=0.5) as ours:
            lease = ours.borrow(2 * MIB)
            process.signal(signal.SIGSTOP)
            lease.write(0, b"x" * 2 * MIB)
            took = []
            for quarter in range(4):
                start = time.perf_counter()
                for _ in range(100):
                    assert lease.alive and not lease.wanted_back
                lease.write(0, b"x" * MIB)
                assert lease.read(MIB - 1, 1) == b"x"
                lease.give_back(MIB + quarter * MIB // 4, MIB // 4)
                took.append(time.perf_counter() - start)
            assert min(took) < 0.5, "it waited each time"
            with pytest.raises(LenderError, match="no answer"):
                ours.borrow(MIB)
            process.signal(signal.SIGCONT)
            wait_for(lambda: ours.status()["lent"] == MIB, "the late grant came back as well")
            assert lease.alive and lease.read(0, 1) == b"x"
        assert not left()
        process.signal(signal.SIGTERM)
        assert process.wait() == 0


def test_a_killed_borrower_gives_back_and_its_bytes_are_seen_by_nobody():
    path = new_name()
    with lender(path, "8MiB") as process, borrower(path, "one") as one:
        idle = descriptors(process.pid)
        assert one.ask("borrow 8388608") == "clean"
        assert one.ask("write 65") == "ok" and one.ask("forever 66") == "ok"
        assert connect(path, MIB) is None
        one.signal(signal.SIGKILL)
        one.wait()
        wait_for(lambda: process.said("(one) exited with 8 MiB"))
        with connect(path, 8 * MIB) as lease:
            assert lease.read(0, 8 * MIB) == bytes(8 * MIB), "somebody else's bytes"
        wait_for(lambda: lent(path) == 0)
        wait_for(lambda: descriptors(process.pid) <= idle, "no descriptor stays")


def test_a_stopped_borrower_keeps_its_memory_until_it_wakes_up():
    """It may be in the middle of a copy: late or not, its range is nobody else's."""
    path = new_name()
    with lender(path, "4MiB", "--drain_s=0.1") as process, borrower(path, "one") as one:
        assert one.ask("borrow 4194304") == "clean"
        one.signal(signal.SIGSTOP)
        process.signal(signal.SIGTERM)
        wait_for(lambda: process.said("(one) is late"))
        time.sleep(0.2)
        assert process.child.poll() is None, "it left with the memory of somebody stopped"
        assert connect(path, 4096) is None
        one.signal(signal.SIGCONT)
        assert one.ask("obey") == "ok"
        assert process.wait() == 0
        assert process.said("everything is back, leaving")
        assert one.ask("alive") == "True" or one.ask("alive") == "False"
        assert shared_memory(one.pid) == 0


def test_a_stopped_borrower_that_is_killed_frees_its_memory():
    path = new_name()
    with lender(path, "4MiB", "--drain_s=0.1") as process, borrower(path) as one:
        assert one.ask("borrow 4194304") == "clean"
        one.signal(signal.SIGSTOP)
        process.signal(signal.SIGTERM)
        wait_for(lambda: process.said("is late"))
        one.signal(signal.SIGKILL)
        assert process.wait() == 0


def test_reclaim_is_honoured_long_before_its_deadline():
    path = new_name()
    with (
        lender(path, "8MiB") as process, borrower(path, "old") as old, borrower(path, "new") as new
    ):
        assert old.ask("borrow 4194304") == "clean" and new.ask("borrow 4194304") == "clean"
        assert old.ask("write 1") == "ok" and new.ask("write 2") == "ok"
        subprocess.run(
            [sys.executable, "-m", "aqua_jax.cli.main", "lend", "--resize", "--bytes=5MiB",
             f"--listen={path}"], check=True, cwd=ROOT,
        )
        start = time.monotonic()
        assert new.ask("obey") == "ok"
        wait_for(lambda: lent(path) == 5 * MIB)
        assert time.monotonic() - start < 9
        assert process.said("asked pid") and process.said("3 MiB within 10.0 s")
        # Only as much as was asked, from the newest; what is left is untouched.
        assert old.ask("wanted") == new.ask("wanted") == "0"
        assert old.ask("same 1") == new.ask("same 2") == "True"
        # Of the lender's memory, three quarters of a borrower's have gone back to the system.
        assert shared_memory(new.pid) == MIB and shared_memory(old.pid) == 4 * MIB


def test_a_second_signal_ends_a_lender_at_once():
    """Memory stays valid for those who have it; only the system gets it back later."""
    path = new_name()
    with lender(path, "4MiB") as process, connect(path, 4 * MIB) as lease:
        process.signal(signal.SIGINT)
        wait_for(lambda: lease.wanted_back == 4 * MIB)
        process.signal(signal.SIGINT)
        assert process.wait() == 130
        wait_for(lambda: not lease.alive)
        lease.write(0, b"harmless")


def test_borrowers_never_overlap():
    """Random borrowing, writing, closing and killing: everyone finds what they wrote, no more."""
    path, rng = new_name(), random.Random(0)
    with contextlib.ExitStack() as stack:
        process = stack.enter_context(lender(path, "16MiB"))
        people = [stack.enter_context(borrower(path, f"b{n}")) for n in range(3)]
        marks, holds = [1, 2, 3], [0, 0, 0]
        for _ in range(scaled(80)):
            who = rng.randrange(3)
            action = rng.choice(["borrow", "borrow", "write", "same", "close", "kill"])
            if action == "borrow" and holds[who] < 4:
                answer = people[who].ask(f"borrow {rng.randrange(1, 4 * MIB)}")
                assert answer in ("clean", "none"), "somebody else's bytes"
                holds[who] += answer == "clean"
                assert people[who].ask(f"write {marks[who]}") == "ok"
            elif action == "write":
                marks[who] = rng.randrange(1, 256)
                assert people[who].ask(f"write {marks[who]}") == "ok"
            elif action == "close" and holds[who]:
                assert people[who].ask("close") == "ok"
                holds[who] -= 1
            elif action == "kill":
                people[who].end()
                people[who] = stack.enter_context(borrower(path, f"b{who}"))
                holds[who] = 0
            for other in range(3):
                assert people[other].ask(f"same {marks[other]}") == "True", "overlap"
        for someone in people:
            someone.end()
        wait_for(lambda: lent(path) == 0)
        with connect(path, 16 * MIB) as everything:
            assert everything.read(0, 16 * MIB) == bytes(16 * MIB)
        process.signal(signal.SIGTERM)
        assert process.wait() == 0


def test_short_lives_leave_no_descriptors():
    path = new_name()
    with lender(path, "4MiB") as process:
        with connect(path, 4096):
            pass
        wait_for(lambda: lent(path) == 0)
        before = descriptors(process.pid)
        with leftovers() as left:
            for _ in range(scaled(60)):
                with connect(path, MIB) as lease:
                    lease.write(0, b"x")
        assert not left()
        wait_for(lambda: descriptors(process.pid) <= before)
        assert lent(path) == 0 and shared_memory(process.pid) == 4 * MIB


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--bytes=1MiB"], "--listen is required"),
        (["--listen=@x"], "--bytes is required"),
        (["--listen=@x", "--bytes=4096TiB"], "the memory available now"),
        (["--listen=@x", "--bytes=zero"], "a size such as"),
        (["--listen=" + "x" * 200, "--bytes=1MiB"], "at most 107 bytes"),
        (["--listen=/dev/null", "--bytes=1MiB"], "no file"),
        (["--listen=@nobody-there", "--bytes=1MiB", "--resize"], "no lender answers"),
        (["--listen=@x", "--bytes=1MiB", "--name=a\nb"], "printable"),
    ],
)
def test_wrong_usage_says_what_is_allowed(capsys, arguments, words):
    from aqua_jax.cli.main import main

    assert main(["lend", *arguments]) == 2
    captured = capsys.readouterr()
    assert words in captured.err and "Traceback" not in captured.err and not captured.out


def test_a_lender_that_nobody_watches_goes_on():
    """Its terminal is gone: status lines go nowhere, and memory is still lent."""
    path = new_name()
    command = [sys.executable, "-m", "aqua_jax.cli.main", "lend", f"--listen={path}"]
    with subprocess.Popen([*command, "--bytes=1MiB"], cwd=ROOT, stderr=subprocess.PIPE) as child:
        try:
            assert path in child.stderr.readline().decode()
            child.stderr.close()
            with connect(path, MIB) as lease:
                lease.write(0, b"x")
            with connect(path, MIB) as lease:
                assert lease.read(0, 1) == b"\0"
            child.send_signal(signal.SIGTERM)
            assert child.wait(60) == 0
        finally:
            child.kill()
