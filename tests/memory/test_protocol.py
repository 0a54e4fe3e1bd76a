"""Messages from bytes that may be cut anywhere, or be anything."""

import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aqua_jax.errors import ProtocolError
from aqua_jax.memory.protocol import LIMIT, MAX_MESSAGE, Decoder, encode, text, whole


def read(*pieces):
    decoder, found = Decoder(), []
    for piece in pieces:
        decoder.feed(piece)
        while (message := decoder.next()) is not None:
            found.append(message)
    return found


@given(st.lists(st.integers(0, LIMIT), max_size=4), st.data())
def test_messages_survive_being_cut_anywhere(values, data):
    stream = b"".join(encode("borrow", id=value, name="ü") for value in values)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=6)))
    pieces = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    assert read(*pieces) == [{"type": "borrow", "id": value, "name": "ü"} for value in values]


@given(st.binary(max_size=200))
def test_any_bytes_are_messages_or_a_typed_error(data):
    try:
        read(data)
    except ProtocolError as error:
        assert error.field in ("length", "message")


def framed(body):
    return struct.pack("<I", len(body)) + body


@pytest.mark.parametrize(
    "body",
    [b"[]", b"{}", b"1.", b'{"type":1}', b'{"type":"a"', b"\xff\xfe", b"NaN ", b"[" * 2000,
     b'{"type":"a","x":' + b"9" * 4000 + b"}", b'{"type":"a","x":Infinity}', b'"type"'],
)
def test_what_is_no_message_is_refused(body):
    try:
        found = read(framed(body))
    except ProtocolError:
        return
    # A number of 4,000 digits is JSON; it is refused where a field is read.
    with pytest.raises(ProtocolError):
        whole(found[0], "x")


@pytest.mark.parametrize("length", [0, 1, MAX_MESSAGE + 1, 2**32 - 1])
def test_lengths_are_bounded_before_anything_is_kept(length):
    with pytest.raises(ProtocolError, match="length"):
        read(struct.pack("<I", length))


@pytest.mark.parametrize(
    "value", [None, True, -1, 2**63, 1.0, "1", [], {}, float("1e300")]
)
def test_numbers_are_whole_and_in_range(value):
    with pytest.raises(ProtocolError) as caught:
        whole(json.loads(json.dumps({"bytes": value})), "bytes")
    assert caught.value.field == "bytes"
    with pytest.raises(ProtocolError):
        whole({}, "bytes")


@pytest.mark.parametrize("value", [None, 5, "x" * 201, "a\nb", "\x1b[2J", "\ud800"])
def test_names_are_printable(value):
    with pytest.raises(ProtocolError):
        text({"name": value}, "name")


def test_messages_too_long_to_send_are_refused():
    with pytest.raises(ProtocolError):
        encode("hello", name="x" * MAX_MESSAGE)
