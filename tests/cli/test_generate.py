"""`aqua-jax generate` as a process, over a tiny model."""

from __future__ import annotations

import contextlib
import io
import json
import signal
import subprocess
import time

import pytest

from aqua_jax.cli.main import main
from aqua_jax.cli.show import JsonSink, TextSink
from aqua_jax.engine.outputs import CompletionOutput, RequestMetrics, RequestOutput
from tests.cli.text_model import ENGINE_FLAGS, ROOT, command, run_command, write_text_model

KEYS = [
    "index", "prompt", "prompt_token_ids", "token_ids", "text", "finish_reason", "logprobs",
    "metrics",
]


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    model = write_text_model(tmp_path_factory.mktemp("generate") / "model")
    return [f"--model={model}", *ENGINE_FLAGS]


def generate(flags, *arguments):
    done = run_command("generate", *flags, *arguments)
    assert done.returncode == 0, done.stderr
    return done


def test_json_has_the_promised_keys_in_the_prompts_order(flags, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        '"a plain string"\n\n{"prompt": "the dog"}\n{"prompt_token_ids": [5, 6]}\n'
        '{"messages": [{"role": "user", "content": "hi"}]}\n'
    )
    done = generate(
        flags, "--prompt=first", f"--prompts_file={path}", "--json", "--max_new_tokens=4",
        "--logprobs=2", "--ignore_eos",
    )
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert [record["index"] for record in records] == [0, 1, 2, 3, 4]
    assert [record["prompt"] for record in records] == [
        "first", "a plain string", "the dog", None, "<|user|>hi\n<|assistant|>",
    ]
    for record in records:
        assert list(record) == KEYS
        assert set(record["metrics"]) == {"ttft_s", "tpot_s", "e2e_s"}
        assert len(record["token_ids"]) == len(record["logprobs"]) == 4
        assert record["finish_reason"] == "length"
    assert records[3]["prompt_token_ids"] == [5, 6]


def said(capfd, flags, *arguments):
    """What it prints, run in this process."""
    status = main(["generate", *flags, *arguments])
    out, err = capfd.readouterr()
    assert status == 0, err
    return out


def test_text_streamed_or_not_is_the_same(flags, capfd):
    arguments = ["--prompt=the fox", "--prompt=a dog", "--n=2", "--temperature=1", "--seed=3",
                 "--max_new_tokens=12"]
    plain = said(capfd, flags, *arguments)
    assert said(capfd, flags, *arguments, "--stream") == plain
    headings = [line for line in plain.splitlines() if line.startswith("[")]
    assert headings[0] == "[1/2] the fox (answer 1 of 2)"
    assert headings[-1] == "[2/2] a dog (answer 2 of 2)"
    chat = ["--prompt=the fox", "--max_new_tokens=5", "--chat", "--system=be kind"]
    assert not said(capfd, flags, *chat).startswith("[1/1]")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": 3}', "line 1: prompt: got 3"),
        ("not json", "line 1: line: got 'not json'"),
        ('{"messages": []}', "line 1: messages: got []"),
        ('{"messages": [{"role": "user", "content": "a"}], "n": 2}', "line 1: n: got 2"),
        ("[1, 2]", "a JSON string or object"),
    ],
)
def test_a_bad_prompts_file_names_line_and_field(flags, tmp_path, line, words, capsys):
    path = tmp_path / "bad.jsonl"
    path.write_text(line + "\n")
    assert main(["generate", *flags, f"--prompts_file={path}"]) == 2
    assert words in capsys.readouterr().err


def test_a_prompt_too_long_is_refused_before_any_work(flags, capfd):
    assert main(["generate", *flags, "--prompt=ok", "--prompt=" + "x " * 3000]) == 2
    out, err = capfd.readouterr()
    assert out == "" and "--prompt number 2: prompt: got" in err


@contextlib.contextmanager
def streaming(flags):
    """A process in the midst of a long answer: its first byte has been read."""
    with subprocess.Popen(
        command("generate", *flags, "--prompt=x", "--max_new_tokens=1900", "--ignore_eos",
                "--stream"),
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout.read(1)
        yield process


def test_ctrl_c_is_clean(flags):
    with streaming(flags) as process:
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
        assert process.returncode == 130
    assert b"interrupted" in error and b"Traceback" not in error


def test_a_reader_that_goes_away_ends_the_command_quietly(flags):
    with streaming(flags) as process:
        process.stdout.close()
        started = time.monotonic()
        error = process.stderr.read().decode()
        assert process.wait(60) == 141
    assert time.monotonic() - started < 60
    assert "Traceback" not in error and "Exception" not in error


def output(texts, done):
    samples = [
        CompletionOutput(i, text, [1] * len(text), finish_reason="stop" if end else None)
        for i, (text, end) in enumerate(zip(texts, done, strict=True))
    ]
    return RequestOutput("r", "p", [1], samples, all(done), RequestMetrics(0.0))


def test_streamed_text_of_several_prompts_never_mixes():
    file = io.StringIO()
    sink = TextSink(file, ["one", "two"], 2, stream=True)
    sink.update(1, output(["x", "y"], [True, True]))
    assert file.getvalue() == ""
    sink.update(0, output(["ab", "c"], [False, False]))
    assert file.getvalue() == "[1/2] one (answer 1 of 2)\nab"
    sink.update(0, output(["abc", "cd"], [True, False]))
    sink.update(0, output(["abc", "cde"], [True, True]))
    sink.close()
    assert file.getvalue() == (
        "[1/2] one (answer 1 of 2)\nabc\n\n[1/2] one (answer 2 of 2)\ncde\n"
        "\n[2/2] two (answer 1 of 2)\nx\n\n[2/2] two (answer 2 of 2)\ny\n"
    )


def test_json_records_come_in_order_or_as_they_finish():
    for ordered, expected in ((True, [0, 1]), (False, [1, 0])):
        file = io.StringIO()
        sink = JsonSink(file, 2, ordered)
        sink.update(1, output(["x"], [True]))
        sink.update(0, output(["a"], [False]))
        sink.update(0, output(["ab"], [True]))
        sink.close()
        assert [json.loads(line)["index"] for line in file.getvalue().splitlines()] == expected
