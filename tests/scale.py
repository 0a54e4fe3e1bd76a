"""How much the randomised tests do: little by default, much in `make test-long`."""

import os


def scaled(count: int) -> int:
    """`count` times AQUA_TEST_SCALE (an integer >= 1, default 1)."""
    return count * max(1, int(os.environ.get("AQUA_TEST_SCALE", "1")))
