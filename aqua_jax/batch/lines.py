"""JSONL, read line by line in bounded memory, and written. No jax."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from typing import Any, BinaryIO

from aqua_jax.errors import RequestError

MAX_LINE_BYTES = 32 * 1024 * 1024


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of the input.

    Attributes:
      number: counted from 1.
      data: its bytes without the line's end; None when it is longer than the limit.
      size: bytes it takes in the file, its end included.
    """

    number: int
    data: bytes | None
    size: int


def read_lines(file: BinaryIO, limit: int = MAX_LINE_BYTES) -> Iterator[Line]:
    """Yields every line; one longer than `limit` bytes is skipped over without being kept.

    A byte order mark at the start is dropped, so are carriage returns at line ends. What follows
    the last newline is a line only if it isn't empty.
    """
    number = 0
    while True:
        data = file.readline(limit + 1)
        if not data:
            return
        number += 1
        size = len(data)
        if size > limit and not data.endswith(b"\n"):
            while data and not data.endswith(b"\n"):
                data = file.readline(1 << 20)
                size += len(data)
            yield Line(number, None, size)
            continue
        if number == 1:
            data = data.removeprefix(b"\xef\xbb\xbf")
        yield Line(number, data.rstrip(b"\r\n"), size)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is outside the range of numbers")
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


_DECODER = json.JSONDecoder(parse_constant=_no_constant, parse_float=_finite)


def parse_json(line: Line) -> Any:
    """The JSON value in a line.

    Raises:
      RequestError: field "line"; too long, empty, not UTF-8 or not JSON.
    """
    if line.data is None:
        raise RequestError("line", f"{line.size} bytes", f"at most {MAX_LINE_BYTES} bytes")
    if not line.data.strip():
        raise RequestError("line", "", "a JSON object; this line is empty")
    try:
        return _DECODER.decode(line.data.decode("utf-8").strip())
    except UnicodeDecodeError as error:
        raise RequestError("line", _excerpt(line.data), f"UTF-8 text ({error.reason})") from None
    except RecursionError:
        raise RequestError("line", _excerpt(line.data), "JSON nested less deeply") from None
    except ValueError as error:
        raise RequestError("line", _excerpt(line.data), f"a JSON object ({error})") from None


def parse_object(line: Line) -> dict[str, Any]:
    """The JSON object in a line.

    Raises:
      RequestError: field "line"; no JSON (see `parse_json`), or not an object.
    """
    value = parse_json(line)
    if not isinstance(value, dict):
        raise RequestError("line", value, "a JSON object")
    return value


# Legal in JSON strings, but line ends to some readers (Python's str.splitlines among them).
_LINE_ENDS = str.maketrans({"\x85": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"})


def json_line(record: dict[str, Any]) -> str:
    """A record as one line of JSON, its end included; lone surrogates become question marks.

    Raises:
      ValueError: a number that JSON can't write.
    """
    text = json.dumps(record, ensure_ascii=False, allow_nan=False)
    if not text.isascii():
        text = text.translate(_LINE_ENDS).encode("utf-8", "replace").decode("utf-8")
    return text + "\n"


def _excerpt(data: bytes) -> str:
    return data[:80].decode("utf-8", "backslashreplace")
