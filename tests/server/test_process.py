"""The command as a process: where it listens, and how it ends."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import time
import urllib.request

import pytest

from aqua_jax.cli import main as cli
from tests.cli.text_model import ENGINE_FLAGS, ROOT, command, write_text_model
from tests.server.serving import ask, connect, get, post_bytes, read_response

BODY = {"prompt": "the quick", "max_tokens": 1500, "ignore_eos": True}


@contextlib.contextmanager
def process(folder, *flags):
    """(process, port) of `aqua-jax serve` over a tiny model."""
    if not (folder / "model").exists():
        write_text_model(folder / "model")
    arguments = command(
        "serve", f"--model={folder / 'model'}", "--port=0", *ENGINE_FLAGS, *flags
    )
    with subprocess.Popen(
        arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ},
    ) as running:
        try:
            line = running.stdout.readline()
            assert "http://127.0.0.1:" in line, running.stderr.read()
            yield running, int(line.strip().rpartition(":")[2])
        finally:
            running.kill()


def test_sigterm_lets_requests_end(tmp_path):
    with process(tmp_path) as (running, port):
        with connect(port, 60) as connection, connect(port) as idle:
            connection.sendall(post_bytes("/v1/completions", {**BODY, "stream": True}))
            connection.recv(1, 2)  # MSG_PEEK: the answer has begun
            running.send_signal(signal.SIGTERM)
            status, _, body = read_response(connection)
            assert status == 200 and body.endswith(b"data: [DONE]\n\n")
            assert b'"finish_reason":"length"' in body
            assert idle.recv(1) == b""
        assert running.wait(30) == 0
        with pytest.raises(OSError):
            connect(port)


def test_what_has_no_time_left_is_told_so(tmp_path):
    with process(tmp_path, "--drain_timeout_s=0") as (running, port):
        with connect(port, 60) as stream, connect(port, 60) as whole:
            many = {**BODY, "n": 8}
            stream.sendall(post_bytes("/v1/completions", {**many, "stream": True}))
            stream.recv(1, 2)
            whole.sendall(post_bytes("/v1/completions", many))
            deadline = time.monotonic() + 60
            while json.loads(get(port, "/debug/state")[2])["live"] < 2:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            running.send_signal(signal.SIGTERM)
            _, _, body = read_response(stream)
            last = body.decode().strip().rpartition("\n\n")[2]
            assert json.loads(last.removeprefix("data: "))["error"]["code"] == "aborted"
            status, _, body = read_response(whole)
            assert status == 503 and json.loads(body)["error"]["code"] == "aborted"
        assert running.wait(30) == 0


def test_ctrl_c_twice_ends_at_once(tmp_path):
    with process(tmp_path, "--drain_timeout_s=600") as (running, port):
        with connect(port, 60) as connection:
            connection.sendall(post_bytes("/v1/completions", {**BODY, "n": 8, "stream": True}))
            connection.recv(1, 2)
            running.send_signal(signal.SIGINT)
            assert any("stopping: live requests may end" in line for line in running.stderr)
            assert running.poll() is None
            running.send_signal(signal.SIGINT)  # two at once might be taken for one
            assert running.wait(30) == 0


def test_keys_guard_everything_but_health(tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("# people\nsecret\n\n")
    with process(tmp_path, f"--api_key_file={keys}", "--served_model_name=mine") as (_, port):
        assert get(port, "/health")[0] == 200
        for path in ("/v1/models", "/metrics", "/debug/state", "/openapi.json", "/nothing"):
            status, headers, _ = get(port, path)
            assert status == 401 and headers["www-authenticate"] == "Bearer"
        asked = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/models", headers={"Authorization": "Bearer secret"}
        )
        with urllib.request.urlopen(asked, timeout=60) as response:
            assert json.load(response)["data"][0]["id"] == "mine"
        asked.full_url = f"http://127.0.0.1:{port}/metrics"
        with urllib.request.urlopen(asked, timeout=60) as response:
            threads = set(re.findall(r'thread_cpu.*thread="(.*)"', response.read().decode()))
        assert {"aqua-http", "aqua-engine"} <= threads, "docs/metrics.md tells them apart"


def test_mistakes_are_found_before_the_model_is_loaded(tmp_path, capsys):
    (tmp_path / "empty").write_text("\n# nothing\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for flag, words in (
            (f"--port={port}", "a free port"),
            (f"--api_key_file={tmp_path / 'none'}", "a readable text file"),
            (f"--api_key_file={tmp_path / 'empty'}", "at least one key"),
            ("--host=no.such.host.invalid", "an address of this machine"),
            ("--max_live_requests=0", ">= 1"),
            ("--drain_timeout_s=-1", "from 0"),
        ):
            assert cli.main(["serve", "--model=nowhere", flag]) == 2
            complaint = capsys.readouterr().err
            assert flag in complaint and words in complaint and "loading" not in complaint


def test_it_binds_loopback_unless_told_otherwise(tmp_path):
    with process(tmp_path) as (running, port):
        found = []
        for name in ("tcp", "tcp6"):
            with open(f"/proc/{running.pid}/net/{name}", encoding="utf-8") as file:
                found += [line.split()[1] for line in file if line.split()[3] == "0A"]
        listening = [address for address in found if int(address.rpartition(":")[2], 16) == port]
        assert listening == [f"0100007F:{port:04X}"]
        assert ask(port, "/v1/completions", {"prompt": "x", "max_tokens": 1})[0] == 200
