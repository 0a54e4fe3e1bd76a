"""`aqua-jax top`: a snapshot as lines, and a real server watched in a real terminal."""

from __future__ import annotations

import contextlib
import os
import pty
import signal
import subprocess
import time

import pytest

from aqua_jax.cli import main as cli
from aqua_jax.cli import top
from aqua_jax.cli.board import board, rates, size
from aqua_jax.engine.inspect import COLUMNS
from tests.cli.text_model import ROOT, command
from tests.server.serving import connect, post_bytes, serving, text_engine_config


def row(number, state="running", **changes):
    values = {
        "request": f"r{number}", "sample": 0, "user": "ann", "state": state, "prompt_tokens": 100,
        "output_tokens": 7, "computed_tokens": 106, "arrived": 90.0, "ttft_s": 0.25,
        "vruntime": 3.5, "slice_left": 4.0, "pool_pages": 7, "peer_pages": 0, "host_pages": 0,
        "preemptions": 0, **changes,
    }
    return [values[name] for name in COLUMNS]


def snapshot(rows, time=100.0, **stats):
    return {
        "columns": COLUMNS, "rows": rows, "users": {}, "time": time, "model": "m", "live": 1,
        "stats": {
            "steps": 10, "output_tokens": 50, "preemptions": 0,
            "pages": {"total": 60, "in_use": 30, "cached": 10, "free": 20},
            "paging": {
                "stores": [
                    {"name": "peer", "capacity": 40, "in_use": 10, "free": 30, "lost": True},
                    {"name": "host", "capacity": 0, "in_use": 0, "free": 0, "lost": False},
                ],
                "bytes_out": 0, "bytes_in": 0, "outstanding": 2,
            },
            **stats,
        },
    }


def text(lines):
    return ["".join(span for span, _ in line) for line in lines]


def test_running_ones_come_first_and_the_rest_is_counted():
    rows = [row(n, "waiting", ttft_s=None, pool_pages=0) for n in range(50)]
    rows += [row(99), row(98, "swapped", host_pages=14, pool_pages=0)]
    lines = text(board(snapshot(rows), rates(None, snapshot([])), 150, 30))
    assert len(lines) <= 30 and all(len(line) <= 150 for line in lines)
    assert "1 running" in lines[0] and "1 swapped" in lines[0] and "50 waiting" in lines[0]
    assert "30/60 pages" in lines[1] and "10/40 pages LOST" in lines[2] and "0/0" in lines[3]
    title = next(n for n, line in enumerate(lines) if line.startswith("REQUEST"))
    assert [line.split()[0] for line in lines[title + 1 : title + 4]] == ["r99", "r98", "r0"]
    assert "█" * 10 in lines[title + 1] and "▒" * 20 in lines[title + 2]
    assert "(10.0s)" in lines[title + 3] and "0.25s" in lines[title + 1]
    shown = len(lines) - title - 2
    assert lines[-1] == f"... and {52 - shown} more"


def test_what_is_lent_has_a_line_of_its_own():
    lending = {
        "lendable": 48, "lent": 30, "wanted_back": 12, "emptying": 3, "lost": 0, "connected": False,
    }
    lines = text(board(snapshot([], lending=lending), rates(None, snapshot([])), 150, 30))
    (line,) = [line for line in lines if line.startswith("lent ")]
    assert " 30/48 pages, 12 wanted back, 3 being emptied, the coordinator is away" in line
    assert "lost" not in line
    assert not [line for line in text(board(
        snapshot([], lending=None), rates(None, snapshot([])), 150, 30
    )) if line.startswith("lent")]


@pytest.mark.parametrize(("width", "height"), [(20, 8), (80, 24), (300, 80)])
def test_every_screen_is_filled_and_not_overrun(width, height):
    rows = [row(n, user="x" * 40, request="y" * 40, vruntime=None) for n in range(100)]
    lines = text(board(snapshot(rows), rates(None, snapshot([])), width, height))
    assert len(lines) <= height and max(map(len, lines)) <= width


