"""tokenizer.model files: the vocabulary they hold, and damage."""

from __future__ import annotations

import json
import pathlib
import struct
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest

from aqua_jax.errors import ModelLoadError
from aqua_jax.loading import load_tokenizer
from aqua_jax.loading.sentencepiece import metadata
from tests.loading.test_gguf_tokenizer import made, reference_sentencepiece, sentencepiece_metadata
from tests.loading.vocabularies import sentencepiece_pieces


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def message(field: int, content: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(content)) + content


def number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value)


def model_file(model_type: int = 2, prefix: bool = True) -> bytes:
    """A ModelProto with the small vocabulary, and fields that a reader must step over."""
    pieces = b"".join(
        message(1, message(1, piece.encode()) + b"\x15" + struct.pack("<f", score)
                + (number(3, kind) if kind != 1 else b""))
        for piece, score, kind in sentencepiece_pieces()
    )  # fmt: skip
    trainer = number(3, model_type) + number(4, 32000) + message(1, b"corpus.txt")
    normalizer = message(1, b"identity") + number(3, prefix) + number(4, 0)
    double = varint(9 << 3 | 1) + bytes(8)
    return pieces + message(2, trainer) + message(3, normalizer) + double


def write(path: pathlib.Path, **settings: Any) -> str:
    (path / "tokenizer.model").write_bytes(model_file())
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return str(path)


TEXTS = ["hello world", "the the  quick", " hello", "x漢y", "🙂", "line\nbreak", "HELLO", ""]


def test_same_as_sentencepiece(tmp_path: pathlib.Path) -> None:
    words = load_tokenizer(write(tmp_path, eos_token="</s>", bos_token="<s>"))
    assert words.bos_token_id == 1 and words.eos_token_ids == (2,)
    for text in TEXTS:
        assert words.encode(text) == [1, *reference_sentencepiece(text)]
        assert words.encode(text, add_special=False) == reference_sentencepiece(text)
        assert words.decode(words.encode(text)) == text


def test_switches_and_added_tokens(tmp_path: pathlib.Path) -> None:
    size = len(sentencepiece_pieces())
    added = {
        str(size + 1): {"content": "<tool>", "special": False},
        str(size): {"content": "<|end|>", "special": True},
        "0": {"content": "<unk>", "special": True}, "x": {"content": "no"}, "7": 3,
    }  # fmt: skip
    words = load_tokenizer(
        write(tmp_path, add_bos_token=False, add_eos_token=True, added_tokens_decoder=added)
    )
    assert words.encode("hello") == [*reference_sentencepiece("hello"), 2]
    assert words.encode("<|end|><tool>", add_special=False) == [size, size + 1]
    assert words.is_special(size) and not words.is_special(size + 1)
    assert words.vocab_size == size + 2


def test_metadata_is_that_of_a_gguf_file() -> None:
    found = made(metadata(model_file(), "m"))
    expected = made(sentencepiece_metadata(add_bos_token=False))
    assert json.loads(found.backend.to_str()) == json.loads(expected.backend.to_str())
    bare = made(metadata(model_file(prefix=False), "m"))
    assert bare.encode(" hello") == reference_sentencepiece("hello")


def test_other_kinds_of_model_are_refused() -> None:
    with pytest.raises(ModelLoadError, match=r"model type 1; allowed: 2 \(BPE\)"):
        metadata(model_file(model_type=1), "m")


@pytest.mark.parametrize(
    "content",
    [b"", b"\x00", b"\xff" * 40, b"\x0a\xff\xff\xff\xff\x0f", b"hello", number(1, 5),
     message(1, number(1, 3)), message(1, message(1, b"\xff")), varint(1 << 3 | 5) + b"ab"],
)  # fmt: skip
def test_what_is_no_model(tmp_path: pathlib.Path, content: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(ModelLoadError, match=r"tokenizer\.model: not a sentencepiece model"):
        load_tokenizer(str(tmp_path))


@hypothesis.given(data=st.data())
def test_damage_is_an_error_or_harmless(data: st.DataObject) -> None:
    content = bytearray(model_file())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))]
    try:
        values = metadata(bytes(content), "somewhere")
    except ModelLoadError as error:
        assert "somewhere" in str(error)
    else:
        assert len(values["tokenizer.ggml.tokens"]) == len(values["tokenizer.ggml.scores"])
