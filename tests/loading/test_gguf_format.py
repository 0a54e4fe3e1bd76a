"""The GGUF header parser: the same values as the gguf package, and nothing believed unchecked."""

from __future__ import annotations

import os
import pathlib
import struct

import gguf
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from aqua_jax.errors import ConfigError, ModelLoadError
from aqua_jax.loading import NoTokenizer, gguf_format, load
from aqua_jax.loading.gguf import GGUFCheckpoint
from tests.loading.checkpoints import GGUF_CONFIG, write_gguf
from tests.loading.limits import run_python


def string(text: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text


def header(
    body: bytes = b"", *, tensors: int = 0, keys: int = 0, version: int = 3, magic: bytes = b"GGUF"
) -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, keys) + body


def tensor(
    name: bytes = b"t", dims: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0
) -> bytes:
    sizes = struct.pack(f"<{len(dims)}Q", *dims)
    return string(name) + struct.pack("<I", len(dims)) + sizes + struct.pack("<IQ", kind, offset)


def parse(path: pathlib.Path, content: bytes) -> gguf_format.Header:
    path.write_bytes(content)
    fd, found = gguf_format.open_header(str(path))
    os.close(fd)
    return found


ARCHITECTURE = string(b"general.architecture") + struct.pack("<I", 8) + string(b"llama")


def test_values_of_every_type(tmp_path: pathlib.Path) -> None:
    values = {
        "u8": ("uint8", 200), "i8": ("int8", -3), "u16": ("uint16", 60000), "i16": ("int16", -9),
        "u32": ("uint32", 2**32 - 1), "i32": ("int32", -5), "u64": ("uint64", 2**63 + 1),
        "i64": ("int64", -(2**40)), "f32": ("float32", 0.5), "f64": ("float64", 1e-300),
        "flag": ("bool", True), "text": ("string", "Grüße 🙂"),
    }  # fmt: skip
    arrays = {"words": ["a", "", "é"], "numbers": [1, -2, 3], "floats": [0.5, 1.5]}

    def extra(writer: gguf.GGUFWriter) -> None:
        for key, (kind, value) in values.items():
            getattr(writer, f"add_{kind}")(key, value)
        for key, value in arrays.items():
            writer.add_array(key, value)

    write_gguf(tmp_path / "m.gguf", extra=extra)
    fd, found = gguf_format.open_header(str(tmp_path / "m.gguf"))
    os.close(fd)
    for key, (_, value) in values.items():
        assert found.metadata[key] == value and type(found.metadata[key]) is type(value)
    assert found.metadata["words"] == arrays["words"]
    np.testing.assert_array_equal(found.metadata["numbers"], arrays["numbers"])
    np.testing.assert_array_equal(found.metadata["floats"], arrays["floats"])


def test_agrees_with_the_gguf_package(tmp_path: pathlib.Path) -> None:
    write_gguf(tmp_path / "m.gguf", kind=gguf.GGMLQuantizationType.Q8_0)
    fd, found = gguf_format.open_header(str(tmp_path / "m.gguf"))
    os.close(fd)
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    assert found.data_offset == reader.data_offset
    for theirs in reader.tensors:
        ours = found.tensors[theirs.name]
        assert ours.shape == tuple(reversed(theirs.shape.tolist()))
        assert ours.type_id == theirs.tensor_type
        assert found.data_offset + ours.offset == theirs.data_offset
    for key, field in reader.fields.items():
        if not key.startswith("GGUF."):
            value = found.metadata[key]
            theirs = field.contents()
            assert (value.tolist() if isinstance(value, np.ndarray) else value) == theirs


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated"),
        (b"GGUF", "truncated"),
        (header(magic=b"FUGG"), "not a GGUF file"),
        (header(magic=b"ggjt"), "not a GGUF file"),
        (header(version=1), "version 1"),
        (header(version=0x03000000), "version 50331648"),
        (header(keys=2**63), "9223372036854775808 metadata entries"),
        (header(tensors=2**64 - 1), "18446744073709551615 tensors"),
        (header(bytes(13), keys=2), "2 metadata entries"),
        (header(string(b"k" * 70_000) + bytes(20), keys=1), "name of 70000 bytes"),
        (header(string(b"", 2**64 - 1) + bytes(99), keys=1), "string of 18446744073709551615"),
        (header(string(b"k") + struct.pack("<I", 99) + bytes(99), keys=1), "value type 99"),
        (header(string(b"k") + struct.pack("<IQ", 8, 2**40) + bytes(9), keys=1), "1099511627776"),
        (header(string(b"k") + struct.pack("<IIQ", 9, 4, 2**61) + bytes(9), keys=1),
         "array of 2305843009213693952 numbers"),
        (header(string(b"k") + struct.pack("<IIQ", 9, 8, 2**61) + bytes(9), keys=1),
         "array of 2305843009213693952 strings"),
        (header(string(b"k") + struct.pack("<IIQ", 9, 8, 1) + string(b"abc", 99), keys=1),
         "string of 99 bytes runs off"),
        (header(string(b"k") + struct.pack("<IIQ", 9, 8, 2) + string(b"123456789"), keys=1),
         "ends inside"),
        (header(string(b"k") + struct.pack("<IIQ", 9, 9, 1) + bytes(99), keys=1), "type 9"),
        (header(2 * (string(b"k") + struct.pack("<II", 4, 1)), keys=2), "'k' appears twice"),
        (header(2 * tensor(), tensors=2), "'t' appears twice"),
        (header(string(b"t") + struct.pack("<I", 2**32 - 1) + bytes(99), tensors=1), "dimensions"),
        (header(string(b"general.alignment") + struct.pack("<II", 4, 24), keys=1), "power of two"),
        (header(string(b"general.alignment") + struct.pack("<II", 4, 0), keys=1), "power of two"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "header",
)  # fmt: skip
def test_broken_headers(tmp_path: pathlib.Path, content: bytes, message: str) -> None:
    with pytest.raises(ModelLoadError, match=message):
        parse(tmp_path / "m.gguf", content)


