"""A coordinator process and clients of it."""

import os
import signal
import stat
import subprocess
import sys
import threading
import time
import urllib.request

import pytest

from aqua_jax.coordinator import messages_pb2 as messages
from aqua_jax.coordinator.report import table
from aqua_jax.errors import CoordinatorError, LedgerError, StaleHandleError, StoreError
from aqua_jax.memory.arena import PAGE, Arena
from aqua_jax.memory.client import Client
from aqua_jax.memory.stores import PeerStore
from tests.coordinator.running import coordinator
from tests.faults.processes import ROOT
from tests.memory.leftovers import leftovers
from tests.memory.lending import new_name, wait_for

MIB = 1 << 20


def test_a_lease_from_beginning_to_end(running, lent):
    with leftovers() as left:
        with Client(running.path, name="one") as client:
            (loan,) = client.borrow(3 * MIB - 5)
            assert loan.size == 3 * MIB and loan.alive and not loan.wanted_back
            assert (loan.lender, loan.bandwidth_cap, loan.terms.name) == ("lender", 10**6, "test")
            assert loan.read(0, loan.size) == bytes(loan.size)
            loan.write(0, b"mine")
            assert lent.arena.read(loan.arena and 0, 4) == b"mine", "it is the lender's memory"
            assert running.held() == 3 * MIB
            loan.give_back(MIB, 2 * MIB)
            wait_for(lambda: running.held() == MIB)
            loan.close()
            wait_for(lambda: running.held() == 0)
            with pytest.raises(StaleHandleError):
                loan.read(0, 1)
        wait_for(lambda: not left(), "gRPC closes what it had open a moment later")


def test_nobody_sees_what_others_wrote(running, lent):
    with Client(running.path) as one, Client(running.path) as two:
        for byte in (b"a", b"b"):
            (loan,) = one.borrow(8 * MIB)
            assert loan.read(0, 8 * MIB) == bytes(8 * MIB)
            loan.write(0, byte * 8 * MIB)
            loan.close()
        wait_for(lambda: running.held() == 0)
        (loan,) = two.borrow(8 * MIB)
        assert loan.read(0, 8 * MIB) == bytes(8 * MIB)


def test_what_there_is_no_room_for(running, lent):
    with Client(running.path) as client:
        assert client.borrow(9 * MIB) is None
        (loan,) = client.borrow(9 * MIB, minimum=MIB)
        assert loan.size == 8 * MIB and client.borrow(PAGE) is None
        loan.give_back(MIB, MIB)
        loan.give_back(4 * MIB, 2 * MIB)
        assert client.borrow(3 * MIB) is None
        pieces = client.borrow(3 * MIB, pieces=2, unit=MIB)
        assert sorted(piece.size for piece in pieces) == [MIB, 2 * MIB]
        assert len(client.loans) == 3


def test_reclaim_reaches_the_step_loop_as_a_flag(running, lent):
    with Client(running.path) as client:
        (loan,) = client.borrow(6 * MIB)
        assert not client.wanted
        assert lent.reclaim(5 * MIB, 30.0) == MIB
        wait_for(lambda: client.wanted)
        assert loan.wanted_back == MIB and loan.deadline - time.monotonic() < 30.0
        loan.give_back(loan.held.total - loan.wanted_back, loan.wanted_back)
        assert not client.wanted and not loan.wanted_back
        wait_for(lambda: lent.news and lent.lent == 5 * MIB)
        assert sum(end - start for start, end in lent.take_returned()) == 3 * MIB
        assert not lent.news and lent.take_returned() == []
        # It lends on what came back.
        lent.lend(5 * MIB, 3 * MIB)
        wait_for(lambda: running.status().arenas[0].free == 3 * MIB)
        with pytest.raises(LedgerError):
            lent.lend(0, PAGE)


def test_a_reclaim_that_is_taken_back(running, lent):
    with Client(running.path) as client:
        (loan,) = client.borrow(8 * MIB)
        lent.reclaim(0, 30.0)
        wait_for(lambda: client.wanted and loan.wanted_back == 8 * MIB)
        lent.reclaim(8 * MIB, 30.0)
        wait_for(lambda: not client.wanted)
        assert loan.deadline is None
        with pytest.raises(LedgerError):
            lent.resize(7 * MIB)


def test_a_peer_store_over_a_loan(running, lent):
    with Client(running.path) as client:
        (loan,) = client.borrow(2 * MIB, unit=96 << 10)
        with PeerStore(loan, 96 << 10, 16) as store:
            slots = store.allocate(store.capacity)
            for slot in slots:
                store.fill(slot, 16)
            lent.reclaim(lent.lent - 6 * MIB - MIB, 3.0)
            wait_for(lambda: client.wanted)
            assert store.wanted_slots > 0
            store.give_back(store.wanted_slots)
            assert not client.wanted and store.wanted_slots == 0
            assert store.holds(slots[0]) and not store.holds(slots[-1])


