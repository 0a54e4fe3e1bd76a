"""Safetensors files, good and broken: values, shards, and clear errors without allocation."""

from __future__ import annotations

import json
import os
import pathlib
import struct

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import safetensors.numpy

from aqua_jax.errors import ModelLoadError
from aqua_jax.loading.checkpoint import row_blocks
from aqua_jax.loading.safetensors import SafetensorsCheckpoint
from tests.loading.checkpoints import write_directory
from tests.loading.limits import run_python


def write_raw(path: pathlib.Path, header: object, data: bytes = b"", length: int | None = None):
    """A file with exactly this header; `length` overrides the stated one."""
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    prefix = struct.pack("<Q", len(content) if length is None else length)
    path.write_bytes(prefix + content + data)
    return str(path)


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


@pytest.mark.parametrize(
    "dtype", ["float64", "float32", "float16", "int64", "int8", "uint8", "bool", "uint32"]
)
def test_values(tmp_path: pathlib.Path, dtype: str, rng: np.random.Generator) -> None:
    tensors = {
        "matrix": rng.integers(0, 2, (5, 3)).astype(dtype),
        "vector": rng.integers(0, 2, 7).astype(dtype),
        "cube": rng.integers(0, 2, (2, 3, 4)).astype(dtype),
        "scalar": np.array(1, dtype),
        "empty": np.empty((0, 4), dtype),
    }
    path = tmp_path / "a.safetensors"
    safetensors.numpy.save_file(tensors, path)
    checkpoint = SafetensorsCheckpoint(str(path))
    assert sorted(checkpoint.names()) == sorted(tensors)
    for name, value in tensors.items():
        assert checkpoint.shape(name) == value.shape and checkpoint.dtype(name) == value.dtype
        np.testing.assert_array_equal(checkpoint.get(name), value)
    np.testing.assert_array_equal(checkpoint.read_rows("matrix", 1, 4), tensors["matrix"][1:4])
    for size in (1, 30, 10**6):
        blocks = [block for _, block in row_blocks(checkpoint, "cube", size)]
        np.testing.assert_array_equal(np.concatenate(blocks), tensors["cube"])
    checkpoint.close()
    checkpoint.close()


def test_unknown_tensor(tmp_path: pathlib.Path) -> None:
    write_directory(tmp_path)
    with pytest.raises(ModelLoadError, match="no tensor 'nope'"):
        SafetensorsCheckpoint(str(tmp_path)).shape("nope")


def test_a_single_file_of_any_name(tmp_path: pathlib.Path) -> None:
    safetensors.numpy.save_file({"a": np.ones(3)}, tmp_path / "weights.safetensors")
    assert SafetensorsCheckpoint(str(tmp_path)).names() == ["a"]
    safetensors.numpy.save_file({"a": np.ones(3)}, tmp_path / "other.safetensors")
    with pytest.raises(ModelLoadError, match=r"2 \.safetensors files"):
        SafetensorsCheckpoint(str(tmp_path))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_never_opened(tmp_path: pathlib.Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    with pytest.raises(ModelLoadError, match=f"{name}.*convert to safetensors"):
        SafetensorsCheckpoint(str(tmp_path))


def test_an_empty_directory(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ModelLoadError, match=r"no model\.safetensors"):
        SafetensorsCheckpoint(str(tmp_path))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[]", "object is expected"),
        ({"a": 1}, "not an object"),
        (entry(dtype="F31"), "dtype 'F31'"),
        (entry(dtype=["F32"]), "dtype"),
        (entry(shape=2), "shape"),
        (entry(shape=[-2]), "shape"),
        (entry(shape=[True]), "shape"),
        (entry(shape=[2.0]), "shape"),
        (entry(shape=[1] * 9), "shape"),
        (entry(shape=[2**63, 2**63]), "needs"),
        (entry(offsets=[0]), "data_offsets"),
        (entry(offsets=[8, 0]), "outside"),
        (entry(offsets=[0, 2**70]), "outside"),
        (entry(offsets=[-8, 0]), "data_offsets"),
        (entry(offsets=[0, 4]), "needs 8 bytes, has 4"),
        ({**entry(), "b": entry(offsets=[4, 12])["a"]}, "overlap"),
    ],
)
def test_broken_headers(tmp_path: pathlib.Path, header: object, message: str) -> None:
    path = write_raw(tmp_path / "model.safetensors", header, bytes(16))
    with pytest.raises(ModelLoadError, match=message):
        SafetensorsCheckpoint(path)


