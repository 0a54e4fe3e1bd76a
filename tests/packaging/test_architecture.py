"""The house rules that a machine can check: who may import whom, and what may not be imported.

docs/architecture.md draws the arrows; this file holds them. Imports under `if TYPE_CHECKING:`
don't count, imports inside functions do.
"""

from __future__ import annotations

import ast
import functools
import os
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
PACKAGES = {"aqua_jax": ROOT / "aqua_jax", "aqua_jax.models": ROOT / "models"}

# What each room may import besides itself and the plain data in BASE. Arrows point down.
ARROWS = {
    "cli": {
        "batch", "bench", "server", "simulation", "llm", "engine", "loading", "models", "memory",
        "coordinator",
    },
    "batch": {"llm", "engine", "loading"},
    "server": {"batch", "engine"},
    "bench": {"llm", "engine", "loading"},
    "simulation": {"scheduling", "paging", "bench"},
    "llm": {"engine", "loading"},
    "engine": {"scheduling", "paging", "memory", "loading", "models", "ops", "parallel"},
    "scheduling": {"paging"},
    "paging": set(),
    "memory": {"coordinator"},
    "coordinator": set(),
    "loading": {"models", "ops", "parallel"},
    "models": {"ops"},
    "parallel": set(),
    "ops": set(),
}
BASE = {
    "aqua_jax.closing", "aqua_jax.config", "aqua_jax.errors", "aqua_jax.prompts",
    "aqua_jax.progress", "aqua_jax.models.config",
}
HOST_ONLY = (
    "aqua_jax.scheduling", "aqua_jax.paging", "aqua_jax.memory", "aqua_jax.coordinator",
    "aqua_jax.simulation",
)
# But these: `aqua_jax.memory.Aqua` takes JAX arrays. Nothing host-only may import them.
DEVICE_SIDE = ("aqua_jax.memory.arrays", "aqua_jax.memory.rebuild", "aqua_jax.memory.tensor")
DEVICE_LIBRARIES = {"jax", "jaxlib", "flax", "torch", "tensorflow"}
SOURCE_SUFFIXES = {".py", ".cc", ".cpp", ".cu", ".cuh", ".h"}
SKIPPED_FOLDERS = {"build", "dist", "__pycache__"}


@functools.cache
def source_files() -> tuple[pathlib.Path, ...]:
    """Every source file of the checkout; what is built, installed or linked is not walked into."""
    found = []
    for folder, below, names in os.walk(ROOT):
        below[:] = [name for name in below if name[0] != "." and name not in SKIPPED_FOLDERS]
        found += [pathlib.Path(folder, name) for name in names]
    return tuple(sorted(path for path in found if path.suffix in SOURCE_SUFFIXES))


@functools.cache
def modules() -> dict[str, tuple[pathlib.Path, ast.Module]]:
    """Dotted module name -> (file, syntax tree) of the whole package."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            relative = path.relative_to(folder)
            if package == "aqua_jax" and relative.parts[0] == "models":
                continue
            parts = [package, *relative.with_suffix("").parts]
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = (path, ast.parse(path.read_text(), filename=str(path)))
    return found


def is_type_checking(node: ast.If) -> bool:
    """Whether this is `if TYPE_CHECKING:`, however it is spelled."""
    return "TYPE_CHECKING" in ast.unparse(node.test)


def imported_names(tree: ast.AST, *, for_types: bool = False) -> set[str]:
    """Absolute dotted names a tree imports, `from a import b` as both `a` and `a.b`."""
    names: set[str] = set()
    pending = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and is_type_checking(node) and not for_types:
            pending.extend(node.orelse)
            continue
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            assert node.module is not None
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
        pending.extend(ast.iter_child_nodes(node))
    return names


def own_imports(name: str, *, for_types: bool = False) -> set[str]:
    """Modules of ours that module `name` imports; `from a import b` is a.b where that is one."""
    known = modules()
    names = imported_names(known[name][1], for_types=for_types) & set(known)
    gathered = {other.rpartition(".")[0] for other in names}
    return names - gathered - {name}


def room(name: str) -> str | None:
    """The room a module lives in: the part after aqua_jax, None for the package itself."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else None


