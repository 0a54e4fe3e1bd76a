"""What pyproject.toml declares, the code imports and docs/dependencies.md explains must agree."""

from __future__ import annotations

import re
import sys
import tomllib

from tests.packaging.test_architecture import ROOT, imported_names, modules

# Distribution name -> the name it is imported by, where they differ.
IMPORT_NAMES = {"absl-py": "absl", "orbax-checkpoint": "orbax", "grpcio": "grpc",
                "protobuf": "google"}
# Used without an import statement of ours.
NOT_IMPORTED = {
    "jaxlib",  # jax's own; its version is pinned beside it
}


def project() -> dict:
    """The [project] table."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def name_of(requirement: str) -> str:
    """Distribution name of a requirement line."""
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match, requirement
    return match[0].lower()


def imported_tops() -> set[str]:
    """Top-level names that the package's code imports, ours and the standard library's left out."""
    tops = {
        other.split(".")[0] for _, tree in modules().values() for other in imported_names(tree)
    }
    return tops - set(sys.stdlib_module_names) - {"aqua_jax"}


def test_every_import_is_declared() -> None:
    # What only one command needs comes with an extra.
    extras = project()["optional-dependencies"]
    lines = project()["dependencies"] + extras["plots"] + extras["serve"] + extras["top"]
    lines += extras["coordinator"]
    declared = {name_of(line) for line in lines}
    names = {IMPORT_NAMES.get(name, name.replace("-", "_")) for name in declared}
    assert imported_tops() <= names, f"imported, not declared: {imported_tops() - names}"


def test_every_declared_dependency_is_used() -> None:
    for line in project()["dependencies"]:
        name = name_of(line)
        if name not in NOT_IMPORTED:
            module = IMPORT_NAMES.get(name, name.replace("-", "_"))
            assert module in imported_tops(), f"{name} is declared and never imported"


def test_every_dependency_is_explained() -> None:
    text = (ROOT / "docs" / "dependencies.md").read_text()
    lines = list(project()["dependencies"])
    for extra in project()["optional-dependencies"].values():
        lines += extra
    for line in lines:
        assert f"`{name_of(line)}`" in text, f"docs/dependencies.md does not say why {line} is here"
