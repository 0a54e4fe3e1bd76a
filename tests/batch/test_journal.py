"""The output file: recovered, locked, never spoilt."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aqua_jax.batch.journal import Journal, JournalError, id_digest


def write(path, *items):
    journal = Journal(path)
    for item in items:
        journal.append(item)
    journal.close()


def test_records_are_there_after_flush_and_counted_on_reopening(tmp_path):
    path = tmp_path / "out.jsonl"
    journal = Journal(path)
    journal.append({"id": "a", "text": "é\n"})
    journal.append({"id": None, "error": {"line": 3}})
    journal.append({"id": "batch_req_1", "custom_id": "c", "response": None, "error": {"line": 9}})
    journal.flush()
    assert len(path.read_bytes().splitlines()) == 3
    journal.close()
    journal = Journal(path)
    assert journal.answered.ids == {id_digest("a"), id_digest("c")}
    assert journal.answered.lines == {3}
    assert (journal.answered.records, journal.answered.errors) == (3, 2)
    journal.close()


@pytest.mark.parametrize("cut", range(1, 25, 3))
def test_a_torn_last_line_is_cut(tmp_path, cut):
    path = tmp_path / "out.jsonl"
    write(path, {"id": "a"}, {"id": "b", "text": "something long enough"})
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    write(path, {"id": "c"})
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == ["a", "c"]


@given(st.binary(max_size=40))
def test_a_foreign_file_is_never_touched(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("j") / "notes.txt"
    path.write_bytes(data)
    try:
        Journal(path).close()
    except JournalError as error:
        assert str(path) in str(error)
        assert path.read_bytes() == data
    else:
        # Only what can be the beginning of our own first record may have been cut.
        assert data == path.read_bytes() or data[:5] == b'{"id"'[: len(data)]


@pytest.mark.parametrize(
    "text", ["hello", "hello\n", '{"a": 1}\n', "[]\n", '{"id": [1]}\n', '{"id": null}\n', "1\n"]
)
def test_a_foreign_file_is_refused(tmp_path, text):
    path = tmp_path / "notes.txt"
    path.write_text(text)
    with pytest.raises(JournalError, match="line 1 is no result"):
        Journal(path)
    assert path.read_text() == text


def test_a_second_job_is_locked_out_and_the_lock_goes_with_the_process(tmp_path):
    path = tmp_path / "out.jsonl"
    journal = Journal(path)
    with pytest.raises(JournalError, match="another job is writing"):
        Journal(path)
    journal.close()
    code = "import sys; from aqua_jax.batch.journal import Journal; Journal(sys.argv[1]); print(1)"
    code += "; sys.stdout.flush(); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None and child.stdout.readline() == b"1\n"
        with pytest.raises(JournalError, match="another job is writing"):
            Journal(path)
        child.kill()
    Journal(path).close()


def test_what_cannot_be_an_output_says_so(tmp_path):
    with pytest.raises(JournalError, match="cannot be written"):
        Journal(tmp_path)
    with pytest.raises(JournalError, match="cannot be written"):
        Journal(tmp_path / "missing" / "out.jsonl")
    with pytest.raises(JournalError, match="regular file"):
        Journal("/dev/null")


def test_a_full_disk_ends_the_job_and_leaves_whole_records(tmp_path):
    """RLIMIT_FSIZE stands in for a full disk: writes past it fail."""
    path = tmp_path / "out.jsonl"
    code = """
import resource, signal, sys
from aqua_jax.batch.journal import Journal, JournalError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
journal = Journal(sys.argv[1])
try:
    for index in range(100):
        journal.append({"id": index, "text": "x" * 50})
        journal.flush()
except JournalError as error:
    print(index, error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False
    )
    assert "writing failed" in done.stdout, done.stderr
    failed = int(done.stdout.split()[0])
    assert path.stat().st_size == 1000
    journal = Journal(path)
    assert journal.answered.records == failed > 5
    journal.close()


def test_closing_lets_go_of_the_file(tmp_path):
    path = tmp_path / "out.jsonl"
    write(path)
    with open(path, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert os.path.getsize(path) == 0


@given(st.text(min_size=1, max_size=8).filter(lambda text: text.isprintable()) | st.integers())
def test_any_id_is_found_again(tmp_path_factory, key):
    path = tmp_path_factory.mktemp("ids") / "out.jsonl"
    write(
        path,
        {"id": key, "token_ids": [1], "text": "x"},
        {"id": "batch_req_1", "custom_id": f"c{key}", "response": {"status_code": 200, "body": {}},
         "error": None},
        {"id": "batch_req_2", "custom_id": f"d{key}", "response": {"status_code": 400, "body": {}},
         "error": {"line": 3}},
    )
    journal = Journal(path)
    assert journal.answered.ids == {id_digest(one) for one in (key, f"c{key}", f"d{key}")}
    assert (journal.answered.records, journal.answered.errors) == (3, 1)
    journal.close()
