"""`aqua-jax batch` as a process: resumed, interrupted, killed, locked."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import time

import pytest

from tests.cli.text_model import ENGINE_FLAGS, ROOT, command, run_command, write_text_model
from tests.scale import at_scale


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    model = write_text_model(tmp_path_factory.mktemp("batch") / "model")
    return [f"--model={model}", *ENGINE_FLAGS, "--max_new_tokens=24", "--ignore_eos",
            "--temperature=1"]


def write_job(path, count, bad=()):
    lines = []
    for index in range(count):
        if index % 3 == 2:
            body = {"messages": [{"role": "user", "content": f"number {index}"}], "n": 2}
            line = {"custom_id": f"c{index}", "url": "/v1/chat/completions", "body": body}
        else:
            line = {"id": f"i{index}", "prompt": f"the fox {index}"}
        lines.append(json.dumps(line))
    lines += bad
    path.write_text("".join(line + "\n" for line in lines))


def answers(path):
    """Answer by id, and the number of records; fails on a torn line."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    said = {}
    for record in records:
        if record.get("custom_id") is not None:
            choices = record["response"]["body"]["choices"]
            said[record["custom_id"]] = [choice["message"]["content"] for choice in choices]
        elif "custom_id" not in record and record["id"] is not None:
            said[record["id"]] = record.get("text")
    return said, len(records)


def test_a_job_with_good_and_bad_lines(flags, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_job(source, 6, ["nonsense", '{"id": "i0", "prompt": "again"}', '{"id": "z", "x": 1}',
                           json.dumps({"id": "long", "prompt": "fox " * 3000})])
    done = run_command("batch", *flags, f"--input={source}", f"--output={target}")
    assert done.returncode == 1 and done.stdout == "", done.stderr
    assert "6 answered, 4 errors" in done.stderr
    said, count = answers(target)
    assert count == 10 and set(said) == {"i0", "i1", "c2", "i3", "i4", "c5", "z", "long"}
    errors = [json.loads(line).get("error") for line in target.read_text().splitlines()]
    fields = {error["line"]: error["field"] for error in errors if error}
    assert fields == {7: "line", 8: "id", 9: "x", 10: "prompt"}
    before = target.read_bytes()
    done = run_command("batch", *flags, f"--input={source}", f"--output={target}")
    assert done.returncode == 1 and target.read_bytes() == before
    assert "0 answered, 0 errors, 10 already there (4 of them errors)" in done.stderr


def wait_for_records(process, path, count):
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if path.exists() and path.read_bytes().count(b"\n") >= count:
            return True
        time.sleep(0.005)
    return False


def test_killed_at_random_moments_each_id_is_answered_once_with_the_same_text(flags, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    whole = tmp_path / "whole.jsonl"
    count = 60
    write_job(source, count)
    arguments = ["batch", *flags, "--max_live_requests=6", f"--input={source}"]
    done = run_command(*arguments, f"--output={whole}")
    assert done.returncode == 0, done.stderr
    draw = random.Random(3)
    kills = 0
    for _ in range(at_scale(2, 30)):
        have = target.read_bytes().count(b"\n") if target.exists() else 0
        with subprocess.Popen(
            command(*arguments, f"--output={target}"), cwd=ROOT, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as process:
            if wait_for_records(process, target, have + 1 + draw.randrange(8)):
                time.sleep(draw.random() * 0.02)
                process.send_signal(signal.SIGKILL)
                kills += 1
            process.wait(60)
    assert kills >= 2
    done = run_command(*arguments, f"--output={target}")
    assert done.returncode == 0, done.stderr
    assert "already there" in done.stderr and f"{count} answered" not in done.stderr
    said, records = answers(target)
    assert records == len(said) == count
    expected, _ = answers(whole)
    assert set(said) == set(expected)
    # Neighbours differ between runs and only --deterministic promises equal bits, but seeds are
    # drawn from ids: at these sizes nearly every answer is the same.
    assert sum(said[key] == expected[key] for key in expected) > 0.8 * count


def test_interrupted_between_steps_it_keeps_what_is_done_and_goes_on(flags, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_job(source, 600)
    arguments = ["batch", *flags, "--max_live_requests=4", f"--input={source}",
                 f"--output={target}"]
    with subprocess.Popen(
        command(*arguments), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        assert wait_for_records(process, target, 2)
        locked = run_command(*arguments)
        assert locked.returncode == 2 and "another job is writing" in locked.stderr
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=60)
        assert process.returncode == 143, error
        assert "the same command goes on" in error and "Traceback" not in error
    before = target.read_bytes()
    assert before.endswith(b"\n")
    done = run_command(*arguments)
    assert done.returncode == 0, done.stderr
    said, records = answers(target)
    assert records == len(said) == 600
    assert target.read_bytes().startswith(before)


def test_files_that_are_no_jobs_are_left_alone(flags, tmp_path):
    source, notes = tmp_path / "in.jsonl", tmp_path / "notes.txt"
    write_job(source, 1)
    notes.write_text("my notes\n")
    done = run_command("batch", *flags, f"--input={source}", f"--output={notes}")
    assert done.returncode == 2 and "no result of a batch job" in done.stderr
    assert notes.read_text() == "my notes\n"
    done = run_command("batch", *flags, f"--input={source}", f"--output={source}")
    assert done.returncode == 2 and "another file than --input" in done.stderr
