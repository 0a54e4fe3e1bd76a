"""Tokenizers from GGUF metadata, against the tokenizers they were made from."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from aqua_jax.errors import ModelLoadError
from aqua_jax.loading.gguf_tokenizer import build
from aqua_jax.loading.tokenizer import FastTokenizer
from tests.loading.vocabularies import TEXTS, byte_level, sentencepiece_pieces

# As in the tokenizer.json files of Llama 3 and Qwen2.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level_metadata(source: Tokenizer, pre: str, **extra: Any) -> dict[str, Any]:
    state = json.loads(source.to_str())
    by_id = {index: token for token, index in source.get_vocab().items()}
    tokens = [by_id[index] for index in range(len(by_id))]
    kinds = {token["id"]: 3 if token["special"] else 4 for token in state["added_tokens"]}
    merges = [" ".join(pair) for pair in state["model"]["merges"]]
    metadata = {
        "model": "gpt2", "pre": pre, "tokens": tokens, "merges": merges,
        "token_type": np.array([kinds.get(index, 1) for index in range(len(tokens))], np.int32),
        "eos_token_id": 0, "bos_token_id": 1, **extra,
    }  # fmt: skip
    return {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}


def sentencepiece_metadata(**extra: Any) -> dict[str, Any]:
    pieces = sentencepiece_pieces()
    metadata = {
        "model": "llama", "tokens": [piece for piece, _, _ in pieces],
        "scores": np.array([score for _, score, _ in pieces], np.float32),
        "token_type": np.array([kind for _, _, kind in pieces], np.int32),
        "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0, **extra,
    }  # fmt: skip
    return {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}


def made(metadata: dict[str, Any]) -> FastTokenizer:
    found = build("m.gguf", metadata)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("pre", "steps"),
    [
        ("default", [pre_tokenizers.ByteLevel(False)]),
        ("gpt-2", [pre_tokenizers.ByteLevel(False)]),
        ("smollm", [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)]),
        ("llama-bpe", [pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
                       pre_tokenizers.ByteLevel(False, use_regex=False)]),
        ("qwen2", [pre_tokenizers.Split(Regex(QWEN2), "isolated"),
                   pre_tokenizers.ByteLevel(False, use_regex=False)]),
    ],
)  # fmt: skip
def test_byte_level(pre: str, steps: list[Any]) -> None:
    source = byte_level()
    metadata = byte_level_metadata(source, pre, add_bos_token=False)
    source.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if pre == "qwen2":
        source.normalizer = normalizers.NFC()
    if pre == "llama-bpe":
        source.model.ignore_merges = True
    words = made(metadata)
    for text in TEXTS:
        assert words.encode(text) == source.encode(text).ids, text
        ids = words.encode(text)
        assert words.decode(ids, False) == source.decode(ids, skip_special_tokens=False)
    assert words.eos_token_ids == (0,) and words.bos_token_id == 1
    assert words.is_special(0) and words.token_bytes(words.encode("<tool>")[0]) == b"<tool>"


def test_beginning_of_sequence_follows_the_file() -> None:
    source = byte_level()
    plain = source.encode("hi").ids
    for pre, flag, expected in (
        ("llama-bpe", None, [1]), ("llama-bpe", False, []), ("qwen2", None, []),
        ("smollm", True, [1]),
    ):  # fmt: skip
        extra = {} if flag is None else {"add_bos_token": flag}
        words = made(byte_level_metadata(source, pre, **extra))
        assert words.encode("hi") == expected + plain
        assert words.encode("hi", add_special=False) == plain
    words = made(byte_level_metadata(source, "smollm", add_bos_token=False, add_eos_token=True))
    assert words.encode("hi") == [*plain, 0]


def test_ignored_merges_take_whole_words() -> None:
    tokens = ["a", "b", "c", "ab", "abc"]
    metadata = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "llama-bpe",
                "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": ["a b"]}  # fmt: skip
    assert made(metadata).encode("abc") == [4]
    metadata["tokenizer.ggml.pre"] = "default"
    assert made(metadata).encode("abc") == [3, 2]


def reference_sentencepiece(text: str) -> list[int]:
    """Sentencepiece's BPE, written out: join the adjacent pair of best score until none joins."""
    pieces = sentencepiece_pieces()
    ids = {piece: index for index, (piece, _, _) in enumerate(pieces)}
    symbols = list("▁" + text.replace(" ", "▁")) if text else []
    while True:
        joins = [
            (-pieces[ids[left + right]][1], at)
            for at, (left, right) in enumerate(itertools.pairwise(symbols))
            if left + right in ids and pieces[ids[left + right]][2] == 1
        ]
        if not joins:
            break
        _, at = min(joins)
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    found: list[int] = []
    for symbol in symbols:
        found += [ids[symbol]] if symbol in ids else [3 + byte for byte in symbol.encode()]
    return found