def test_the_package_is_found() -> None:
    rooms = {room(name) for name in modules()}
    assert {"engine", "scheduling", "paging", "ops", "loading", "models", "cli"} <= rooms


def test_arrows_point_down() -> None:
    wrong = []
    for name in modules():
        here = room(name)
        if here is None:
            continue  # aqua_jax/__init__.py gathers the public names of every room
        if name in BASE:
            wrong += [f"{name} imports {other}" for other in own_imports(name) - BASE]
            continue
        if here not in ARROWS:
            wrong.append(f"{name} is in no room of ARROWS: give it one")
            continue
        rooms = {other: room(other) for other in own_imports(name) - BASE}
        wrong += [
            f"{name} imports {other}"
            for other, there in rooms.items()
            if there != here and there not in ARROWS[here]
        ]
    assert not wrong, "arrows up:\n" + "\n".join(wrong)


def test_no_import_goes_round_in_a_circle() -> None:
    """Nor one in a function, nor one for types alone."""
    gathers = {"aqua_jax", "aqua_jax.memory"}  # public names, on first use
    graph = {name: own_imports(name, for_types=True) - gathers for name in modules()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail[trail.index(name):], name))
        if name not in done:
            for other in graph[name]:
                visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_planning_imports_no_device_library() -> None:
    starts = [name for name in modules() if name.startswith(HOST_ONLY) and name not in DEVICE_SIDE]
    assert len(starts) > len(HOST_ONLY)
    pending, seen, wrong = list(starts), set(), []
    while pending:
        name = pending.pop()
        if name in seen:
            continue
        seen.add(name)
        tops = {other.split(".")[0] for other in imported_names(modules()[name][1])}
        wrong += [f"{name} imports {top}" for top in tops & DEVICE_LIBRARIES]
        pending.extend(own_imports(name) - {"aqua_jax"})
    assert not wrong, f"reached from {HOST_ONLY}:\n" + "\n".join(wrong)


def test_planning_runs_without_loading_jax() -> None:
    starts = [name for name in modules() if name.startswith(HOST_ONLY) and name not in DEVICE_SIDE]
    code = f"import sys, {', '.join(starts)}; print({DEVICE_LIBRARIES} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "set()", done.stdout + done.stderr


def test_no_private_api_and_no_pickle() -> None:
    banned_imports = re.compile(
        r"jax\.(_src|core|interpreters)\b|jaxlib\.|(pickle|cPickle|dill|cloudpickle)$"
    )
    banned_code = re.compile(r"\bjax\.(_src|core)\b|allow_pickle=True|\btorch\.load\(")
    wrong = []
    for name, (_, tree) in modules().items():
        wrong += [f"{name} imports {o}" for o in imported_names(tree) if banned_imports.match(o)]
        for node in ast.walk(tree):
            if isinstance(node, (ast.Attribute, ast.Call)):
                wrong += [f"{name}: {m[0]}" for m in banned_code.finditer(ast.unparse(node))]
    assert not wrong, "\n".join(sorted(set(wrong)))


def test_files_are_small_enough_to_know() -> None:
    sizes = {path.relative_to(ROOT): path.read_text().count("\n") for path in source_files()}
    long = {str(path): lines for path, lines in sizes.items() if lines > 500}
    assert sizes and not long, f"is there a second responsibility in them? {long}"


def test_nothing_is_left_open() -> None:
    words = re.compile(r"raise Not" "ImplementedError|\\b(TO" "DO|FIX" "ME)\\b")
    weak = re.compile(r"pytest\.sk" "ip\\(|importor" "skip|mark\\.(xf" "ail|skip)")
    found = []
    for path in source_files():
        shown = path.relative_to(ROOT)
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if words.search(line) or (shown.parts[0] == "tests" and weak.search(line)):
                found.append(f"{shown}:{number}: {line.strip()}")
    assert not found, "\n".join(found)