def test_lenders_and_borrowers_in_one_client(running):
    with Arena.create(MIB) as one, Arena.create(MIB) as two:
        with Client(running.path, name="a") as a, Client(running.path, name="b") as b:
            a.lend(one), b.lend(two)
            (from_b,), (from_a,) = a.borrow(MIB), b.borrow(MIB)
            assert from_b.lender == "b" and from_a.lender == "a"
            from_b.write(0, b"x")
            assert two.read(0, 1) == b"x"


def test_a_lender_that_leaves_takes_its_loans_with_it(running):
    with Client(running.path) as client:
        with Arena.create(MIB) as arena, Client(running.path) as lender:
            lender.lend(arena)
            (loan,) = client.borrow(MIB)
        wait_for(lambda: not loan.alive)
        loan.write(0, b"harmless")
        with pytest.raises(StaleHandleError):
            loan.read(0, 1)
        loan.close()


def test_scrubbed_memory_comes_back_zeroed(running):
    with Arena.create(MIB) as arena, Client(running.path) as lender:
        lending = lender.lend(arena, scrub=True)
        with Client(running.path) as client:
            (loan,) = client.borrow(MIB)
            loan.write(0, b"secret" * 1000)
        lending.reclaim(0, 1.0)
        wait_for(lambda: lending.lent == 0)
        assert arena.read(0, MIB) == bytes(MIB)


def test_a_lender_may_keep_parts_to_itself(running):
    with Arena.create(4 * MIB) as arena, Client(running.path) as lender:
        arena.write(0, b"own" * 100)
        lending = lender.lend(arena, [(MIB, 2 * MIB)])
        with Client(running.path) as client:
            assert client.borrow(2 * MIB) is None
            (loan,) = client.borrow(MIB)
            loan.write(0, b"x" * MIB)
        assert arena.read(0, 300) == b"own" * 100
        lending.close()


def test_the_table_says_who_lends_and_who_holds(running, lent, capsys):
    from aqua_jax.cli.main import main

    with Client(running.path, name="holder") as client:
        client.borrow(MIB), client.borrow(2 * MIB)
        lent.reclaim(MIB, 5.0)
        assert main(["coordinator", "--status", f"--socket={running.path}"]) == 0
    text = capsys.readouterr().out
    assert "lender" in text and "holder" in text and str(os.getpid()) in text
    assert "2 MiB wanted back, within" in text and "test" in text
    assert text.splitlines()[0].startswith("up ")


def test_the_table_has_a_line_for_each_process_however_many_its_parts_are():
    now = {"name": "engine 7", "lender": "engine 7", "pid": 7, "kind": "host", "lent": 4 * MIB}
    held = {"holder": "consumer", "pid": 8, "held": 4 * MIB}
    reply = messages.StatusReply(
        term_ms=10_000, up_ms=90_000,
        arenas=[
            *(messages.ArenaRow(arena=n, held=4 * MIB, **now) for n in range(3)),
            messages.ArenaRow(arena=3, held=4 * MIB, wanted=4 * MIB, **now),
            messages.ArenaRow(arena=9, lender="l", pid=9, kind="host", lent=MIB, free=MIB),
        ],
        leases=[
            *(messages.LeaseRow(arena=n, age_ms=1000 * n, **held) for n in range(3)),
            messages.LeaseRow(arena=3, age_ms=500, wanted=4 * MIB, deadline_ms=-1500, **held),
            messages.LeaseRow(arena=9, holder="z", pid=5, held=PAGE, quarantined=True),
        ],
        clients=[messages.ClientRow(name="z", pid=5, state="quarantined", held=PAGE)],
    )
    assert table(reply).splitlines() == [
        "up 1.5 min, 1 clients, term 10.0 s",
        "",
        "ARENA     LENDER    PID  KIND  WHERE  PARTS  LENT    FREE   ZEROING  HELD    WANTED",
        "engine 7  engine 7  7    host  -      4      16 MiB  0 B    0 B      16 MiB  4 MiB",
        "9         l         9    host  -      1      1 MiB   1 MiB  0 B      0 B     0 B",
        "",
        "HOLDER    PID  HOLDS   OF        PARTS  SINCE  STATE",
        "consumer  8    12 MiB  engine 7  3      2.0 s  held",
        "consumer  8    4 MiB   engine 7  1      0.5 s  4 MiB wanted back, late by 1.5 s",
        "z         5    4 KiB   9         1      0.0 s  quarantined",
        "",
        "CLIENT  PID  STATE        LENDS  HOLDS",
        "z       5    quarantined  0 B    4 KiB",
    ]


