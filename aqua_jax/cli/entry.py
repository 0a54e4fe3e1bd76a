"""The console script: Ctrl-C is safe before anything heavier than this file is imported."""

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
