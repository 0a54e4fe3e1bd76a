"""Clients that don't behave: slow, gone, half there, too much. Plain sockets."""

from __future__ import annotations

import concurrent.futures
import json
import random
import resource
import selectors
import socket
import time

import pytest

from aqua_jax.server.errors import error_response
from tests.scale import SCALE, scaled
from tests.server.serving import (
    MODEL,
    ask,
    connect,
    get,
    post_bytes,
    read_response,
    serving,
    text_engine_config,
)

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
LONG = {"model": MODEL, "prompt": "the quick", "max_tokens": 1000, "ignore_eos": True}


def test_plain_requests_get_plain_answers(served):
    status, headers, body = ask(served.port, COMPLETIONS, {"prompt": "x", "max_tokens": 2})
    assert status == 200 and headers["content-type"] == "application/json"
    assert body["model"] == MODEL and headers["x-request-id"] == body["id"]
    assert get(served.port, "/health")[0] == 200
    assert json.loads(get(served.port, "/v1/models")[2])["data"][0]["id"] == MODEL


def test_a_stream_ends_with_done_and_is_not_cached(served):
    with connect(served.port) as connection:
        connection.sendall(post_bytes(COMPLETIONS, {**LONG, "max_tokens": 20, "stream": True}))
        status, headers, body = read_response(connection)
    assert status == 200 and headers["content-type"].startswith("text/event-stream")
    assert headers["cache-control"] == "no-cache"
    events = body.decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    for event in events[:-2]:
        assert json.loads(event.removeprefix("data: "))["object"] == "text_completion"


@pytest.mark.parametrize(
    ("body", "status", "param", "words"),
    [
        (b"", 400, "body", "JSON object"),
        (b"{", 400, "body", "JSON"),
        (b"[]", 400, "body", "JSON object"),
        (b'{"prompt": "x", "temperature": NaN}', 400, "body", "NaN"),
        (b'{"prompt": "x", "temperature": 1e999}', 400, "body", "1e999"),
        (b"[" * 100_000, 400, "body", "nested"),
        (b'{"prompt": "\xff"}', 400, "body", "UTF-8"),
        (b'{"prompt": "\\ud800"}', 400, "prompt", "surrogates"),
        (b'{"prompt": [[1], "x"]}', 400, "prompt[1]", "same kind"),
        (b'{"prompt": [1, -1]}', 400, "prompt[1]", "integers >= 0"),
        (b'{"prompt": [1, 100000]}', 400, "prompt", "ids from 0"),
        (b'{"prompt": [[1], [100000]]}', 400, "prompt[1]", "ids from 0"),
        (b'{"prompt": {"prompt": "x"}}', 400, "prompt", "text"),
        (b'{"prompt": "x", "stream": "yes"}', 400, "stream", "true or false"),
        (b'{"prompt": "x", "user": 3}', 400, "user", "text"),
        (b'{"prompt": "x", "logprobs": true}', 400, "logprobs", "0 to 20"),
        (b'{"prompt": "x", "best_of": 3}', 400, "best_of", "only 1"),
        (b'{"prompt": "x", "best_of": 1, "n": 2}', 400, "best_of", "only 2"),
        (b'{"prompt": "x", "seed": 1.5}', 400, "seed", "integer"),
        (b'{"prompt": "x", "max_tokens": true}', 400, "max_tokens", "integer"),
    ],
)
def test_bad_bodies_are_refused_with_the_field(served, body, status, param, words):
    found, _, answer = ask(served.port, COMPLETIONS, body)
    assert found == status, answer
    assert answer["error"]["param"] == param and words in answer["error"]["message"]
    assert answer["error"]["type"] == "invalid_request_error"


def test_faults_of_ours_are_logged_under_the_id_that_the_client_has(caplog):
    response = error_response(ZeroDivisionError("a secret"))
    assert response.status_code == 500 and b"a secret" not in response.body
    [line] = [record.getMessage() for record in caplog.records]
    assert line.startswith(response.headers["x-request-id"]) and "a secret" in line


def test_wrong_paths_methods_and_kinds_have_the_same_shape(served):
    status, _, answer = ask(served.port, "/v1/nothing", {})
    assert status == 404 and set(answer["error"]) == {"message", "type", "param", "code"}
    status, _, body = get(served.port, COMPLETIONS)
    assert status == 405 and json.loads(body)["error"]["type"] == "invalid_request_error"
    with connect(served.port) as connection:
        form = post_bytes(COMPLETIONS, {"prompt": "x"})
        connection.sendall(form.replace(b"application/json", b"text/plain"))
        status, _, body = read_response(connection)
    assert status == 415 and b"application/json" in body


def test_long_bodies_are_refused_whether_announced_or_not(tmp_path):
    with serving(text_engine_config(tmp_path), max_body_bytes=1000) as served:
        status, _, answer = ask(served.port, COMPLETIONS, {"prompt": "x" * 2000})
        assert status == 413 and answer["error"]["param"] == "body"
        with connect(served.port) as connection:
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
            )
            # Two go beyond the limit. After them the server answers and closes, whatever comes.
            connection.sendall(2 * (b"200\r\n" + b" " * 512 + b"\r\n"))
            assert read_response(connection)[0] == 413
        assert ask(served.port, COMPLETIONS, {"prompt": "x", "max_tokens": 1})[0] == 200


