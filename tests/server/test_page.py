"""The page at / in a real browser. Not collected where there is none (see conftest.py)."""

from __future__ import annotations

import asyncio
import json
import threading
import time

import pytest

from aqua_jax.config import SamplingParams
from aqua_jax.engine.async_engine import AsyncEngine
from aqua_jax.engine.engine import Engine
from tests.server.browser import browser
from tests.server.serving import serving, text_engine_config

# Colours of the strips' pixels in one lane, most frequent first.
COLOURS = """(() => { const found = {};
  for (const canvas of strips) {
    const data = canvas.getContext("2d").getImageData(0, 0, 1, canvas.height).data;
    for (let at = 0; at < data.length; at += 4) {
      if (!data[at + 3]) continue;
      const name = [data[at], data[at + 1], data[at + 2]].join();
      found[name] = (found[name] || 0) + 1;
    }
  }
  return found; })()"""
POOL, HOST, WAIT = "31,119,180", "255,127,14", "184,184,184"


class Slow(Engine):
    """Takes its time, so that somebody can look."""

    def step(self):
        time.sleep(0.02)
        return super().step()


def load(engine, count, tokens):
    """Runs requests in a thread; returns it."""

    async def one(number):
        params = SamplingParams(max_tokens=tokens, ignore_eos=True)
        async for _ in engine.generate([5 + number % 250] * 40, params, user=f"user{number % 3}"):
            pass

    async def run():
        await asyncio.gather(*(one(number) for number in range(count)))

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    return thread


def test_the_page_shows_where_pages_are_and_loads_nothing_else(tmp_path):
    config = text_engine_config(
        tmp_path, policy="fair", kv_cache_tokens=512, max_num_seqs=8, slice_steps=8,
        host_kv_memory=8 << 20,
    )
    engine = AsyncEngine(config, make_engine=Slow)
    with serving(config, engine=engine) as served, browser(tmp_path / "profile") as page:
        page.open(served.url + "/")
        page.wait("drawn > 0")
        work = load(engine, 12, 60)
        page.wait("alive.size === 12 && drawn > 4")
        assert "running" in page.evaluate("$('figures').textContent")
        page.wait(f"({COLOURS})['{POOL}'] > 0 && ({COLOURS})['{WAIT}'] > 0")
        page.wait("firsts.length > 0 && $('ttft').textContent.includes('of them')")
        page.wait("$('rows').textContent.includes('user2')")
        work.join(120)
        page.wait("alive.size === 0")
        lanes = page.evaluate("laneCount")
        assert 12 <= lanes <= 24 and page.evaluate("lanes.size") == 12
        if engine.stats()["paging"]["bytes_out"]:
            assert page.evaluate(COLOURS).get(HOST, 0) > 0
        assert page.evaluate("$('problem').textContent") == ""
        page.screenshot(tmp_path / "page.png")
        asked = {
            event["params"]["request"]["url"] for event in page.events
            if event.get("method") == "Network.requestWillBeSent"
        }
        assert asked and all(url.startswith(served.url) for url in asked)
        wrong = [
            event for event in page.events
            if event.get("method") == "Runtime.exceptionThrown"
            or '"level": "error"' in json.dumps(event)
        ]
        assert not wrong, wrong
    engine.shutdown()


def test_many_requests_fit_and_a_stopped_server_is_told(tmp_path):
    engine = AsyncEngine(text_engine_config(tmp_path), make_engine=Slow)
    with browser(tmp_path / "profile") as page:
        with serving(engine._engine.config, engine=engine, drain_timeout_s=0.1) as served:
            page.open(served.url + "/")
            work = load(engine, 300, 2)
            page.wait("laneCount >= 200")
            assert page.evaluate("laneCount * height") <= 600
            work.join(120)
        page.wait("$('problem').textContent.includes('no answer')")
    engine.shutdown()


def test_the_page_asks_for_a_key_where_one_is_needed(tmp_path):
    with (
        serving(text_engine_config(tmp_path), keys=["open sesame"]) as served,
        browser(tmp_path / "profile") as page,
    ):
        page.open(served.url + "/")
        page.wait("!$('ask').hidden")
        assert page.evaluate("drawn") == 0
        page.evaluate("$('key').value = 'open sesame'; $('ask').requestSubmit()")
        page.wait("drawn > 0 && $('ask').hidden")


@pytest.mark.parametrize("count", [1, 2000])
def test_colour_codes_keep_their_shares(tmp_path, count):
    with (
        serving(text_engine_config(tmp_path)) as served, browser(tmp_path / "profile") as page,
    ):
        page.open(served.url + "/")
        page.wait("drawn > 0")
        page.evaluate(f"""(() => {{
          const names = ["request", "sample", "user", "state", "computed_tokens", "pool_pages",
            "peer_pages", "host_pages", "ttft_s", "arrived", "prompt_tokens", "output_tokens",
            "vruntime", "slice_left"];
          const rows = Array.from({{length: {count}}}, (_, n) =>
            ["q" + n, 0, "u", "swapped", 128, 4, 0, 4, 0.5, 1, 1, 1, null, null]);
          stats = {{...last.stats}};
          show({{columns: names, rows, gone: [], since: null, version: 1, time: last.time + 0.5,
            stats, model: "m"}});
        }})()""")
        found = page.evaluate(COLOURS)
        assert page.evaluate("laneCount") == count
        if count == 1:  # a lane of 13 lines: four of eight pages each
            assert abs(found[POOL] - found[HOST]) <= 2 and found[POOL] + found[HOST] == 13
        else:
            assert sum(found.values()) == count
