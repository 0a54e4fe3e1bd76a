"""What Prometheus scrapes, and the snapshots behind it."""

from __future__ import annotations

import asyncio
import json
import pathlib
import re
import threading
import time

import pytest
from prometheus_client.parser import text_string_to_metric_families

from aqua_jax.engine.async_engine import AsyncEngine
from aqua_jax.server.gate import Busy, Gate
from aqua_jax.server.metrics import Collector, Histogram, Latencies, engine_families, thread_seconds
from aqua_jax.server.snapshots import Snapshot
from tests.server.serving import (
    ask,
    connect,
    get,
    post_bytes,
    read_response,
    text_engine_config,
)

ASK = {"prompt": "the quick", "max_tokens": 20, "ignore_eos": True}


def scrape(served):
    """{(name, labels): value} of every sample."""
    status, headers, text = get(served.port, "/metrics")
    assert status == 200 and headers["content-type"].startswith("text/plain")
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text.decode()) for sample in family.samples
    }


def test_a_scrape_counts_what_was_done(served):
    before = scrape(served)
    for stream in (False, True):
        with_stream = {**ASK, "stream": stream, "n": 2}
        if stream:
            with connect(served.port) as connection:
                connection.sendall(post_bytes("/v1/completions", with_stream))
                assert read_response(connection)[0] == 200
        else:
            assert ask(served.port, "/v1/completions", with_stream)[0] == 200
    assert served.idle()
    after = scrape(served)

    def grown(name, *labels):
        return after[name, labels] - before.get((name, labels), 0)

    end = time.monotonic() + 60
    while grown("aqua_requests_finished_total") < 2 and time.monotonic() < end:
        time.sleep(0.05)  # an older snapshot was handed out again
        after = scrape(served)
    assert grown("aqua_requests_total") == grown("aqua_requests_finished_total") == 2
    assert grown("aqua_output_tokens_total") == 80
    assert grown("aqua_time_to_first_token_seconds_count") == 2
    assert grown("aqua_request_seconds_count") == 2
    assert grown("aqua_inter_token_seconds_count") == 19  # of the streamed one alone
    assert grown("aqua_samples_ended_total", ("reason", "length")) == 4
    assert after["aqua_pages", (("state", "in_use"), ("tier", "pool"))] == 0
    pages = [value for (name, _), value in after.items() if name == "aqua_pages"]
    assert sum(pages) >= served.engine.stats()["pages"]["total"]
    assert grown("aqua_thread_cpu_seconds_total", ("thread", "aqua-engine")) >= 0
    for name in ("aqua_sequences_running", "aqua_sequences_waiting", "aqua_preemptions_total",
                 "aqua_recomputed_tokens_total", "process_resident_memory_bytes"):
        assert (name, ()) in after
    for direction in ("in", "out"):
        assert after["aqua_paged_bytes_total", (("direction", direction),)] == 0


def test_histograms_are_cumulative_and_end_at_the_count():
    histogram = Histogram((0.1, 1.0))
    for value, times in ((0.05, 1), (0.1, 2), (0.5, 3), (7.0, 4)):
        histogram.observe(value, times)
    samples = {
        (sample.name, sample.labels.get("le")): sample.value
        for sample in histogram.family("x", "text").samples
    }
    assert samples["x_bucket", "0.1"] == 3 and samples["x_bucket", "1.0"] == 6
    assert samples["x_bucket", "+Inf"] == samples["x_count", None] == 10
    assert samples["x_sum", None] == pytest.approx(0.05 + 0.2 + 1.5 + 28)


def test_counters_that_are_not_there_yet_are_left_out():
    names = {family.name for family in engine_families({})}
    assert "aqua_sequences_swapped" not in names and "aqua_pages" in names
    full = engine_families({
        "swapped": 3, "pages": {"in_use": 1, "cached": 2, "free": 3, "total": 6},
        "paging": {
            "stores": [{"name": "peer", "in_use": 4, "free": 5, "capacity": 20, "lenders": [{
                "lender": "far", "in_use": 4, "capacity": 9, "wanted": 2, "bytes_out": 6,
                "bytes_in": 8,
            }]}], "bytes_out": 6, "bytes_in": 7,
        },
        "lending": {"lent": 8, "wanted_back": 9, "emptying": 10},
    })
    values = {
        (sample.name, *sample.labels.values()): sample.value
        for family in full for sample in family.samples
    }
    assert values["aqua_sequences_swapped",] == 3
    assert values["aqua_pages", "peer", "in_use"] == 4
    assert values["aqua_pages", "pool", "lent"] == 8
    assert values["aqua_pages_capacity", "pool"] == 6
    assert values["aqua_pages_capacity", "peer"] == 20
    assert values["aqua_pages", "pool", "wanted_back"] == 9
    assert values["aqua_paged_bytes_total", "in"] == 7
    assert values["aqua_engine_stat", "paging.bytes_out"] == 6
    assert values["aqua_lender_pages", "far", "wanted"] == 2
    assert values["aqua_lender_bytes_total", "far", "in"] == 8


