"""A coordinator, lenders and borrowers as real processes, killed and stopped at bad moments."""

import os
import pathlib
import signal
import time

import pytest

from aqua_jax.errors import CoordinatorError
from aqua_jax.memory.client import Client
from tests.coordinator.running import coordinator
from tests.faults.coordinated import borrower, lender
from tests.faults.processes import descriptors, shared_memory
from tests.memory.leftovers import leftovers
from tests.memory.lending import new_name, wait_for

MIB = 1 << 20
TERM_S = 1.0
FLAGS = (f"--term_s={TERM_S}", "--drain_s=0.3")


@pytest.fixture
def path():
    """An address of this test alone."""
    return new_name()


def row(running, name):
    """The holder's line of the status."""
    return next((found for found in running.status().clients if found.name == name), None)


def test_a_killed_borrower_frees_its_memory_and_nobody_sees_it(path):
    with coordinator(path, *FLAGS) as running, lender(path, "8MiB"):
        with borrower(path, "one") as one, borrower(path, "two") as two:
            idle = descriptors(running.process.pid)
            assert one.ask("borrow 8388608") == "clean" and one.ask("write 7") == "ok"
            assert two.ask("borrow 4096") == "none"
            one.signal(signal.SIGKILL)
            one.wait()
            wait_for(lambda: running.held() == 0)
            assert two.ask("borrow 8388608") == "clean"
            wait_for(lambda: descriptors(running.process.pid) <= idle)


def test_a_killed_lender_is_reported_and_does_no_harm(path):
    with coordinator(path, *FLAGS) as running, borrower(path) as one:
        with lender(path, "4MiB", "--name=first") as first, lender(path, "4MiB"):
            assert one.ask("borrow 4194304") == one.ask("borrow 4194304") == "clean"
            assert one.ask("write 7") == "ok"
            first.signal(signal.SIGKILL)
            wait_for(lambda: one.ask("alive") == "1", "one of two is lost")
            assert one.ask("write 9") == "ok" and one.ask("same 9") == "True"
            wait_for(lambda: len(running.status().arenas) == 1)
            # Its memory goes back to the system when the loan is closed.
            assert shared_memory(one.pid) == 8 * MIB


def test_while_the_coordinator_is_away_everybody_goes_on(path):
    with coordinator(path, "--term_s=5") as running, lender(path, "8MiB") as lending:
        with borrower(path, "one") as one, borrower(path, "two") as two:
            assert one.ask("borrow 4194304") == two.ask("borrow 2097152") == "clean"
            assert one.ask("write 1") == two.ask("write 2") == "ok"
            running.kill()
            wait_for(lambda: one.ask("connected") == "False")
            wait_for(lambda: lending.said("the coordinator is away"))
            assert one.ask("alive") == "1" and one.ask("same 1") == "True"
            assert one.ask("give_back 1048576") == "ok"
            running.start()
            began = time.monotonic()
            for process in (one, two):
                wait_for(lambda process=process: process.ask("connected") == "True")
            wait_for(lambda: running.held() == 5 * MIB, "the ledger is rebuilt")
            assert time.monotonic() - began < 5
            wait_for(lambda: lending.said("the coordinator is back"))
            assert one.ask("alive") == two.ask("alive") == "1"
            # What is free is lent, and no more.
            assert two.ask("borrow 2097152") == two.ask("borrow 1048576") == "clean"
            assert two.ask("borrow 4096") == "none"
            assert two.ask("write 3") == "ok"
            assert one.ask("same 1") == two.ask("same 3") == "True"
            assert running.held() == 8 * MIB


