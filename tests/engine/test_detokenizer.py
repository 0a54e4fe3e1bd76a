"""Text from tokens: exact for any token sequence, and stop strings wherever tokens are cut."""

from __future__ import annotations

import functools
import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from aqua_jax.config import SamplingParams
from aqua_jax.engine.detokenizer import Detokenizer, StopMatcher
from aqua_jax.engine.token_text import BytesDecoder, WindowDecoder, make_decoder
from aqua_jax.loading.tokenizer import FastTokenizer
from tests.scale import scaled

WORDS = "The quick brown fox jumps over lazy dogs; näïve café 你好世界 مرحبا 🙂👩‍👩‍👧 don't stop"


@functools.cache
def byte_level() -> FastTokenizer:
    """GPT-2's kind: tokens are bytes, so characters are split between them."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=["<|end|>", "<|user|>"],
    )
    backend.train_from_iterator([WORDS] * 4, trainer)
    backend.add_tokens([AddedToken("<tool>", special=False)])
    return FastTokenizer(backend)


@functools.cache
def sentencepiece(strip: bool = True) -> FastTokenizer:
    """Llama 2's kind: words with a leading space, byte fallback for the rest."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    for piece in "▁ ▁▁ ▁The ▁fox s é 你 好 ▁你 🙂 . ▁don ' t".split():
        vocab[piece] = len(vocab)
    backend = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    undo = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(undo + ([decoders.Strip(" ", 1, 0)] if strip else []))
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return FastTokenizer(backend)


@functools.cache
def metaspace() -> FastTokenizer:
    """T5's kind of decoder: the first word loses its space."""
    words = ["▁", "▁the", "▁fox", "es", "é", "▁▁"]
    vocab = {word: index for index, word in enumerate(["<unk>", "</s>", *words])}
    backend = Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
    backend.decoder = decoders.Metaspace("▁", "always")
    backend.add_special_tokens(["</s>"])
    return FastTokenizer(backend)


@functools.cache
def wordpiece() -> FastTokenizer:
    """BERT's kind: tokens have no fixed bytes, spaces depend on what follows."""
    words = ["[UNK]", "[SEP]", "the", "fox", "##es", "##s", "don", "'", "t", ".", ","]
    backend = Tokenizer(
        models.WordPiece({word: index for index, word in enumerate(words)}, unk_token="[UNK]")
    )
    backend.decoder = decoders.WordPiece(cleanup=False)
    backend.add_special_tokens(["[SEP]"])
    return FastTokenizer(backend)


TOKENIZERS = {
    "byte_level": byte_level,
    "sentencepiece": sentencepiece,
    "sentencepiece_unstripped": lambda: sentencepiece(False),
    "metaspace": metaspace,
    "wordpiece": wordpiece,
}


def stream(tokenizer, ids, skip_special=True, **params):
    """The pieces of text that appear with each token, the last one at the end."""
    detokenizer = Detokenizer(
        tokenizer, SamplingParams(skip_special_tokens=skip_special, max_tokens=None, **params)
    )
    pieces, shown = [], ""
    for token in ids:
        stop = detokenizer.append(token)
        assert detokenizer.text.startswith(shown)
        pieces.append(detokenizer.text[len(shown) :])
        shown = detokenizer.text
        if stop is not None:
            return pieces, stop
    stop = detokenizer.finish()
    assert detokenizer.text.startswith(shown)
    pieces.append(detokenizer.text[len(shown) :])
    return pieces, stop


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("skip_special", [True, False])
def test_deltas_of_random_tokens_join_to_the_decoded_text(kind, skip_special):
    tokenizer = TOKENIZERS[kind]()
    draw = random.Random(7)
    for _ in range(scaled(300)):
        ids = [draw.randrange(tokenizer.vocab_size + 2) for _ in range(draw.randrange(1, 40))]
        pieces, _ = stream(tokenizer, ids, skip_special)
        assert "".join(pieces) == tokenizer.decode(ids, skip_special), ids


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_deltas_of_random_bytes_join_to_the_decoded_text(kind):
    """Runs of byte tokens, valid and not, where the two kinds of decoding differ most."""
    tokenizer = TOKENIZERS[kind]()
    if kind == "byte_level":
        ids_of = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size)}
    else:
        ids_of = {bytes([byte]): 3 + byte for byte in range(256)}
    draw = random.Random(11)
    for _ in range(scaled(300)):
        data = bytearray("é你🙂 a".encode() * 2)
        for _ in range(draw.randrange(4)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        start = draw.randrange(len(data))
        ids = [ids_of[bytes([byte])] for byte in data[start:]]
        if draw.random() < 0.5:
            ids.insert(draw.randrange(len(ids)), tokenizer.vocab_size - 1)
        pieces, _ = stream(tokenizer, ids)
        assert "".join(pieces) == tokenizer.decode(ids), ids


def test_a_character_is_never_split():
    tokenizer = byte_level()
    ids_of = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size)}
    text = "né你🙂x"
    pieces, _ = stream(tokenizer, [ids_of[bytes([byte])] for byte in text.encode()])
    assert [piece for piece in pieces if piece] == list(text)


