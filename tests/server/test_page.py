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

# Colours of the picture's pixels, most frequent first.
COLOURS = """(() => { const found = {};
  const data = context.getImageData(0, 0, STRIPS, room).data;
  for (let at = 0; at < data.length; at += 4) {
    if (!data[at + 3]) continue;
    const name = [data[at], data[at + 1], data[at + 2]].join();
    found[name] = (found[name] || 0) + 1;
  }
  return found; })()"""
POOL, HOST, WAIT = "31,119,180", "255,127,14", "184,184,184"


class Slow(Engine):
    """Takes its time, so that somebody can look; all of it until `go` is set."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.go = threading.Event()
        self.go.set()

    def step(self):
        time.sleep(0.02)
        return super().step() if self.go.is_set() else []


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
        # Everyone has had a turn after a few steps: nobody may run before the page has looked.
        engine._engine.go.clear()
        work = load(engine, 12, 60)
        page.wait(f"alive.size === 12 && ({COLOURS})['{WAIT}'] > 0")
        assert list(page.evaluate(COLOURS)) == [WAIT]
        page.wait("$('figures').textContent.includes('0 running  0 swapped  12 waiting')")
        page.wait("$('rows').textContent.includes('user2')")
        engine._engine.go.set()
        page.wait(f"({COLOURS})['{POOL}'] > 0")
        page.wait("$('ttft').textContent.includes('of them')")
        work.join(120)
        page.wait("alive.size === 0 && $('figures').textContent.includes('0 waiting')")
        assert page.evaluate("[laneCount, ended.length]") == [12, 12]
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
            page.wait("laneCount >= 200 && laneCount <= laneRoom")
            assert page.evaluate("laneRoom * height") <= 600
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


NAMES = ["request", "sample", "user", "state", "computed_tokens", "pool_pages", "peer_pages",
         "host_pages", "ttft_s", "arrived", "prompt_tokens", "output_tokens", "vruntime",
         "slice_left"]


def show(page, rows, since=None, gone=(), ahead=0.5, brief=(), **stats):
    """Hands the page a state of our own."""
    state = {"columns": NAMES, "rows": rows, "gone": list(gone), "since": since,
             "version": 1, "model": "m", "brief": list(brief)}
    page.evaluate(
        f"show({{...{json.dumps(state)}, time: last.time + {ahead},"
        f" stats: {{...last.stats, ...{json.dumps(stats)}}}}})"
    )


def row(number, state="swapped", **changes):
    values = {"request": f"q{number}", "sample": 0, "user": "u", "state": state,
              "computed_tokens": 128, "pool_pages": 4, "peer_pages": 0, "host_pages": 4,
              "ttft_s": None, "arrived": 1, "prompt_tokens": 1, "output_tokens": 1,
              "vruntime": None, "slice_left": None, **changes}
    return [values[name] for name in NAMES]


@pytest.fixture(scope="module")
def window(tmp_path_factory):
    """A browser, and the address of a server for it."""
    folder = tmp_path_factory.mktemp("window")
    with serving(text_engine_config(folder)) as served, browser(folder / "profile") as page:
        yield page, served.url + "/"


@pytest.fixture
def still(window):
    """A new page that is shown nothing but what a test shows it."""
    page, url = window
    page.open(url)
    page.wait("drawn > 0")
    page.evaluate("Object.defineProperty(document, 'hidden', {value: true}),"
                  "document.dispatchEvent(new Event('visibilitychange'))")
    time.sleep(0.2)  # a line may be under way
    return page


def test_colour_codes_keep_their_shares(still):
    show(still, [row(1)])
    found = still.evaluate(COLOURS)  # a lane of 13 lines: four of eight pages each
    assert abs(found[POOL] - found[HOST]) <= 2 and found[POOL] + found[HOST] == 13
    show(still, [row(n) for n in range(2000)])
    assert still.evaluate("[laneCount, height]") == [2000, 1]
    assert sum(still.evaluate(COLOURS).values()) == 600 + 1  # what can be seen; the strip before


def test_all_lanes_can_be_scrolled_to_and_have_names(still):
    show(still, [row(n, state="running", host_pages=0) for n in range(1990)]
         + [row(n, pool_pages=0, host_pages=0) for n in range(1990, 2000)])
    assert WAIT not in still.evaluate(f"Object.keys({COLOURS})")
    still.evaluate("$('bar').scrollTop = laneCount - room")
    still.wait(f"({COLOURS})['{WAIT}'] >= 10")
    still.evaluate("$('picture').dispatchEvent(new MouseEvent('mousemove', {clientX: 100,"
                   " clientY: $('picture').getBoundingClientRect().top + room - 1.5}))")
    assert still.evaluate("$('under').textContent") == "q1999/0 u"
    still.evaluate("$('bar').scrollTop = 0")
    still.wait("offset === 0")


def test_lanes_are_given_back_after_a_minute_and_names_cleared(still):
    show(still, [row("a"), row("b")])
    show(still, [], since=1, gone=[["qa", 0]])
    show(still, [row("c")], since=1)
    before = still.evaluate("labels.indexOf('qc/0 u')")
    lane = still.evaluate("labels.indexOf('qa/0 u')")
    assert before != lane >= 0  # what was there can still be seen
    show(still, [], since=1, ahead=61)
    show(still, [row("d")], since=1)
    assert still.evaluate("[alive.has('qd/0'), codes[alive.get('qd/0').lane] > 0]") == [True, True]
    assert still.evaluate("free.length + alive.size + ended.length === laneCount")


def test_lanes_are_wide_again_a_minute_after_a_burst(still):
    show(still, [row(n) for n in range(2000)])
    show(still, [row("x")], since=1, gone=[[f"q{n}", 0] for n in range(2000)])
    assert still.evaluate("height") == 1  # those of the burst can still be seen
    show(still, [], since=1, gone=[["qx", 0]])
    show(still, [row("y")], since=1, ahead=62)
    show(still, [], since=1, gone=[["qy", 0]])
    show(still, [], since=1, ahead=62)
    assert still.evaluate("[laneCount, height]") == [0, 14]
    show(still, [row("z")], since=1)
    assert still.evaluate("[laneCount, height]") == [1, 14]


def test_first_tokens_are_a_bar_a_strip_whatever_was_missed(still):
    show(still, [row("x", ttft_s=9.0)])  # known at the first look: nobody saw it come
    still.evaluate("firsts.fill(null)")
    show(still, [row("x", ttft_s=9.0), row("y")], since=1)
    show(still, [row("y", ttft_s=0.5), row("z", ttft_s=2.5)], since=1, brief=[1.5])
    assert still.evaluate("firsts.flat().filter((one) => one !== null)") == [0.5, 1.5, 2.5]
    tall = still.evaluate("""(() => { const data = context.getImageData(
      Math.floor(last.time / STRIP_S) % STRIPS, room + MARGIN, 1, SPARK).data;
      return Array.from(data).filter((value, at) => at % 4 === 3 && value).length; })()""")
    assert 20 < tall <= 60
    show(still, [], since=1, ahead=61)
    assert still.evaluate("firsts.flat().filter((one) => one !== null)") == []


def test_lending_and_lenders_are_shown(still):
    lender = {"lender": "far", "capacity": 40, "in_use": 12, "wanted": 3, "lost": 0,
              "bytes_out": 0, "bytes_in": 0}
    lending = {"lent": 32, "lendable": 64, "wanted_back": 8, "emptying": 0, "lost": 0,
               "connected": False}

    def paging(moved):
        stores = [{"name": "peer", "capacity": 40, "in_use": 12, "lost": False,
                   "lenders": [{**lender, "bytes_out": moved}]}]
        return {"stores": stores, "bytes_out": moved, "bytes_in": 0}

    for look in range(8):  # text changes at every fourth look
        show(still, [], since=1, paging=paging(look << 20), lending=lending)
    assert still.evaluate("$('memory').textContent").split("\n")[1:] == [
        "lent 32/64 pages, 8 wanted back, the coordinator is away",
        "  of far 12/40 pages  out 2.0 MiB/s, in 0 B/s  3 WANTED BACK",
    ]
