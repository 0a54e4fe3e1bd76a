"""Lines on standard error of commands that others rely on."""

from __future__ import annotations

import os
import sys


def tell(command: str, line: str) -> None:
    """Writes `line` in the name of `command`; where nobody reads it any more, nothing."""
    try:
        print(f"aqua-jax {command}: {line}", file=sys.stderr, flush=True)
    except OSError:  # whoever started us has gone, but those we serve still need us
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stderr.fileno())
        os.close(nowhere)
