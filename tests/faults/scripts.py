"""Scripts of this tree, imported as they are when run."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from types import ModuleType

from tests.faults.processes import ROOT


@contextlib.contextmanager
def scripts(*names: str) -> Iterator[list[ModuleType]]:
    """Modules of scripts/, which find each other while the context lasts."""
    folder = str(ROOT / "scripts")
    sys.path.insert(0, folder)
    try:
        yield [importlib.import_module(name) for name in names]
    finally:
        sys.path.remove(folder)