def test_metrics(running, lent):
    said = next(line for line in running.process.lines if "metrics at" in line)
    with Client(running.path, name="m") as client:
        client.borrow(MIB)
        with urllib.request.urlopen(said.split()[-1], timeout=60) as page:
            text = page.read().decode()
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
    assert float(values["aqua_coordinator_grants_total"]) >= 1
    held = [v for k, v in values.items() if 'holder="m"' in k and 'state="held"' in k]
    assert [float(value) for value in held] == [MIB]
    lending = [v for k, v in values.items() if 'lender="lender"' in k and 'state="free"' in k]
    assert [float(value) for value in lending] == [7 * MIB]


def test_a_hung_coordinator_hangs_nobody(lent, running):
    with Client(running.path, timeout_s=0.3) as client:
        (loan,) = client.borrow(2 * MIB)
        running.signal(signal.SIGSTOP)
        try:
            took = []
            for quarter in range(4):
                start = time.perf_counter()
                for _ in range(100):
                    assert loan.alive and not client.wanted and not loan.wanted_back
                loan.write(0, b"x" * MIB)
                loan.give_back(MIB + quarter * MIB // 4, MIB // 4)
                took.append(time.perf_counter() - start)
            assert min(took) < 0.3, "it waited each time"
            with pytest.raises(CoordinatorError):
                client.borrow(MIB)
        finally:
            running.signal(signal.SIGCONT)
        wait_for(lambda: running.held() == MIB, "the late grant came back as well")
        assert loan.alive and loan.read(0, 1) == b"x"


def test_sockets_are_their_owners_alone(tmp_path):
    path = str(tmp_path / "socket")
    with coordinator(path) as running:
        for name in (path, f"{path}.fd"):
            mode = os.stat(name).st_mode
            assert stat.S_ISSOCK(mode) and stat.S_IMODE(mode) == 0o600
        with Client(path):
            pass
        assert running.stop() == 0
    assert os.listdir(tmp_path) == []


def test_threads_may_borrow_at_once(running, lent):
    with Client(running.path) as client:
        loans: list = []

        def borrow():
            for _ in range(20):
                loans.extend(client.borrow(4 * PAGE) or ())

        threads = [threading.Thread(target=borrow) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(loans) == 160 and len({loan.generation for loan in loans}) == 160
        for number, loan in enumerate(loans):
            loan.write(0, bytes([number]) * loan.size)
        for number, loan in enumerate(loans):
            assert loan.read(0, loan.size) == bytes([number]) * loan.size


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--socket is required"), (["--socket=@x", "--status"], "no coordinator answers"),
        (["--socket=/nowhere/at/all"], "a directory"), (["--socket=" + "x" * 200], "107 bytes"),
        (["--socket=@x", "--term_s=0"], "0.1"), (["--socket=@x", "--forced_reclaim=yes"], "kill"),
    ],
)
def test_wrong_usage_says_what_is_allowed(capsys, arguments, words):
    from aqua_jax.cli.main import main

    assert main(["coordinator", *arguments]) == 2
    captured = capsys.readouterr()
    assert words in captured.err and "Traceback" not in captured.err and not captured.out


def test_nobody_there_is_an_error_that_names_the_socket(capsys, tmp_path):
    from aqua_jax.cli.main import main

    for path, why in ((new_name(), "Connection refused"), (f"{tmp_path}/x", "No such file or")):
        assert main(["coordinator", "--status", f"--socket={path}"]) == 2
        error = capsys.readouterr().err
        assert f"no coordinator answers at {path}: {why}" in error and ".fd" not in error
        with pytest.raises(CoordinatorError) as caught:
            Client(path, timeout_s=0.1)
        assert str(caught.value).startswith(f"no coordinator answers at {path}: {why}")


def test_two_coordinators_do_not_share_a_socket(running):
    with coordinator(new_name()) as other:
        other.process.signal(signal.SIGTERM)
        assert other.process.wait() == 0
    from tests.faults.processes import Process

    second = Process("-m", "aqua_jax.cli.main", "coordinator", f"--socket={running.path}")
    assert second.wait() == 2 and second.said("allowed")
    second.end()


def test_python_arguments_that_are_no_numbers(running, lent):
    with Client(running.path) as client:
        for size in ("1", 1.5, None, 2**70):
            with pytest.raises((StoreError, LedgerError)):
                client.borrow(size)
        for size in (0, -1):
            with pytest.raises(LedgerError):
                client.borrow(size)


@pytest.mark.parametrize(
    ("missing", "arguments"),
    [
        ("grpc", ["coordinator", "--socket=@x"]),
        ("grpc", ["coordinator", "--socket=@x", "--status"]),
        ("grpc", ["lend", "--socket=@x", "--bytes=1MiB"]),
        ("prometheus_client", ["coordinator", "--socket=@x", "--metrics_port=0"]),
    ],
)
def test_missing_packages_are_named(missing, arguments):
    code = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        f"from aqua_jax.cli.main import main; sys.exit(main({arguments!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and "pip install 'aqua-jax[coordinator]'" in done.stderr, done
    assert "Traceback" not in done.stderr
