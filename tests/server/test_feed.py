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
from aqua_jax.server.changes import Changes
from aqua_jax.server.feed import StateFeed
from tests.server.serving import ask, connect, get, serving, text_engine_config


class Watcher:
    """What somebody knows who asks now and then."""

    def __init__(self):
        self.rows, self.users, self.seen = {}, {}, None

    def take(self, number, data):
        sent = json.loads(data)
        assert sent["version"] == number and sent["since"] in (None, self.seen)
        if sent["since"] is None:
            self.rows.clear()
            self.users.clear()
        for key in sent["gone"]:
            del self.rows[tuple(key)]
        for row in sent["rows"]:
            self.rows[tuple(row[:2])] = row
        for user, vruntime in sent["users"].items():
            self.users[user] = vruntime
            if vruntime is None:
                del self.users[user]
        self.seen = number
        return sent


class Checked:
    """An engine of which everything is looked at beside each look of the feed's."""

    def __init__(self, engine):
        self._engine, self.whole = engine, None

    async def call(self, function):
        def both(inner):
            self.whole = inspect(inner)
            return function(inner)

        return await self._engine.call(both)


@pytest.mark.parametrize("settings", [
    {"policy": "fair"},
    {"policy": "fair", "kv_cache_tokens": 1200, "slice_steps": 4, "host_kv_memory": 8 << 20},
])
def test_differences_add_up_to_the_whole(tmp_path, settings):
    async def run():
        async with AsyncEngine(text_engine_config(tmp_path, **settings)) as inner:
            engine = Checked(inner)
            feed = StateFeed(engine, lambda: {"model": "m"}, max_age_s=0.0)

            async def one(number):
                await asyncio.sleep(0.02 * number)
                params = SamplingParams(max_tokens=20 + 17 * number % 90, ignore_eos=True, n=2)
                async for _ in inner.generate([5 + number] * 30, params, user=f"u{number % 3}"):
                    pass

            work = asyncio.gather(*(one(number) for number in range(20)))
            often, seldom = Watcher(), Watcher()
            looks, most, starts = 0, 0, set()
            while not work.done() or often.rows:
                looks += 1
                for watcher in (often, seldom) if looks % 5 == 0 else (often,):
                    sent = watcher.take(*await feed.get(watcher.seen))
                    starts.add(sent["since"])
                    whole = engine.whole
                    assert [tuple(row) for row in watcher.rows.values()] == whole["rows"]
                    assert watcher.users == whole["users"]
                most = max(most, len(often.rows))
                await asyncio.sleep(0.01)
            await work
            assert len(starts) > 5 and most > 2 and not often.users
            assert json.loads((await feed.get(often.seen - 10**6))[1])["since"] is None

    asyncio.run(run())


def test_an_id_that_comes_again_and_what_nobody_saw_are_told_apart():
    changes = Changes(kept=10)
    changes.put("a", 1, 1)
    changes.drop("a", 2)
    changes.put("a", 2, 2)
    changes.put("b", 1, 2)
    changes.drop("b", 3)
    changes.drop("c", 3)
    assert changes.gone(1) == ["a"] and list(changes.since(1)) == [("a", 2)]
    assert changes.gone(2) == ["b"] and list(changes.since(2)) == []
    assert changes.gone(None) == [] and list(changes.since(None)) == [("a", 2)]
    for version in range(4, 40):
        changes.put(version, 0, version)
        changes.drop(version, version)
    assert len(changes._gone) <= 10 and len(changes) == 1


def test_what_came_first_is_told_first_whatever_changed_last():
    changes = Changes(kept=10)
    for key in "abc":
        changes.put(key, 0, 1)
    changes.put("a", 1, 2)
    assert [key for key, _ in changes.since(0)] == ["a", "b", "c"]
    changes.drop("b", 3)
    changes.put("b", 0, 3)
    changes.put("a", 2, 4)
    assert [key for key, _ in changes.since(0)] == ["a", "c", "b"]
    assert [key for key, _ in changes.since(2)] == ["a", "b"]


def test_requests_that_came_and_went_between_two_looks_leave_their_ttft(served):
    first = json.loads(get(served.port, "/debug/state")[2])
    assert ask(served.port, "/v1/completions", {"prompt": "fox", "max_tokens": 1})[0] == 200
    deadline, found = time.monotonic() + 60, []
    while not found and time.monotonic() < deadline:
        found = json.loads(get(served.port, f"/debug/state?since={first['version']}")[2])["brief"]
    assert len(found) == 1 and 0 < found[0] < 20
    assert json.loads(get(served.port, "/debug/state")[2])["brief"] == []


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
        served.thread.join(60)
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