def test_an_unfinished_character_is_shown_only_at_the_end():
    tokenizer = byte_level()
    ids_of = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size)}
    ids = [ids_of[b"a"], ids_of["你".encode()[:1]]]
    assert stream(tokenizer, ids)[0] == ["a", "", "\ufffd"]


def test_decoders_are_chosen_by_what_tokens_stand_for():
    assert isinstance(make_decoder(byte_level(), True), BytesDecoder)
    assert isinstance(make_decoder(sentencepiece(), True), BytesDecoder)
    assert isinstance(make_decoder(wordpiece(), True), WindowDecoder)


def reference_stop(text, stops, armed_from=0):
    """(end, stop) of the stop string completed first at or after `armed_from`, longest on a tie."""
    for end in range(armed_from + 1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return end, max(found, key=len)
    return None


@given(
    st.text("ab", max_size=60), st.lists(st.text("ab", min_size=1, max_size=5), max_size=4),
    st.data(),
)
def test_stop_matcher_equals_a_search_whatever_the_cuts(text, stops, data):
    matcher = StopMatcher(stops)
    position = 0
    while position < len(text):
        size = data.draw(st.integers(1, len(text) - position))
        match = matcher.feed(text[position : position + size])
        if match is not None:
            assert (position + match[0], match[1]) == reference_stop(text, stops)
            return
        position += size
        longest = max(
            (n for stop in stops for n in range(len(stop)) if text[:position].endswith(stop[:n])),
            default=0,
        )
        assert matcher.pending == longest
    assert reference_stop(text, stops) is None


LETTERS = ["a", "b", "ab", "ba", "aab", "abab"]


@functools.cache
def letters() -> FastTokenizer:
    """Six tokens over two letters: every text can be cut in many ways."""
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(LETTERS)}, []))
    backend.decoder = decoders.ByteLevel()
    return FastTokenizer(backend)


@given(
    st.lists(st.integers(0, 5), max_size=20),
    st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=3),
    st.booleans(), st.integers(0, 4),
)
def test_stop_strings_across_tokens(ids, stops, include, min_tokens):
    text = "".join(LETTERS[token] for token in ids)
    free = len("".join(LETTERS[token] for token in ids[:min_tokens]))
    expected = reference_stop(text, stops, free)
    pieces, stop = stream(
        letters(), ids, stop=tuple(stops), include_stop_str_in_output=include,
        min_tokens=min_tokens,
    )
    if expected is None:
        assert stop is None and "".join(pieces) == text
        return
    end, found = expected
    assert stop == found
    assert "".join(pieces) == (text[:end] if include else text[: end - len(found)])


def test_nothing_of_a_stop_string_is_shown_before_it_is_certain():
    ids = [0, 1, 0, 0, 1, 1]  # a b a a b b
    pieces, stop = stream(letters(), ids, stop=("abb",))
    assert pieces == ["", "", "ab", "a", "", ""] and stop == "abb"
    pieces, stop = stream(letters(), [0, 1], stop=("abb",))
    assert pieces == ["", "", "ab"] and stop is None


def test_the_first_completed_stop_wins_and_later_tokens_change_nothing():
    detokenizer = Detokenizer(letters(), SamplingParams(stop=("bab", "ab")))
    assert detokenizer.append(5) == "ab" and detokenizer.text == ""
    assert detokenizer.append(0) == "ab" and detokenizer.text == ""
    assert detokenizer.finish() == "ab" and detokenizer.stop_reason == "ab"


def test_a_stop_completed_by_the_flush_counts():
    tokenizer = byte_level()
    ids_of = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size)}
    ids = [ids_of[b"a"], ids_of["é".encode()[:1]]]
    pieces, stop = stream(tokenizer, ids, stop=("\ufffd",))
    assert "".join(pieces) == "a" and stop == "\ufffd"


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece", "wordpiece"])
def test_work_per_token_does_not_grow(kind):
    """The second ten thousand tokens take no longer than the first, even if all bytes are bad."""
    tokenizer = TOKENIZERS[kind]()
    if kind == "byte_level":
        ids = [i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) == b"\xe4"]
    else:
        ids = [3] if kind == "wordpiece" else [3 + 0xE4]
    detokenizer = Detokenizer(tokenizer, SamplingParams(stop=("zz",)))
    times = []
    for _ in range(2):
        start = time.perf_counter()
        for _ in range(10_000):
            detokenizer.append(ids[0])
        times.append(time.perf_counter() - start)
    assert times[1] < 8 * times[0] + 0.05
