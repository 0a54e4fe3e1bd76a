"""How much the randomised tests do: little by default, much in `make test-long`."""

import os

SCALE = max(1, int(os.environ.get("AQUA_TEST_SCALE", "1")))
LONG = 10  # the scale of `make test-long`


def scaled(count: int) -> int:
    """`count` times AQUA_TEST_SCALE (an integer >= 1, default 1)."""
    return count * SCALE


def at_scale(small: int, large: int) -> int:
    """`small` in the ordinary suite, `large` in the long one: for counts that are stated
    somewhere, such as 10,000 histories. Between the two, in proportion."""
    share = (min(SCALE, LONG) - 1) / (LONG - 1)
    return round(small + share * (large - small))