def test_lenders_are_shown_with_what_moves_and_what_they_want_back():
    first, second = snapshot([], 100.0), snapshot([], 102.0)
    for state, moved in ((first, 0), (second, 4 << 20)):
        state["stats"]["paging"]["stores"][0]["lenders"] = [
            {"lender": "far", "leases": 2, "capacity": 40, "in_use": 12, "wanted": 3, "lost": 0,
             "bandwidth_cap": 0, "bytes_out": moved, "bytes_in": 1000},
            {"lender": "b\x1bad", "leases": 0, "capacity": 0, "in_use": 0, "wanted": 0, "lost": 1,
             "bandwidth_cap": 0, "bytes_out": 0, "bytes_in": 0},
        ]
    lines = text(board(second, rates(first, second), 150, 30))
    assert lines[3].split() == (
        "of far 12/40 pages out 2.0 MiB/s, in 0 B/s 3 WANTED BACK".split()
    )
    assert "b?ad" in lines[4] and lines[4].endswith("LOST")
    assert rates(second, first).lenders == {}  # another server at the same place
    assert len(text(board(second, rates(None, second), 20, 8))) <= 8


def test_rates_are_between_two_looks_and_never_negative():
    first = snapshot([], 100.0)
    second = snapshot([], 102.0, steps=30, output_tokens=150)
    second["stats"]["paging"]["bytes_out"] = 4 << 20
    speed = rates(first, second)
    assert speed.steps == 10 and speed.tokens == 50 and speed.out_bytes == 2 << 20
    assert rates(second, first).steps == 0  # another server at the same place
    assert "2.0 MiB/s" in " ".join(text(board(second, speed, 150, 30)))
    assert [size(n) for n in (0, 999, 5000, 300 << 10, 3 << 40)] == [
        "0 B", "999 B", "4.9 KiB", "300 KiB", "3.0 TiB"
    ]


def test_names_cannot_steer_the_terminal():
    bad = row(1, user="\x1b[2J\nboo", request="a\rb")
    joined = "".join(text(board(snapshot([bad]), rates(None, snapshot([])), 150, 30)))
    assert "\x1b" not in joined and "\n" not in joined and "\r" not in joined and "?[2J" in joined


def test_a_server_is_watched_in_a_terminal_until_ctrl_c(tmp_path):
    with (
        serving(text_engine_config(tmp_path, policy="fair"), drain_timeout_s=0.1) as served,
        connect(served.port) as connection,
    ):
        body = {"prompt": "fox", "max_tokens": 2000, "ignore_eos": True, "user": "ann", "n": 8}
        connection.sendall(post_bytes("/v1/completions", body))
        terminal, inner = pty.openpty()
        process = subprocess.Popen(
            command("top", f"--url={served.url}", "--interval_s=0.1"), cwd=ROOT,
            stdin=inner, stdout=inner, stderr=inner,
            env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "150", "LINES": "40"},
        )
        os.close(inner)
        seen = b""
        deadline = time.monotonic() + 60
        while not (b"running" in seen and b"REQUEST" in seen and seen.count(b"pool") > 2):
            assert time.monotonic() < deadline, seen
            seen += os.read(terminal, 1 << 16)
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(OSError):
            while data := os.read(terminal, 1 << 16):
                seen += data
        assert process.wait(30) == 0
        os.close(terminal)
        assert b"\x1b[?1049l" in seen  # the terminal is as it was


def test_once_prints_one_look(tmp_path, capsys):
    with serving(text_engine_config(tmp_path), keys=["secret"]) as served:
        (tmp_path / "keys").write_text("# mine\nsecret\n")
        asked = ["top", f"--url={served.url}", "--once", "--interval_s=0.1"]
        assert cli.main(asked) == 2
        assert "401" in capsys.readouterr().err
        assert cli.main([*asked, f"--api_key_file={tmp_path / 'keys'}"]) == 0
        assert "0 running" in capsys.readouterr().out
    assert cli.main(asked) == 2
    assert f"{served.url}: Connection refused; is `aqua-jax serve`" in capsys.readouterr().err
    assert cli.main(["top", "--url=ftp://x"]) == 2
    assert "http://HOST:PORT" in capsys.readouterr().err


def test_a_server_that_is_busy_at_first_is_waited_for(monkeypatch):
    class Engine:
        looks = 0

        def look(self):
            self.looks += 1
            if self.looks < 3:
                raise top.BusyError("status 503: the engine is busy")
            return {"seen": self.looks}

    assert top._first_look(Engine()) == {"seen": 3}
    monkeypatch.setattr(top, "_BUSY_S", 0.0)
    with pytest.raises(OSError, match="busy"):
        top._first_look(Engine())