@pytest.mark.parametrize(
    ("info", "message"),
    [
        (tensor(dims=(2**62, 2**62)), "ends at byte"),
        (tensor(dims=(64,), offset=2**63), "ends at byte"),
        (tensor(dims=(65,)), "ends at byte"),
        (tensor(dims=(33, 1), kind=8), "33 elements are not whole blocks of 32"),
        (tensor(kind=4242), "quantisation 4242"),
        (tensor(kind=26), "quantisation 26"),  # I32: nothing to dequantise
        (tensor(b"blk.0.attn_q.weight", (4, 4)), "head_count"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "tensor",
)
def test_broken_tensors(tmp_path: pathlib.Path, info: bytes, message: str) -> None:
    content = header(ARCHITECTURE + info, tensors=1, keys=1)
    path = tmp_path / "m.gguf"
    path.write_bytes(content + bytes(-len(content) % 32) + bytes(256))
    with pytest.raises(ModelLoadError, match=message):
        GGUFCheckpoint(str(path))


@pytest.mark.parametrize("value", [b"mamba", b"gemma3", b""])
def test_other_architectures_are_named(tmp_path: pathlib.Path, value: bytes) -> None:
    key = string(b"general.architecture") + struct.pack("<I", 8) + string(value)
    (tmp_path / "m.gguf").write_bytes(header(key, keys=1))
    with pytest.raises(ModelLoadError, match=f"got '{value.decode()}'; allowed: llama"):
        GGUFCheckpoint(str(tmp_path / "m.gguf"))


def test_parts_of_a_split_file_are_refused(tmp_path: pathlib.Path) -> None:
    write_gguf(tmp_path / "m.gguf", extra=lambda writer: writer.add_uint16("split.count", 3))
    with pytest.raises(ModelLoadError, match="one of 3 parts"):
        GGUFCheckpoint(str(tmp_path / "m.gguf"))


@pytest.fixture(scope="module")
def good_file(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("good") / "m.gguf"
    config = {**GGUF_CONFIG, "num_hidden_layers": 1, "vocab_size": 32}

    def extra(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list([*"abcdefghijklmnopqrstuvwxyz", "ab", "abc", "<s>", "</s>", "u", "v"])
        writer.add_token_types([1] * 28 + [3, 3, 1, 1])
        writer.add_token_merges(["a b", "ab c"])
        writer.add_eos_token_id(29)
        writer.add_chat_template("{{ messages[0].content }}")

    write_gguf(path, config, kind=gguf.GGMLQuantizationType.Q8_0, extra=extra)
    return path


def test_the_undamaged_file_loads(good_file: pathlib.Path) -> None:
    loaded = load(str(good_file))
    assert loaded.eos_token_ids == (29,) and loaded.tokenizer.encode("abcd") == [27, 3]


@hypothesis.given(data=st.data())
def test_damage_is_an_error_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, good_file: pathlib.Path, data: st.DataObject
) -> None:
    content = bytearray(good_file.read_bytes())
    # The first 3,000 bytes are metadata and tensor table.
    for _ in range(data.draw(st.integers(0, 5))):
        content[data.draw(st.integers(0, 3000))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content) - 64)))
    path = tmp_path_factory.mktemp("damaged") / "m.gguf"
    path.write_bytes(content[:cut])
    try:
        loaded = load(str(path))
    except (ModelLoadError, ConfigError) as error:
        assert str(error)
    else:
        assert loaded.config.num_layers == 1
        if not isinstance(loaded.tokenizer, NoTokenizer):  # its key may have been damaged
            loaded.tokenizer.decode(loaded.tokenizer.encode("abcd"))


def test_huge_claims_under_a_memory_limit(tmp_path: pathlib.Path) -> None:
    claims = [
        header(keys=2**60), header(tensors=2**60),
        header(string(b"k") + struct.pack("<IIQ", 9, 8, 2**50) + bytes(99), keys=1),
        header(string(b"k") + struct.pack("<IIQ", 9, 0, 2**50) + bytes(99), keys=1),
        header(string(b"", 2**50) + bytes(99), keys=1),
        header(ARCHITECTURE + tensor(dims=(2**40, 2**20)), tensors=1, keys=1),
        header(ARCHITECTURE + tensor(dims=(2**40,), kind=2), tensors=1, keys=1),
    ]  # fmt: skip
    for index, content in enumerate(claims):
        (tmp_path / f"{index}.gguf").write_bytes(content)
    code = """
import resource, sys
import gguf.quants
from aqua_jax.errors import ModelLoadError
from aqua_jax.loading.gguf import GGUFCheckpoint
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
for index in range(int(sys.argv[2])):
    try:
        GGUFCheckpoint(f"{sys.argv[1]}/{index}.gguf")
    except ModelLoadError:
        print("refused")
"""
    assert run_python(code, str(tmp_path), str(len(claims))).split() == ["refused"] * len(claims)