def test_a_borrower_that_sleeps_through_a_restart_keeps_its_memory(path):
    """Nobody but the journal knows of it; it is quarantined after a term, and wakes up unharmed."""
    with coordinator(path, *FLAGS) as running, lender(path, "4MiB"):
        with borrower(path, "one") as one, borrower(path, "two") as two:
            assert one.ask("borrow 3145728") == "clean" and one.ask("write 1") == "ok"
            one.signal(signal.SIGSTOP)
            running.kill()
            running.start()
            wait_for(lambda: two.ask("connected") == "True" and running.status().arenas)
            wait_for(lambda: row(running, "one").state == "quarantined")
            assert two.ask("borrow 2097152") == "none" and two.ask("borrow 1048576") == "clean"
            assert two.ask("write 2") == "ok"
            one.signal(signal.SIGCONT)
            wait_for(lambda: row(running, "one").state == "connected")
            assert one.ask("alive") == "1" and one.ask("same 1") == "True"
            one.signal(signal.SIGSTOP)
            running.kill()
            one.signal(signal.SIGKILL)  # dies while the coordinator is away
            one.wait()
            running.start()
            wait_for(lambda: two.ask("connected") == "True" and running.held() == MIB)
            assert two.ask("borrow 3145728") == "clean"


def test_a_lender_that_sleeps_through_a_restart_is_lost_and_then_found(path):
    with coordinator(path, *FLAGS) as running, lender(path, "4MiB") as lending:
        with borrower(path, "one") as one:
            assert one.ask("borrow 3145728") == "clean"
            lending.signal(signal.SIGSTOP)
            running.kill()
            running.start()
            wait_for(lambda: one.ask("alive") == "0", "lost after a term")
            lending.signal(signal.SIGCONT)
            wait_for(lambda: running.held() == 3 * MIB, "it comes back with its journal")
            assert one.ask("borrow 2097152") == "none", "still mapped by somebody"
            assert one.ask("close") == "ok"
            wait_for(lambda: running.held() == 0)
            assert one.ask("borrow 4194304") == "clean"


def test_a_stopped_borrower_is_quarantined_and_others_give_back(path):
    with coordinator(path, *FLAGS) as running, lender(path, "4MiB") as lending:
        with borrower(path, "one") as one, borrower(path, "two") as two:
            assert one.ask("borrow 2097152") == two.ask("borrow 2097152") == "clean"
            assert one.ask("write 1") == "ok"
            one.signal(signal.SIGSTOP)
            wait_for(lambda: row(running, "one").state == "quarantined")
            lending.signal(signal.SIGTERM)
            wait_for(lambda: two.ask("wanted") == "2097152")
            assert two.ask("obey") == "ok"
            wait_for(lambda: running.held() == 2 * MIB)
            time.sleep(2 * TERM_S)
            assert lending.child.poll() is None and running.held() == 2 * MIB
            one.signal(signal.SIGCONT)
            assert one.ask("same 1") == "True"
            wait_for(lambda: one.ask("wanted") == "2097152")
            assert one.ask("obey") == "ok"
            assert lending.wait() == 0 and lending.said("everything is back")


def test_forced_reclaim_kills_a_stopped_holder_in_time(path):
    with coordinator(path, *FLAGS, "--forced_reclaim=kill") as running:
        with lender(path, "4MiB", "--scrub") as lending, borrower(path, "one") as one:
            assert one.ask("borrow 4194304") == "clean"
            one.signal(signal.SIGSTOP)
            start = time.monotonic()
            lending.signal(signal.SIGTERM)
            assert lending.wait() == 0
            # Term and drain limit, and what a busy machine adds.
            assert time.monotonic() - start < TERM_S + 0.3 + 8
            assert one.child.wait(60) == -signal.SIGKILL
            assert running.process.said("kills pid")


def test_forced_reclaim_kills_who_does_not_obey_and_nobody_else(path):
    with coordinator(path, *FLAGS, "--forced_reclaim=kill") as running:
        with lender(path, "4MiB") as lending:
            with borrower(path, "one") as one, borrower(path, "two") as two:
                assert one.ask("borrow 2097152") == two.ask("borrow 2097152") == "clean"
                lending.signal(signal.SIGTERM)
                wait_for(lambda: one.ask("wanted") == "2097152")
                assert one.ask("obey") == "ok"
                assert two.child.wait(60) == -signal.SIGKILL
                assert lending.wait() == 0
                assert one.ask("connected") == "True"
                assert running.process.said("held 2048 KiB")


