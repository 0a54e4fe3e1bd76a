"""Requests of a recorded load: when they came, how long they were, what they shared. No jax.

Three formats: Azure's LLM inference CSV (TIMESTAMP, ContextTokens, GeneratedTokens), Mooncake's
JSONL (timestamp in ms, input_length, output_length, hash_ids of blocks of 512 prompt tokens), and
our own JSONL (arrival_s, prompt_tokens, output_tokens). A line of any may have user, weight and
priority as well (a column of the CSV, in any case). Texts are in none of them: prompts are random
ids of the recorded length, and equal hash_ids make equal blocks.
"""

from __future__ import annotations

import csv
import dataclasses
import datetime
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from aqua_jax.bench.workloads import random_prompt
from aqua_jax.errors import ConfigError

FORMATS = ("auto", "azure", "mooncake", "jsonl")
MOONCAKE_BLOCK = 512  # prompt tokens that one hash id stands for
_AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


@dataclasses.dataclass(frozen=True)
class TraceRequest:
    """One request to come.

    Attributes:
      arrival_s: seconds after the run's start.
      prompt: tokens.
      output: tokens to generate.
      user: fairness key.
      weight: share of its user's service.
      priority: for policies that use it; lower runs first.
      blocks: ids of the prompt's blocks of `MOONCAKE_BLOCK` tokens; what they don't cover is
        the request's own.
    """

    arrival_s: float
    prompt: int
    output: int
    user: str = ""
    weight: float = 1.0
    priority: int = 0
    blocks: tuple[int, ...] = ()


class _Line:
    """One record of the file; its errors name file, line and field."""

    def __init__(self, place: str, values: dict[str, Any]):
        self.place, self.values = place, values

    def fail(self, field: str, allowed: str) -> ConfigError:
        return ConfigError(f"{self.place}, {field}", self.values.get(field), allowed)

    def integer(self, field: str) -> int:
        """A count of at least 1; CSV has it as text."""
        value = self.values.get(field)
        if isinstance(value, str) and value.strip().isdecimal():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.fail(field, "an integer >= 1")
        return value

    def number(self, field: str, default: float | None = None, *, positive: bool = False) -> float:
        """A finite number >= 0 (or > 0)."""
        value: Any = self.values.get(field, default)
        if isinstance(value, str):  # of a CSV
            try:
                value = float(value)
            except ValueError:
                raise self.fail(field, "a number") from None
        ok = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not ok or not math.isfinite(value) or value < 0 or (positive and value == 0):
            raise self.fail(field, f"a number {'>' if positive else '>='} 0")
        return float(value)

    def service(self) -> dict[str, Any]:
        """Whose request it is and how it ranks: fields that a line of any format may have."""
        user, rank = self.values.get("user", ""), self.values.get("priority", 0)
        if not isinstance(user, str):
            raise self.fail("user", "text")
        if isinstance(rank, str):
            try:
                rank = int(rank)
            except ValueError:
                raise self.fail("priority", "an integer") from None
        if not isinstance(rank, int) or isinstance(rank, bool):
            raise self.fail("priority", "an integer")
        return {
            "user": user, "weight": self.number("weight", 1.0, positive=True), "priority": rank,
        }


