"""Traces: the three formats, their errors, cutting, shared blocks; synthetic arrivals."""

from __future__ import annotations

import json
import math
import re
import statistics

import pytest

from aqua_jax.bench.arrivals import ARRIVALS, arrival_times, synthetic
from aqua_jax.bench.traces import FORMATS, TraceRequest, fit, prompt_ids, read_trace
from aqua_jax.bench.workloads import Sizes
from aqua_jax.cli import bench as command
from aqua_jax.errors import ConfigError

AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
    "2023-11-16 18:15:46.6805900,374,44\r\n"
    "2023-11-16 18:15:50.6805900,396,109\r\n"
    "2023-11-16 18:15:48.1805900,879,55"
)
MOONCAKE = "\n".join(json.dumps(line) for line in (
    {"timestamp": 2000, "input_length": 1000, "output_length": 5, "hash_ids": [7, 8]},
    {"timestamp": 3500, "input_length": 700, "output_length": 6, "hash_ids": [7, 9]},
))
OWN = (
    '{"arrival_s": 1, "prompt_tokens": 3, "output_tokens": 4, "user": "a", "weight": 2}\n\n'
    '{"arrival_s": 2.5, "prompt_tokens": 5, "output_tokens": 6}\n'
)


@pytest.fixture
def write(tmp_path):
    def writer(text):
        path = tmp_path / "trace"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return writer


def test_azure_is_sorted_and_starts_at_zero(write):
    path = write(AZURE)
    found = read_trace(path)
    assert [(one.prompt, one.output) for one in found] == [(374, 44), (879, 55), (396, 109)]
    assert [one.arrival_s for one in found] == pytest.approx([0, 1.5, 4], abs=1e-5)
    assert read_trace(path, "azure") == found
    fast = read_trace(path, rate=4.0, limit=2)
    assert [one.arrival_s for one in fast] == pytest.approx([0, 1], abs=1e-5)


def test_mooncake_blocks_become_equal_tokens(write):
    first, second = read_trace(write(MOONCAKE))
    assert (first.arrival_s, second.arrival_s, first.output) == (0, 1.5, 5)
    one, two = prompt_ids(first, 0, 1, 1000), prompt_ids(second, 1, 1, 1000)
    assert len(one) == 1000 and len(two) == 700
    assert one[:512] == two[:512] and one[512:] != two[512:]
    assert one[512:520] != two[512:520]
    assert prompt_ids(first, 0, 2, 1000)[:8] != one[:8]
    short = TraceRequest(0, 100, 1, blocks=(7,))
    assert prompt_ids(short, 5, 1, 1000) == one[:100]
    longer = TraceRequest(0, 600, 1, blocks=(7,))
    assert prompt_ids(longer, 5, 1, 1000)[:512] == one[:512]
    assert prompt_ids(longer, 5, 1, 1000)[512:] != prompt_ids(longer, 6, 1, 1000)[512:]


def test_our_own_lines(write):
    assert read_trace(write(OWN)) == [
        TraceRequest(0.0, 3, 4, "a", 2.0), TraceRequest(1.5, 5, 6, "", 1.0),
    ]


def test_lines_of_every_format_may_say_whose_they_are(write):
    azure = (
        "TIMESTAMP,ContextTokens,GeneratedTokens,User,Priority,weight\n"
        "2023-11-16 18:15:46,374,44,ann,-2,1.5\n2023-11-16 18:15:47,3,4,bob,0,1\n"
    )
    assert read_trace(write(azure)) == [
        TraceRequest(0, 374, 44, "ann", 1.5, -2), TraceRequest(1, 3, 4, "bob"),
    ]
    mooncake = MOONCAKE.replace('"hash_ids": [7, 8]', '"user": "ann", "priority": 3')
    assert read_trace(write(mooncake), "mooncake")[0] == TraceRequest(
        0, 1000, 5, "ann", priority=3
    )
    own = OWN.replace('"weight": 2', '"priority": -1')
    assert read_trace(write(own))[0] == TraceRequest(0, 3, 4, "a", priority=-1)


@pytest.mark.parametrize(("text", "form", "wanted"), [
    (AZURE.replace("396", "x"), "auto", "line 3, ContextTokens: got 'x'; allowed: an integer >= 1"),
    (AZURE.replace(",55", ",0"), "auto", "line 4, GeneratedTokens: got '0'"),
    (AZURE.replace(",55", ""), "auto", "line 4, GeneratedTokens: got None"),
    (AZURE.replace("2023-11-16 18:15:50", "soon"), "auto", "line 3, TIMESTAMP: got 'soon"),
    ("a,b\n1,2\n", "azure", "line 1: got 'a,b'; allowed: a column TIMESTAMP"),
    (MOONCAKE.replace("[7, 9]", "7"), "auto", "line 2, hash_ids: got 7"),
    (MOONCAKE.replace("3500", "NaN"), "auto", "line 2, timestamp: got nan"),
    (OWN.replace("2.5", "-1"), "auto", "line 3, arrival_s: got -1; allowed: a number >= 0"),
    (OWN.replace('": 2}', '": 0}'), "auto", "line 1, weight: got 0; allowed: a number > 0"),
    (OWN.replace('"a"', "1"), "auto", "line 1, user: got 1; allowed: text"),
    (OWN.replace(": 5", ": true"), "auto", "line 3, prompt_tokens: got True"),
    (OWN + "[1]\n", "auto", "line 4: got '[1]'; allowed: a JSON object"),
    ("hello\n", "auto", "line 1: got 'hello'"),
    ("", "jsonl", "at least one request"),
    (b"\xff\xfe\x00", "azure", "UTF-8"),
])
def test_errors_name_line_field_value_and_allowed(write, text, form, wanted):
    with pytest.raises(ConfigError, match=re.escape(wanted)):
        read_trace(write(text), form)


def test_a_missing_file():
    with pytest.raises(ConfigError, match="a file that can be read"):
        read_trace("/nowhere/at/all")


def test_what_is_too_long_is_cut_and_counted():
    requests = [TraceRequest(0, *pair) for pair in [(5, 5), (90, 20), (20, 500), (500, 500)]]
    fitted, cut = fit(requests, 100)
    assert [(one.prompt, one.output) for one in fitted] == [(5, 5), (80, 20), (20, 80), (50, 50)]
    assert cut == 3
    assert [(one.prompt, one.output) for one in fit(requests, 2)[0]] == [(1, 1)] * 4


def test_arrivals_are_seeded_and_have_the_rate_and_the_burstiness():
    assert arrival_times("burst", 3, 5.0, 1.0, 0) == [0, 0, 0]
    for kind, shape in (("poisson", 7.0), ("gamma", 0.25), ("gamma", 4.0)):
        times = arrival_times(kind, 8001, 5.0, shape, 1)
        assert times == arrival_times(kind, 8001, 5.0, shape, 1) and times[0] == 0
        assert times != arrival_times(kind, 8001, 5.0, shape, 2)
        gaps = [b - a for a, b in zip(times, times[1:], strict=False)]
        mean = statistics.fmean(gaps)
        assert mean == pytest.approx(0.2, rel=0.08)
        variation = 1 / math.sqrt(1.0 if kind == "poisson" else shape)
        assert statistics.stdev(gaps) / mean == pytest.approx(variation, rel=0.08)
    users = [one.user for one in synthetic(Sizes(3, 1, 1), [0, 1, 2], 2)]
    assert users == ["user-0", "user-1", "user-0"]


def test_the_commands_choices_are_the_modules():
    assert command.TRACE_FORMATS == FORMATS and command.ARRIVALS == ARRIVALS
