"""What tests of whole engines share."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

import pytest

from aqua_jax.ops import moves


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Where a file's tiny model is written, once for all of its engines."""
    return tmp_path_factory.mktemp("model")


@pytest.fixture
def quiet() -> Iterator[None]:
    """No test leaves delays of the copy queue behind."""
    yield
    moves.set_delay(0, 0)
