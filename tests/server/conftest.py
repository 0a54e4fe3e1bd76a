"""One server for the tests that leave it running."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.server.browser import PROGRAM
from tests.server.serving import Served, serving, text_engine_config


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server without keys over the tiny model."""
    with serving(text_engine_config(tmp_path_factory.mktemp("served"))) as running:
        yield running


# The page's tests need a browser, which no Python package brings.
collect_ignore = [] if PROGRAM else ["test_page.py"]