def test_half_open_connections_end_and_cost_nothing(tmp_path):
    with serving(text_engine_config(tmp_path), read_timeout_s=0.5) as served:
        beginnings = [
            b"", b"POST /v1/comp", b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n",
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n",
            post_bytes(COMPLETIONS, LONG)[:-5],
        ]
        connections = []
        for number in range(50):
            connections.append(connect(served.port))
            connections[-1].sendall(beginnings[number % len(beginnings)])
        assert ask(served.port, COMPLETIONS, {"prompt": "x", "max_tokens": 1})[0] == 200
        for number, connection in enumerate(connections):
            data = connection.recv(1000)
            expected = b"HTTP/1.1 408" if number % len(beginnings) >= 3 else b""
            assert data.startswith(expected) and bool(data) == bool(expected)
            connection.close()
        assert served.idle() and served.engine.stats()["requests_added"] == 1


def test_later_requests_of_a_connection_have_as_little_time(tmp_path):
    half = b"GET /health HTTP/1.1\r\nHost: x\r\n"
    with serving(text_engine_config(tmp_path), read_timeout_s=0.5) as served:
        assert ask(served.port, COMPLETIONS, {"prompt": "x", "max_tokens": 1})[0] == 200
        with connect(served.port) as connection:
            connection.sendall(half + b"\r\n")
            assert read_response(connection)[0] == 200
            connection.sendall(half)
            assert connection.recv(1) == b"", "closed, and before connections that only idle"
        with connect(served.port) as connection:  # behind one that is being answered
            connection.sendall(post_bytes(COMPLETIONS, {**LONG, "stream": True}) + half)
            assert b"[DONE]" in read_response(connection)[2]
            assert connection.recv(1) == b""


def test_a_closed_half_is_a_closed_connection(served):
    with connect(served.port) as connection:
        connection.sendall(post_bytes(COMPLETIONS, {**LONG, "n": 4}))
        while not served.engine.stats()["live_requests"]:
            time.sleep(0.002)
        connection.shutdown(socket.SHUT_WR)
        assert served.idle()


def test_random_disconnects_leave_nothing(tmp_path):
    with serving(text_engine_config(tmp_path)) as served:

        def misbehave(seed: int) -> None:
            draw = random.Random(seed)
            for _ in range(scaled(6)):
                body = {
                    **LONG, "max_tokens": draw.randint(1, 300), "stream": draw.random() < 0.7,
                    "n": draw.randint(1, 3), "user": f"user{seed % 3}",
                }
                if draw.random() < 0.3:
                    body["prompt"] = ["the quick", "brown fox", [1, 2, 3]][: draw.randint(1, 2)]
                with connect(served.port) as connection:
                    sent = post_bytes(COMPLETIONS, body, "Connection: close")
                    if draw.random() < 0.2:
                        connection.sendall(sent[: draw.randint(1, len(sent) - 1)])
                        continue
                    connection.sendall(sent)
                    for _ in range(draw.randint(0, 5)):
                        if not connection.recv(draw.randint(1, 4000)):
                            break
                    if draw.random() < 0.3:  # a reset instead of an orderly end
                        connection.setsockopt(
                            socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0"
                        )

        with concurrent.futures.ThreadPoolExecutor(8) as clients:
            list(clients.map(misbehave, range(8)))
        assert served.idle()
        status, _, answer = ask(served.port, COMPLETIONS, {**LONG, "max_tokens": 9})
        assert status == 200 and answer["usage"]["completion_tokens"] == 9


def test_slow_readers_get_everything_and_hold_no_pages(tmp_path):
    """Readers that take a few hundred bytes at a time; the engine goes at its own speed."""
    count = 1000 if SCALE > 1 else 50
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with serving(
        text_engine_config(tmp_path, max_num_seqs=64, max_step_tokens=256, kv_cache_tokens=32768),
        max_live_requests=count,
    ) as served:
        body = post_bytes(COMPLETIONS, {**LONG, "max_tokens": 150, "stream": True})
        readers, received = [], {}
        for _ in range(count):
            reader = socket.socket()
            # Small buffers on this side, so that the answers wait on the server's.
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            reader.settimeout(60)
            reader.connect(("127.0.0.1", served.port))
            reader.sendall(body)
            readers.append(reader)
            received[reader] = bytearray()
        # Nobody reads, and yet all of them are served to the end and hold nothing.
        deadline = time.monotonic() + 120
        while served.engine.stats()["requests_finished"] < count:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert served.engine.stats()["live_requests"] == 0 and served.pages_in_use() == 0
        with selectors.DefaultSelector() as selector:
            for reader in readers:
                selector.register(reader, selectors.EVENT_READ)
            while selector.get_map():
                ready = selector.select(60)
                assert ready
                for key, _ in ready:
                    data = key.fileobj.recv(700)
                    received[key.fileobj] += data
                    if not data or received[key.fileobj].endswith(b"0\r\n\r\n"):
                        selector.unregister(key.fileobj)
                        key.fileobj.close()
        for data in received.values():
            assert data.count(b"data: [DONE]") == 1
            assert data.count(b'"finish_reason":"length"') == 1
        assert served.idle()


def test_a_reader_that_never_reads_does_not_hold_up_the_end(tmp_path):
    with serving(text_engine_config(tmp_path), drain_timeout_s=0.3) as served:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect(("127.0.0.1", served.port))
        connection.sendall(post_bytes(
            COMPLETIONS,
            {**LONG, "max_tokens": 1900, "stream": True, "logprobs": 20, "n": 8},
        ))
        while not served.engine.stats()["output_tokens"]:
            time.sleep(0.01)
        started = time.monotonic()
        served.stop()
        served.thread.join(20)
        assert not served.thread.is_alive() and time.monotonic() - started < 10
        connection.close()