@pytest.mark.parametrize(
    "text",
    ["hello world", "the the  quick", "a", "ll", " hello", "hello    world ", "x漢y", "🙂", "é",
     "line\nbreak", "HELLO", "there"],
)  # fmt: skip
def test_sentencepiece(text: str) -> None:
    words = made(sentencepiece_metadata())
    assert words.encode(text) == [1, *reference_sentencepiece(text)]
    assert words.decode(words.encode(text)) == text


def test_sentencepiece_bytes() -> None:
    words = made(sentencepiece_metadata())
    ids = words.encode("hello 漢", add_special=False)
    pieces = [words.token_bytes(token) for token in ids]
    assert b"".join(pieces).decode() == " hello 漢"  # type: ignore[arg-type]
    assert words.token_bytes(3 + 0x41) == b"A" and words.token_bytes(1) is None


def test_sentencepiece_without_space_prefix() -> None:
    words = made(sentencepiece_metadata(add_space_prefix=False, add_bos_token=False))
    prefixed = made(sentencepiece_metadata(add_bos_token=False))
    assert words.encode(" hello") == prefixed.encode("hello")
    assert words.decode(words.encode(" hello")) == " hello"


def test_special_tokens_in_text_are_recognised() -> None:
    words = made(sentencepiece_metadata())
    assert words.encode("hello</s>")[-1] == 2
    assert words.decode([1, *words.encode("hello", False), 2]) == "hello"


def test_matches_the_layout_transformers_writes() -> None:
    """The same vocabulary as a tokenizer.json of Llama 2's kind: one merge list, byte fallback."""
    pieces = sentencepiece_pieces()
    words = made(sentencepiece_metadata(add_bos_token=False))
    merges = [tuple(pair) for pair in json.loads(words.backend.to_str())["model"]["merges"]]
    other = Tokenizer(
        models.BPE({piece: i for i, (piece, _, _) in enumerate(pieces)}, merges,
                   unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )  # fmt: skip
    other.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    other.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    for text in ("hello world", "the quick", "漢 é!"):
        assert words.encode(text) == other.encode(text).ids
        assert words.decode(words.encode(text)) == other.decode(other.encode(text).ids)


@pytest.mark.parametrize("model", [None, "no_vocab"])
def test_no_tokenizer(model: str | None) -> None:
    assert build("m.gguf", {} if model is None else {"tokenizer.ggml.model": model}) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "bert"}, "model: got 'bert'; allowed: gpt2, llama"),
        ({"pre": "unheard-of"}, "pre: got 'unheard-of'"),
        ({"tokens": []}, "tokens: empty"),
        ({"tokens": 3}, "tokens: allowed: an array of strings"),
        ({"merges": ["nonsense"]}, "merges: 'nonsense'"),
        ({"merges": ["zzz yyy"]}, "merges: 'zzz yyy'"),
        ({"merges": None}, "merges: allowed"),
        ({"token_type": np.zeros(2, np.int32)}, "token_type: allowed: an array of"),
    ],
)
def test_broken_byte_level(change: dict[str, Any], message: str) -> None:
    metadata = byte_level_metadata(byte_level(), "default")
    metadata |= {f"tokenizer.ggml.{key}": value for key, value in change.items()}
    with pytest.raises(ModelLoadError, match=message):
        build("m.gguf", metadata)


@pytest.mark.parametrize("scores", [None, np.zeros(3, np.float32), [1.0]])
def test_broken_scores(scores: Any) -> None:
    with pytest.raises(ModelLoadError, match="scores"):
        build("m.gguf", sentencepiece_metadata(scores=scores))


def test_repeated_tokens_are_kept_apart() -> None:
    metadata = byte_level_metadata(byte_level(), "default")
    tokens = metadata["tokenizer.ggml.tokens"]
    metadata["tokenizer.ggml.tokens"] = [*tokens, "[PAD]", "[PAD]"]
    metadata["tokenizer.ggml.token_type"] = np.append(
        metadata["tokenizer.ggml.token_type"], [5, 5]
    ).astype(np.int32)
    assert made(metadata).vocab_size == len(tokens) + 2


@pytest.mark.parametrize("index", [-1, 10**6, True, "x"])
def test_special_ids_outside_the_vocabulary(index: Any) -> None:
    words = made(byte_level_metadata(byte_level(), "llama-bpe", bos_token_id=index))
    assert words.encode("hi")[0] != index