def test_a_coordinator_that_slept_blames_nobody(path):
    with coordinator(path, *FLAGS, "--forced_reclaim=kill") as running:
        with lender(path, "4MiB") as lending, borrower(path, "one") as one:
            assert one.ask("borrow 4194304") == "clean"
            lending.signal(signal.SIGTERM)
            wait_for(lambda: one.ask("wanted") != "0")
            running.signal(signal.SIGSTOP)
            time.sleep(4 * TERM_S)
            running.signal(signal.SIGCONT)
            assert one.ask("obey") == "ok"
            assert lending.wait() == 0
            assert one.ask("connected") == "True"
            assert row(running, "one").state == "connected"


def test_a_lender_that_is_interrupted_twice_leaves_at_once(path):
    with coordinator(path, *FLAGS) as running, borrower(path, "one") as one:
        with lender(path, "4MiB") as lending:
            assert one.ask("borrow 4194304") == "clean"
            lending.signal(signal.SIGINT)
            wait_for(lambda: one.ask("wanted") == "4194304")
            assert lending.child.poll() is None
            lending.signal(signal.SIGINT)
            assert lending.wait() == 130
        wait_for(lambda: one.ask("alive") == "0")
        wait_for(lambda: not running.status().arenas)


def processes_of(path):
    """Processes whose command line names the socket."""
    found = []
    for folder in pathlib.Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            try:
                line = (folder / "cmdline").read_bytes()
            except OSError:
                continue
            if path.encode() in line:
                found.append(int(folder.name))
    return found


def test_kill_minus_nine_of_everything_leaves_nothing(tmp_path):
    path = str(tmp_path / "socket")
    before = set(os.listdir("/dev/shm"))
    with coordinator(path, *FLAGS) as running, lender(path, "8MiB") as lending:
        with borrower(path, "one") as one, borrower(path, "two") as two:
            assert one.ask("borrow 4194304") == two.ask("borrow 2097152") == "clean"
            assert len(os.listdir(tmp_path)) == 2
            for process in (running.process, lending, one, two):
                process.signal(signal.SIGKILL)
            for process in (running.process, lending, one, two):
                process.wait()
            wait_for(lambda: not os.listdir(tmp_path), "no file")
            wait_for(lambda: not processes_of(path), "no process")
            assert set(os.listdir("/dev/shm")) == before


def test_the_next_coordinator_is_left_alone_by_the_janitor_of_the_last(tmp_path):
    path = str(tmp_path / "socket")
    with coordinator(path, *FLAGS) as running:
        for _ in range(3):
            running.process.child.kill()
            running.start()  # at once: both see the old sockets
            running.status()
        assert sorted(os.listdir(tmp_path)) == ["socket", "socket.fd"]
        assert running.stop() == 0
    wait_for(lambda: not os.listdir(tmp_path))


def test_short_lives_leave_no_descriptors(path):
    with coordinator(path, *FLAGS) as running, lender(path, "4MiB"):
        with Client(path) as client:
            client.borrow(4096)
        wait_for(lambda: running.held() == 0)
        before = descriptors(running.process.pid)
        with leftovers() as left:
            for _ in range(15):
                with Client(path) as client:
                    (loan,) = client.borrow(MIB)
                    loan.write(0, b"x")
        wait_for(lambda: not left(), "gRPC closes what it had open a moment later")
        wait_for(lambda: running.held() == 0 and descriptors(running.process.pid) <= before)


def test_a_client_may_come_before_its_coordinator(path):
    with pytest.raises(CoordinatorError):
        Client(path, timeout_s=1.0)
    with Client(path, wait=False) as client:
        assert not client.connected
        with pytest.raises(CoordinatorError):
            client.borrow(4096)
        with coordinator(path, *FLAGS), lender(path, "1MiB"):
            wait_for(lambda: client.connected)
            assert client.borrow(4096) is not None
