"""The wheel and the sdist, built here, hold what they should and work installed elsewhere.

Slow (a C++ build from the unpacked sdist, in an isolated environment that pip fills), so marked
`packaging`: `make test-packaging`. The second environment sees the first one's dependencies
through a .pth line, and nothing of the editable install (its hooks live in .pth files, which
Python reads only in an environment's own site-packages).
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import sysconfig
import tarfile
import zipfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.packaging

USE = """
import importlib.util, json
import aqua_jax, aqua_jax.models
from aqua_jax import LLM, Engine, EngineConfig, SamplingParams
from aqua_jax.ops import library
print(json.dumps({
    "file": aqua_jax.__file__,
    "models": aqua_jax.models.__file__,
    "ffi": library.available(),
    "reason": library.reason(),
    "leaks": [m for m in ("models", "engine", "tests") if importlib.util.find_spec(m)],
}))
"""


def build(kind: str, source: pathlib.Path, out: pathlib.Path) -> pathlib.Path:
    """Build a `sdist` or `wheel` of the tree at `source`, as `python -m build` does it."""
    done = subprocess.run(
        [sys.executable, "-m", "build", f"--{kind}", "--outdir", str(out), str(source)],
        capture_output=True, text=True, timeout=600,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="session")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The source archive of this checkout."""
    return build("sdist", ROOT, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="session")
def wheel(sdist: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A wheel built from the unpacked sdist, so that what the sdist forgets breaks here."""
    unpacked = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(unpacked, filter="data")
    (source,) = unpacked.iterdir()
    return build("wheel", source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def installed(wheel: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A Python that has the wheel installed; its dependencies come from this environment."""
    folder = tmp_path_factory.mktemp("elsewhere") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True, timeout=120)
    python = folder / "bin" / "python"
    subprocess.run(
        [str(python), "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", str(wheel)],
        check=True, timeout=120,
    )
    site = subprocess.run(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True, capture_output=True, text=True,
    ).stdout.strip()
    shared = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    pathlib.Path(site, "dependencies.pth").write_text("\n".join(shared) + "\n")
    return python


def names_in(archive: pathlib.Path) -> set[str]:
    """File names in a wheel, or in an sdist below its top folder."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel_file:
            return set(wheel_file.namelist())
    with tarfile.open(archive) as sdist_file:
        return {name.partition("/")[2] for name in sdist_file.getnames()}


def package_files() -> set[str]:
    """Python files of the package as they should be called inside a wheel."""
    ours = {
        "aqua_jax/" + str(p.relative_to(ROOT / "aqua_jax"))
        for p in (ROOT / "aqua_jax").rglob("*.py")
    }
    return ours | {
        "aqua_jax/models/" + str(p.relative_to(ROOT / "models"))
        for p in (ROOT / "models").rglob("*.py")
    }


def test_wheel_holds_the_package_and_its_library(wheel: pathlib.Path) -> None:
    names = names_in(wheel)
    assert package_files() <= names
    assert "aqua_jax/_lib/libaqua_cpu.so" in names
    strays = {
        name for name in names
        if not name.startswith("aqua_jax/") and ".dist-info/" not in name
    }
    assert not strays
    assert not {name for name in names if "/tests/" in name or name.endswith((".o", ".a"))}


def test_sdist_can_be_tested_and_built(sdist: pathlib.Path) -> None:
    names = names_in(sdist)
    assert {"pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE", "Makefile"} <= names
    assert {str(p.relative_to(ROOT)) for p in (ROOT / "models").rglob("*.py")} <= names
    assert any(name.startswith("ffi/cpu/") for name in names)
    assert "tests/conftest.py" in names
    assert not {n for n in names if n.startswith((".venv", "build/", ".git/", "dist/"))}


def test_installed_wheel_works_from_another_directory(
    installed: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    done = subprocess.run(
        [str(installed), "-c", USE], cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout.strip().splitlines()[-1])
    home = str(installed.parent.parent)
    assert seen["file"].startswith(home) and seen["models"].startswith(home)
    assert seen["ffi"], seen["reason"]
    assert seen["leaks"] == []


def test_installed_command_explains_itself(
    installed: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    done = subprocess.run(
        [str(installed.parent / "aqua-jax"), "--help"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for command in ("generate", "batch", "bench"):
        assert command in done.stdout
