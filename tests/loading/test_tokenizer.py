"""Tokenizers of directories: the same as the `tokenizers` package's, special tokens, bytes."""

from __future__ import annotations

import concurrent.futures
import json
import pathlib

import hypothesis
import hypothesis.strategies as st
import pytest

from aqua_jax.errors import ConfigError, ModelLoadError, RequestError
from aqua_jax.loading import NoTokenizer, load_tokenizer
from aqua_jax.loading.tokenizer import FastTokenizer
from tests.loading.limits import run_python
from tests.loading.vocabularies import TEXTS, byte_level, with_bos, write_tokenizer


@pytest.fixture(scope="module")
def words() -> FastTokenizer:
    return FastTokenizer(byte_level(), bos_token_id=1, eos_token_ids=(0,))


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(words: FastTokenizer, text: str) -> None:
    ids = words.encode(text)
    assert words.decode(ids, skip_special=False) == text
    assert all(0 <= token < words.vocab_size for token in ids)


@hypothesis.given(text=st.text(max_size=40))
def test_bytes_of_tokens_join_to_the_text(words: FastTokenizer, text: str) -> None:
    ids = [token for token in words.encode(text) if not words.is_special(token)]
    pieces = [words.token_bytes(token) for token in ids]
    assert None not in pieces
    assert b"".join(pieces).decode() == words.decode(ids)  # type: ignore[arg-type]


def test_special_tokens(words: FastTokenizer) -> None:
    end, tool = words.encode("<|end|>"), words.encode("<tool>")
    assert len(end) == len(tool) == 1
    assert words.is_special(end[0]) and not words.is_special(tool[0])
    assert words.token_bytes(end[0]) is None and words.token_bytes(tool[0]) == b"<tool>"
    assert words.decode([*end, *words.encode("a"), *tool]) == "a<tool>"
    assert words.decode([*end, *words.encode("a")], skip_special=False) == "<|end|>a"


def test_half_a_character_is_marked(words: FastTokenizer) -> None:
    ids = words.encode("🤖")
    assert len(ids) > 1
    assert words.decode(ids[:1]).endswith("\ufffd") and words.decode(ids) == "🤖"


@pytest.mark.parametrize("token", [-1, 10**6, 2**32, 2**70])
def test_ids_outside_the_vocabulary(words: FastTokenizer, token: int) -> None:
    assert words.token_text(token) == "" and words.token_bytes(token) is None
    assert not words.is_special(token)
    assert words.decode([*words.encode("a"), token]) == "a"


@pytest.mark.parametrize("text", [None, 3, b"bytes", ["a"], "lone \ud800 surrogate"])
def test_what_is_not_text(words: FastTokenizer, text: object) -> None:
    with pytest.raises(RequestError, match="prompt"):
        words.encode(text)  # type: ignore[arg-type]


def test_directory(tmp_path: pathlib.Path) -> None:
    backend = with_bos(byte_level(), "<|user|>")
    write_tokenizer(
        tmp_path, backend, eos_token={"content": "<|end|>", "__type": "AddedToken"},
        bos_token="<|user|>",
        chat_template="{{ bos_token }}{{ messages[0].content }}{{ eos_token }}",
    )  # fmt: skip
    words = load_tokenizer(str(tmp_path))
    end, user = backend.token_to_id("<|end|>"), backend.token_to_id("<|user|>")
    assert words.eos_token_ids == (end,) and words.bos_token_id == user
    for text in TEXTS:
        assert words.encode(text) == backend.encode(text).ids
        assert words.encode(text, add_special=False) == words.encode(text)[1:]
    prompt = words.apply_chat_template([{"role": "user", "content": "hi"}])
    assert prompt == "<|user|>hi<|end|>"
    assert words.encode(prompt, add_special=False)[::len(words.encode("hi"))] == [user, end]


def test_truncation_and_padding_in_the_file_are_switched_off(tmp_path: pathlib.Path) -> None:
    backend = byte_level()
    backend.enable_truncation(3)
    backend.enable_padding(length=64)
    write_tokenizer(tmp_path, backend)
    words = load_tokenizer(str(tmp_path))
    assert words.decode(words.encode("The quick brown fox")) == "The quick brown fox"


@pytest.mark.parametrize("where", ["config", "named", "jinja", "json"])
def test_places_of_a_chat_template(tmp_path: pathlib.Path, where: str) -> None:
    source = "<{{ messages[0].content }}>"
    settings: dict[str, object] = {"config": {"chat_template": source}, "named": {
        "chat_template": [{"name": "tool_use", "template": "x"},
                          {"name": "default", "template": source}]}}.get(where, {})  # fmt: skip
    write_tokenizer(tmp_path, byte_level(), **settings)
    if where == "jinja":
        (tmp_path / "chat_template.jinja").write_text(source)
    if where == "json":
        (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": source}))
    words = load_tokenizer(str(tmp_path))
    assert words.apply_chat_template([{"role": "user", "content": "hi"}]) == "<hi>"


def test_without_a_chat_template(words: FastTokenizer) -> None:
    with pytest.raises(RequestError, match=r"messages.*no chat template"):
        words.apply_chat_template([{"role": "user", "content": "hi"}])


def test_special_tokens_map_fills_gaps(tmp_path: pathlib.Path) -> None:
    write_tokenizer(tmp_path, byte_level())
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    assert load_tokenizer(str(tmp_path)).eos_token_ids == (0,)


def test_nothing_there(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ModelLoadError, match=r"no tokenizer\.json"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(ConfigError, match="tokenizer"):
        load_tokenizer(str(tmp_path / "gone"))
    assert isinstance(load_tokenizer(str(tmp_path), missing_ok=True), NoTokenizer)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"{}", b"[1]", b"\xff", b'{"model": {"type": "X"}}']
)
def test_broken_tokenizer_files(tmp_path: pathlib.Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ModelLoadError, match=r"tokenizer\.json"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_broken_settings(tmp_path: pathlib.Path, name: str) -> None:
    write_tokenizer(tmp_path, byte_level())
    (tmp_path / name).write_text("{")
    with pytest.raises(ModelLoadError, match=name):
        load_tokenizer(str(tmp_path))


def test_many_threads_at_once(tmp_path: pathlib.Path) -> None:
    write_tokenizer(tmp_path, byte_level(), chat_template="{{ messages[0].content }}")
    words = load_tokenizer(str(tmp_path))
    expected = [words.encode(text) for text in TEXTS]

    def work(index: int) -> bool:
        text = TEXTS[index % len(TEXTS)]
        ids = words.encode(text)
        chat = words.apply_chat_template([{"role": "user", "content": text}])
        return ids == expected[index % len(TEXTS)] and words.decode(ids, False) == text == chat

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(400)))


def test_importing_costs_no_heavy_package() -> None:
    code = """
import sys
import aqua_jax.loading
from aqua_jax.loading import load_tokenizer
load_tokenizer(sys.argv[1])
print([name for name in ("jax", "flax", "torch", "transformers", "gguf") if name in sys.modules])
"""
    folder = pathlib.Path(run_python("import tempfile; print(tempfile.mkdtemp())").strip())
    write_tokenizer(folder, byte_level(), chat_template="x")
    assert run_python(code, str(folder)).strip() == "[]"
