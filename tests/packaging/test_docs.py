"""The documents speak of files, commands and flags that exist, and the README's code runs."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

import pytest

from aqua_jax.cli.main import COMMANDS
from tests.packaging.test_architecture import ROOT

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Absolute paths of one machine, spelled so as not to match themselves.
MACHINE = re.compile(r"(^|[^\w.~/})-])/(wo" r"rk|ro" r"ot|ho" r"me|fa" r"rm)/|/tm" r"p/[a-z]+\d")

# Files of this tree, as sources name them.
NAMED = re.compile(r"(?<![\w/])(?:tests|scripts|aqua_jax|docs)/[\w/]+\.(?:py|md)\b")


def read(path: pathlib.Path) -> str:
    """A document's text."""
    return path.read_text(encoding="utf-8")


def test_links_lead_somewhere() -> None:
    broken = []
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#\s]+)", read(document)):
            if "://" not in target and not (document.parent / target).exists():
                broken.append(f"{document.relative_to(ROOT)}: {target}")
    assert not broken, "\n".join(broken)


def test_no_document_names_a_path_of_one_machine() -> None:
    found = [
        f"{document.relative_to(ROOT)}: {line}"
        for document in DOCUMENTS for line in read(document).splitlines() if MACHINE.search(line)
    ]
    assert not found, "\n".join(found)


def test_architecture_has_a_line_for_every_file() -> None:
    text = read(ROOT / "docs" / "architecture.md")
    files = [
        path
        for folder, pattern in (
            ("aqua_jax", "*.py"), ("models", "*.py"), ("ffi", "*.cc"), ("ffi", "*.h"),
            ("scripts", "*.py"),
        )
        for path in (ROOT / folder).rglob(pattern)
        if path.name != "__init__.py"
        and not path.is_relative_to(ROOT / "aqua_jax" / "models")
        and not path.is_relative_to(ROOT / "ffi" / "tests")
    ]
    missing = [
        str(path.relative_to(ROOT)) for path in files
        if not re.search(rf"[`/]{re.escape(path.name)}`", text)
    ]
    assert files
    assert not missing, f"docs/architecture.md has no line for {missing}"


def test_architecture_names_only_files_that_exist() -> None:
    text = read(ROOT / "docs" / "architecture.md")
    named = set(re.findall(r"`([\w/.-]+\.(?:py|cc|h|inc|md|txt|toml))`", text))
    known = {
        str(path.relative_to(ROOT))
        for folder in ("aqua_jax", "models", "ffi", "scripts", "tests", "docs")
        for path in (ROOT / folder).rglob("*.*")
    } | {path.name for path in ROOT.iterdir()}
    gone = sorted(
        name for name in named
        if not any(full == name or full.endswith("/" + name) for full in known)
    )
    assert not gone, f"docs/architecture.md speaks of {gone}"


def test_sources_speak_of_files_that_exist() -> None:
    gone = [
        f"{path.relative_to(ROOT)}: {name}"
        for folder in ("aqua_jax", "models", "scripts", "tests", "ffi")
        for path in (ROOT / folder).rglob("*.*")
        if path.suffix in (".py", ".cc", ".h", ".cu", ".cuh", ".inc", ".proto")
        and not path.is_relative_to(ROOT / "aqua_jax" / "models")
        for name in NAMED.findall(read(path))
        if not (ROOT / name).exists()
    ]
    assert not gone, "\n".join(gone)


def help_of(command: str) -> str:
    """What `aqua-jax COMMAND --help` prints."""
    done = subprocess.run(
        [sys.executable, "-m", "aqua_jax.cli.main", command, "--help"],
        capture_output=True, text=True, timeout=60, cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_commands_in_the_documents_have_the_flags_they_show() -> None:
    commands = {command.name for command in COMMANDS}
    texts = [read(document) for document in DOCUMENTS]
    texts += [read(ROOT / "Makefile"), read(ROOT / "scripts" / "demo.py")]
    used: dict[str, set[str]] = {}
    for text in texts:
        # Lines that go on in the next one, in shells and in code within prose.
        text = re.sub(r"\\\n", " ", text)
        text = re.sub(r"(?<!`)`[^`]+`(?!`)", lambda code: code[0].replace("\n", " "), text)
        # `aqua-jax COMMAND ...` in prose and recipes, `("title", "COMMAND ...")` in the demo.
        shown = rf"(?:aqua-jax |\", \")({'|'.join(commands)})\b([^\n`|;&]*)"
        for command, rest in re.findall(shown, text):
            used.setdefault(command, set()).update(re.findall(r"--([a-z_]+)", rest))
    assert set(used) == commands
    for command, flags in used.items():
        known = set(re.findall(r"--(?:\[no\])?([a-z_]+)", help_of(command)))
        unknown = flags - known - {"help"}
        assert not unknown, f"aqua-jax {command} has no {unknown}"


@pytest.mark.parametrize(
    "code", re.findall(r"```python\n(.*?)```", read(ROOT / "README.md"), flags=re.DOTALL),
    ids=lambda code: code.split("\n")[0],
)
def test_the_readme_code_runs(code: str, tmp_path: pathlib.Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip()
