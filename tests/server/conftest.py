"""One server for the tests that leave it running."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.server.serving import Served, serving, text_engine_config


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server without keys over the tiny model."""
    with serving(text_engine_config(tmp_path_factory.mktemp("served"))) as running:
        yield running
