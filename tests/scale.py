"""How much the randomised tests do: little by default, much in `make test-long`."""

import os

SCALE = max(1, int(os.environ.get("AQUA_TEST_SCALE", "1")))


def scaled(count: int) -> int:
    """`count` times AQUA_TEST_SCALE (an integer >= 1, default 1)."""
    return count * SCALE
