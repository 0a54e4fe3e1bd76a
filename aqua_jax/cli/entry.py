"""The console script: Ctrl-C is safe before anything heavier than this file is imported.

Until then, some 20 ms, Python starts and imports `aqua_jax` itself. Ctrl-C ends it there in
Python's own way: the process ends by the signal, which shells report as status 130 too and
`subprocess` as -2, perhaps after a traceback. No code of ours runs early enough to change that.
"""

from __future__ import annotations

import sys

from aqua_jax.cli.signals import gentle_interrupts, interrupted


def run() -> None:
    """Entry point of the console script; exits with the command's status."""
    gentle_interrupts()
    try:
        from aqua_jax.cli import main

        main.run()
    except KeyboardInterrupt:
        sys.exit(interrupted())


if __name__ == "__main__":
    run()
