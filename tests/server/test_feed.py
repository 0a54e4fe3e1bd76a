"""What those who watch are sent: everything once, then differences that add up to everything."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
import time

import pytest

from aqua_jax.config import SamplingParams
from aqua_jax.engine.async_engine import AsyncEngine
from aqua_jax.engine.inspect import COLUMNS, inspect
from aqua_jax.server.feed import StateFeed
from tests.server.serving import connect, get, serving, text_engine_config


def merge(rows, sent):
    """What a watcher knows after one more look."""
    if sent["since"] is None:
        rows.clear()
    for key in sent["gone"]:
        del rows[tuple(key)]
    for row in sent["rows"]:
        rows[tuple(row[:2])] = row


def test_differences_add_up_to_the_whole(tmp_path):
    async def run():
        async with AsyncEngine(text_engine_config(tmp_path, policy="fair")) as engine:
            feed = StateFeed(engine, lambda: {"model": "m"})
            feed._snapshot._max_age_s = 0.0

            async def one(number):
                await asyncio.sleep(0.02 * number)
                params = SamplingParams(max_tokens=20 + 17 * number % 90, ignore_eos=True, n=2)
                async for _ in engine.generate([5 + number] * 30, params, user=f"u{number % 3}"):
                    pass

            work = asyncio.gather(*(one(number) for number in range(20)))
            rows, seen, whole, differences, most = {}, None, 0, 0, 0
            while not work.done() or rows:
                number, data = await feed.get(seen)
                sent = json.loads(data)
                assert sent["version"] == number and sent["since"] in (None, seen)
                whole += sent["since"] is None
                differences += sent["since"] is not None
                merge(rows, sent)
                seen = number
                now = feed._versions[number].rows
                assert {
                    key: [pytest.approx(value, abs=1e-4) if isinstance(value, float) else value
                          for value in row]
                    for key, row in now.items()
                } == rows
                most = max(most, len(rows))
                await asyncio.sleep(0.01)
            await work
            assert whole == 1 and differences > 5 and most > 2
            assert json.loads((await feed.get(seen - 100))[1])["since"] is None

    asyncio.run(run())


def test_one_version_is_encoded_once_for_all_who_ask(served):
    began = time.monotonic()
    first = json.loads(get(served.port, "/debug/state")[2])
    again = [json.loads(get(served.port, "/debug/state")[2])["version"] for _ in range(20)]
    assert set(first["columns"]) == set(COLUMNS)
    fifths = (time.monotonic() - began) / 0.2
    assert max(again) - first["version"] <= fifths + 1 and len(set(again)) < 20
    status, _, body = get(served.port, "/debug/state?since=x")
    assert status == 400 and json.loads(body)["error"]["param"] == "since"


def test_inspection_says_what_the_policy_and_the_stores_know(tmp_path):
    async def run(**settings):
        async with AsyncEngine(text_engine_config(tmp_path, **settings)) as engine:
            params = SamplingParams(max_tokens=1000, ignore_eos=True)
            for number in range(6):
                await engine.submit([5 + number] * 100, params, user=f"u{number % 2}")
            while (await engine.call(lambda inner: inner.metrics.output_tokens)) < 300:
                await asyncio.sleep(0.01)
            state = await engine.call(inspect)
            rows = [dict(zip(state["columns"], row, strict=True)) for row in state["rows"]]
            pages = sum(row["pool_pages"] for row in rows)
            assert len(rows) == 6 and pages <= state["stats"]["pages"]["total"]
            for row in rows:
                assert row["state"] in ("running", "waiting", "swapped")
                assert (row["state"] == "running") == (row["pool_pages"] > 0)
            return state, rows

    state, rows = asyncio.run(run(policy="fcfs"))
    assert state["users"] == {}
    assert {(row["vruntime"], row["host_pages"]) for row in rows} == {(None, None)}
    state, rows = asyncio.run(run(
        policy="fair", kv_cache_tokens=1200, max_num_seqs=4, slice_steps=4, host_kv_memory=8 << 20,
    ))
    assert set(state["users"]) == {"u0", "u1"}
    assert all(row["vruntime"] is not None and row["slice_left"] is not None for row in rows)
    assert all(row["host_pages"] is not None for row in rows)
    assert sum(row["host_pages"] for row in rows) > 0


def test_followers_get_a_line_a_version_until_the_server_stops(tmp_path):
    with serving(text_engine_config(tmp_path)) as served:
        with connect(served.port) as connection:
            connection.sendall(b"GET /debug/state?follow HTTP/1.1\r\nHost: x\r\n\r\n")
            data = b""
            while data.count(b"\n{") + data.count(b"\n{\"version") < 3:
                data += connection.recv(1 << 16)
            served.stop()
            while more := connection.recv(1 << 16):
                data += more
        assert data.endswith(b"0\r\n\r\n")
        versions = [int(found) for found in re.findall(rb'"version":(\d+)', data)]
        assert versions == sorted(set(versions)) and len(versions) >= 2
        served.thread.join(10)
        assert not served.thread.is_alive()


def test_the_page_may_load_nothing_and_needs_nothing(served):
    status, headers, body = get(served.port, "/")
    text = body.decode()
    assert status == 200 and headers["content-type"].startswith("text/html")
    script = re.search(r"<script>(.*?)</script>", text, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = headers["content-security-policy"]
    assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy
    assert "connect-src 'self'" in policy
    assert not re.search(r"(src|href)\s*=\s*(?!\"data:)|https?://|@import|url\(", text)