def test_every_metric_is_in_the_document_and_no_other(served):
    text = (pathlib.Path(__file__).parents[2] / "docs" / "metrics.md").read_text("utf-8")
    named = set(re.findall(r"`(aqua_[a-z_]+)", text))
    collector = Collector(Latencies())
    collector.stats = {**served.engine.stats(), "swapped": 0, "waiting_bound_steps": 1}
    assert {family.name for family in collector.collect()} == named


def test_thread_seconds_name_our_threads():
    stop = threading.Event()

    def spin():
        while not stop.is_set():
            pass

    thread = threading.Thread(target=spin, name="spinner-3")
    before = thread_seconds().get("spinner", 0.0)
    thread.start()
    end, after = time.monotonic() + 60, {}
    while after.get("spinner", 0.0) <= before and time.monotonic() < end:
        time.sleep(0.05)
        after = thread_seconds()
    stop.set()
    thread.join()
    assert after["spinner"] > before and "MainThread" in after


def test_the_gate_admits_all_or_none_and_estimates_the_wait():
    gate = Gate(3)
    gate.enter(2)
    with pytest.raises(Busy):
        gate.enter(2)
    gate.enter(1)
    with pytest.raises(Busy) as caught:
        gate.check()
    assert gate.live == 3 and gate.refused == 2 and caught.value.retry_after_s >= 1
    gate.leave(3)
    gate.enter(3)
    gate._interval = 1e6
    with pytest.raises(Busy) as caught:
        gate.check()
    assert caught.value.retry_after_s == 60


def test_snapshots_are_taken_between_steps_and_seldom(tmp_path):
    async def run():
        async with AsyncEngine(text_engine_config(tmp_path)) as engine:
            threads = []

            def look(inner):
                threads.append(threading.current_thread().name)
                return len(threads)

            snapshot = Snapshot(engine, look, max_age_s=60.0)
            assert await asyncio.gather(*(snapshot.get() for _ in range(50))) == [1] * 50
            assert set(threads) == {"aqua-engine"}
            young = Snapshot(engine, look, max_age_s=0.01)
            assert await young.get() == 2
            while await young.get() == 2:  # ages
                await asyncio.sleep(0.01)
            assert await snapshot.get() == 1
            stuck = Snapshot(engine, lambda inner: time.sleep(0.5), patience_s=0.05)
            assert await stuck.get() is None
        assert await Snapshot(engine, look).get() is None  # it was shut down

    asyncio.run(run())


def wait_for_rows(served, wanted, seconds=60.0):
    """The rows of `/debug/state` as soon as they are as wanted: a look may be an older one."""
    end = time.monotonic() + seconds
    while True:
        status, _, data = get(served.port, "/debug/state")
        state = json.loads(data)
        rows = [dict(zip(state["columns"], row, strict=True)) for row in state["rows"]]
        if wanted(rows):
            return rows
        assert status == 200 and time.monotonic() < end, rows
        time.sleep(0.02)


def test_the_state_names_who_is_there(served):
    with connect(served.port) as connection:
        body = {**ASK, "max_tokens": 2000, "n": 2, "user": "ann", "stream": True}
        connection.sendall(post_bytes("/v1/completions", body))
        connection.recv(1)
        rows = wait_for_rows(served, lambda rows: rows and all(r["output_tokens"] for r in rows))
        while not (bound := scrape(served).get(("aqua_waiting_bound_steps", ()))):
            time.sleep(0.02)  # an older look
    assert bound > 0 and [row["sample"] for row in rows] == [0, 1]
    for row in rows:
        assert row["user"] == "ann" and row["state"] == "running" and row["pool_pages"] >= 1
        assert row["prompt_tokens"] == 2 and row["output_tokens"] > 0 and row["ttft_s"] > 0
    assert served.idle()
    wait_for_rows(served, lambda rows: rows == [])