@pytest.mark.parametrize("length", [17, 10**9, 2**62, 2**64 - 1])
def test_header_length_beyond_the_file(tmp_path: pathlib.Path, length: int) -> None:
    path = write_raw(tmp_path / "model.safetensors", b"{}", length=length)
    with pytest.raises(ModelLoadError, match=f"header length {length}"):
        SafetensorsCheckpoint(path)


@pytest.mark.parametrize(
    "shard",
    ["../model.safetensors", "/etc/model.safetensors", "a/b.safetensors", "..", "", ".",
     "a\\b.safetensors", "a\0.safetensors", "model.bin", 3, None, ["x.safetensors"]],
)  # fmt: skip
def test_an_index_cannot_leave_its_directory(tmp_path: pathlib.Path, shard: object) -> None:
    safetensors.numpy.save_file({"a": np.ones(1)}, tmp_path / "model.safetensors")
    inner = tmp_path / "inner"
    inner.mkdir()
    (inner / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(ModelLoadError, match=r"weight_map\['a'\].*same directory"):
        SafetensorsCheckpoint(str(inner))


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "JSON"), ("{", "JSON"), ("[1]", "object"), ("{}", "weight_map"),
     ('{"weight_map": []}', "weight_map"), ('{"weight_map": {}}', "weight_map"),
     ('{"weight_map": {"a": "gone.safetensors"}}', "gone.safetensors: cannot be opened"),
     ('{"weight_map": {"b": "good.safetensors"}}', "'b' is not in good")],
)  # fmt: skip
def test_broken_indices(tmp_path: pathlib.Path, content: str, message: str) -> None:
    safetensors.numpy.save_file({"a": np.ones(1)}, tmp_path / "good.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ModelLoadError, match=message):
        SafetensorsCheckpoint(str(tmp_path))


def test_symlinks_that_form_a_circle(tmp_path: pathlib.Path) -> None:
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "model.safetensors")
    with pytest.raises(ModelLoadError, match="cannot be opened"):
        SafetensorsCheckpoint(str(tmp_path))


@pytest.mark.parametrize("kind", ["fifo", "directory"])
def test_what_is_not_a_file(tmp_path: pathlib.Path, kind: str) -> None:
    path = tmp_path / "model.safetensors"
    os.mkfifo(path) if kind == "fifo" else path.mkdir()
    with pytest.raises(ModelLoadError, match="not a regular file"):
        SafetensorsCheckpoint(str(tmp_path))


def test_a_file_cut_after_opening_is_an_error(tmp_path: pathlib.Path) -> None:
    write_directory(tmp_path)
    checkpoint = SafetensorsCheckpoint(str(tmp_path))
    os.truncate(tmp_path / "model.safetensors", 4000)
    with pytest.raises(ModelLoadError, match="truncated"):
        for name in checkpoint.names():
            checkpoint.get(name)


@hypothesis.given(data=st.data())
def test_damage_is_an_error_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    tensors = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float16)}
    good = safetensors.numpy.save(tensors)
    content = bytearray(good)
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(content)))
    path = folder / "model.safetensors"
    path.write_bytes(content[:cut])
    try:
        checkpoint = SafetensorsCheckpoint(str(path))
        for name in checkpoint.names():
            checkpoint.get(name)
    except ModelLoadError as error:
        assert str(path) in str(error)
    else:
        assert cut == len(good), "a shortened file was accepted"
        checkpoint.close()


def test_huge_claims_under_a_memory_limit(tmp_path: pathlib.Path) -> None:
    claims = [
        (entry(shape=[2**40], offsets=[0, 2**42]), None),
        (entry(shape=[2**31, 2**31, 2**31], offsets=[0, 8]), None),
        (b"{}", 2**33),
    ]
    for index, (header, length) in enumerate(claims):
        write_raw(tmp_path / f"{index}.safetensors", header, bytes(8), length)
    code = """
import resource, sys
from aqua_jax.errors import ModelLoadError
from aqua_jax.loading.safetensors import SafetensorsCheckpoint
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
for index in range(3):
    try:
        SafetensorsCheckpoint(f"{sys.argv[1]}/{index}.safetensors")
    except ModelLoadError:
        print("refused")
"""
    assert run_python(code, str(tmp_path)).split() == ["refused"] * 3
