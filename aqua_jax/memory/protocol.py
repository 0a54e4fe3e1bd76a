"""The messages between lender and borrower: small JSON objects, each with its length before it.

A message is 4 bytes, its length little-endian, and a JSON object whose `type` says what it is.
Numbers are integers from 0 to 2^63 - 1 (`deadline_ms` too). Nothing in a message is trusted; what
can't be understood is a `ProtocolError`, and ends that one connection.

From the borrower (`id` comes back in the answer):

| type | fields | answer |
|---|---|---|
| hello | version, name | welcome, with the arena's descriptor beside it, or error |
| borrow | id, bytes | granted, or refused |
| give_back | id, generation, offset, bytes | freed |
| resize | id, bytes | resized: lend no more than so much |
| status | id | status |

From the lender:

| type | fields |
|---|---|
| welcome | version, name, bytes, memory (host, cuda), device (its name) |
| granted | id, generation, offset, bytes |
| refused | id, free, longest |
| freed, resized | id |
| status | id, bytes, limit, free, lent, asked, leases |
| reclaim | generation, keep, deadline_ms: of this lease keep at most so many bytes |
| error | field, value, allowed; then the connection ends |

`reclaim` names what may be kept, not what is wanted: it means the same whether it crosses a
`give_back` on its way or not.
"""

from __future__ import annotations

import json
import struct
from typing import Any

from aqua_jax.errors import ProtocolError

VERSION = 1
MAX_MESSAGE = 4096
LIMIT = 2**63 - 1
_LENGTH = struct.Struct("<I")

Message = dict[str, Any]


def encode(kind: str, **fields: int | str) -> bytes:
    """A message ready to send."""
    body = json.dumps({"type": kind, **fields}, separators=(",", ":")).encode()
    if len(body) > MAX_MESSAGE:
        raise ProtocolError("message", len(body), f"at most {MAX_MESSAGE} bytes")
    return _LENGTH.pack(len(body)) + body


def _constant(text: str) -> None:
    raise ValueError(f"{text} is not a number")


class Decoder:
    """Messages out of a stream of bytes that may be cut anywhere."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> None:
        """Takes in bytes as they came."""
        self._buffer += data

    def next(self) -> Message | None:
        """The next complete message; None if it hasn't all arrived.

        Raises:
          ProtocolError: what has arrived is no message; the stream can't be read further.
        """
        if len(self._buffer) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._buffer)
        if not 2 <= length <= MAX_MESSAGE:
            raise ProtocolError("length", length, f"2 to {MAX_MESSAGE} bytes")
        end = _LENGTH.size + length
        if len(self._buffer) < end:
            return None
        body = bytes(self._buffer[_LENGTH.size : end])
        del self._buffer[:end]
        try:
            message = json.loads(body, parse_constant=_constant)
        except (ValueError, RecursionError) as error:
            raise ProtocolError("message", body[:40], f"JSON ({error})") from error
        if not isinstance(message, dict) or not isinstance(message.get("type"), str):
            raise ProtocolError("message", body[:40], "an object with a type")
        return message


def whole(message: Message, field: str, low: int = 0, high: int = LIMIT) -> int:
    """An integer field.

    Raises:
      ProtocolError: it is missing, no integer, or not from `low` to `high`.
    """
    value = message.get(field)
    if type(value) is not int or not low <= value <= high:
        raise ProtocolError(field, value, f"an integer from {low} to {high}")
    return value


def text(message: Message, field: str, most: int = 200) -> str:
    """A text field of at most `most` characters, without control characters.

    Raises:
      ProtocolError: it is missing, or something else.
    """
    value = message.get(field)
    if not isinstance(value, str) or len(value) > most or not all(map(str.isprintable, value)):
        raise ProtocolError(field, value, f"at most {most} printable characters")
    return value