def read_trace(
    path: str, form: str = "auto", *, rate: float = 1.0, limit: int | None = None
) -> list[TraceRequest]:
    """Reads a trace.

    Args:
      path: of the file.
      form: one of `FORMATS`; auto looks at the first line.
      rate: how many times faster than recorded the requests come; above 0.
      limit: take the first so many (in the order of the file); None: all.

    Returns:
      The requests by arrival; the first comes at 0.

    Raises:
      ConfigError: the file can't be read, is empty, or a line is wrong (with line and field).
    """
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as lines:
            first = lines.readline()
            form = _detect(first, path) if form == "auto" else form
            readers = {"azure": _azure, "mooncake": _mooncake, "jsonl": _own}
            numbered = enumerate(itertools.chain([first], lines), 1)
            found = list(itertools.islice(readers[form](numbered, path), limit))
    except OSError as error:
        raise ConfigError("trace", path, f"a file that can be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ConfigError("trace", path, "a text file in UTF-8") from error
    if not found:
        raise ConfigError("trace", path, "a file with at least one request")
    found.sort(key=lambda request: request.arrival_s)
    start = found[0].arrival_s
    return [
        dataclasses.replace(request, arrival_s=(request.arrival_s - start) / rate)
        for request in found
    ]


def _detect(first: str, path: str) -> str:
    if first.startswith(_AZURE[0]):
        return "azure"
    if '"hash_ids"' in first or '"input_length"' in first:
        return "mooncake"
    if first.lstrip().startswith("{"):
        return "jsonl"
    raise ConfigError(
        f"{path}, line 1", first.strip(),
        f"a header {','.join(_AZURE)} or a JSON object; or name it: --trace_format",
    )


def _azure(lines: Iterable[tuple[int, str]], path: str) -> Iterator[TraceRequest]:
    header: list[str] | None = None
    for number, text in lines:
        if not text.strip():
            continue
        cells = next(csv.reader([text.strip()]))
        if header is None:
            own = ("user", "weight", "priority")
            header = [name.lower() if name.lower() in own else name for name in cells]
            for name in _AZURE:
                if name not in header:
                    raise ConfigError(f"{path}, line {number}", text.strip(), f"a column {name}")
            continue
        line = _Line(f"{path}, line {number}", dict(zip(header, cells, strict=False)))
        try:
            moment = datetime.datetime.fromisoformat(line.values["TIMESTAMP"])
        except (ValueError, KeyError):
            raise line.fail("TIMESTAMP", "a date and time like 2023-11-16 18:15:46.68") from None
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=datetime.UTC)
        yield TraceRequest(
            moment.timestamp(), line.integer("ContextTokens"), line.integer("GeneratedTokens"),
            **line.service(),
        )


def _objects(lines: Iterable[tuple[int, str]], path: str) -> Iterator[_Line]:
    for number, text in lines:
        if not text.strip():
            continue
        try:
            values = json.loads(text)
        except (ValueError, RecursionError):
            values = None
        if not isinstance(values, dict):
            raise ConfigError(f"{path}, line {number}", text.strip(), "a JSON object")
        yield _Line(f"{path}, line {number}", values)


def _mooncake(lines: Iterable[tuple[int, str]], path: str) -> Iterator[TraceRequest]:
    for line in _objects(lines, path):
        blocks = line.values.get("hash_ids", [])
        if not isinstance(blocks, list) or not all(type(block) is int for block in blocks):
            raise line.fail("hash_ids", "a list of integers")
        yield TraceRequest(
            line.number("timestamp") / 1e3, line.integer("input_length"),
            line.integer("output_length"), blocks=tuple(blocks), **line.service(),
        )


def _own(lines: Iterable[tuple[int, str]], path: str) -> Iterator[TraceRequest]:
    for line in _objects(lines, path):
        yield TraceRequest(
            line.number("arrival_s"), line.integer("prompt_tokens"), line.integer("output_tokens"),
            **line.service(),
        )


def fit(requests: Sequence[TraceRequest], longest: int) -> tuple[list[TraceRequest], int]:
    """Cuts what is too long for the model.

    The prompt gives way first, down to half of `longest`; then the output.

    Args:
      requests: any.
      longest: tokens of prompt and output together, at least 2.

    Returns:
      (the requests, how many were cut).
    """
    fitted = []
    for one in requests:
        prompt = min(one.prompt, max(longest - one.output, longest // 2))
        output = min(one.output, longest - prompt)
        fitted.append(dataclasses.replace(one, prompt=prompt, output=output))
    cut = sum(new != old for new, old in zip(fitted, requests, strict=True))
    return fitted, cut


def prompt_ids(request: TraceRequest, number: int, seed: int, vocab: int) -> list[int]:
    """The request's prompt: blocks with equal ids are equal, everything else is its own.

    Args:
      request: what is asked.
      number: its place in the trace.
      seed: of the run; another seed shares nothing with this one.
      vocab: ids are below.
    """
    ids: list[int] = []
    for block in request.blocks:
        if len(ids) >= request.prompt:
            break
        ids += random_prompt(MOONCAKE_BLOCK, _mix(seed, block, 1), vocab)
    own = request.prompt - len(ids)
    if own > 0:
        ids += random_prompt(own, _mix(seed, number, 0), vocab)
    return ids[: request.prompt]


def _mix(seed: int, number: int, kind: int) -> int:
    return (seed * (1 << 62) + number) * 2 + kind
