"""`aqua-jax profile`: what steps and copies cost on this machine, for the simulator."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from pathlib import Path

from aqua_jax.cli import flags as common
from aqua_jax.cli.flagset import FlagSet, UsageError


def define(flags: FlagSet) -> None:
    """Defines the command's flags."""
    common.define_model_flags(flags)
    with flags.group("Profile"):
        flags.switch("engine", False, "Measure the engine's steps and page copies. Required.")
        flags.string("output", None, "File to write, JSON. Required.", "PATH")
        flags.integer("rounds", 2, "Times that all batch shapes are measured.", 1, 100)
        flags.string("name", "this machine", "What reports call the machine.", "WORDS")
    common.define_engine_flags(flags)


def run(flags: FlagSet) -> int:
    """Measures, fits and writes.

    Returns:
      0.
    """
    if not flags.engine:
        raise UsageError("--engine is required: it says what to measure")
    if not flags.output:
        raise UsageError("--output is required: the file to write")
    config = common.engine_config(flags)
    path = Path(flags.output)
    try:
        _check_writable(path)
    except OSError as error:
        raise UsageError(f"flag --output={flags.output}: {error.strerror}") from None

    from aqua_jax.engine.recorder import RecordedEngine
    from aqua_jax.progress import counting_bar
    from aqua_jax.simulation.profile import machine_of, record

    made = RecordedEngine(config, progress=counting_bar("compiling", "program"))
    with contextlib.closing(made) as engine:
        steps = record(engine, engine.model_config.vocab_size, flags.rounds, config.seed)
        machine, fit = machine_of(flags.name, engine, steps)
        machine["model"] = engine.model_name
    _write(path, json.dumps(machine, allow_nan=False))
    print(
        f"{fit.steps} steps; the line is off by {fit.error_p50:.1%} in the median, 90% of steps "
        f"by less than {fit.error_p90:.1%}", file=sys.stderr,
    )
    return 0


def _check_writable(path: Path) -> None:
    """Before minutes of measuring; leaves nothing behind, however they end.

    Raises:
      OSError: nothing can be written there.
    """
    if path.exists() and not path.is_file():
        with path.open("a"):  # a terminal, a pipe
            return
    with tempfile.TemporaryFile(dir=path.parent):
        return


def _write(path: Path, text: str) -> None:
    """Whole or not at all: what was there stays until the new file is complete."""
    if path.exists() and not path.is_file():
        path.write_text(text)
        return
    unfinished = path.with_name(f"{path.name}.unfinished-{os.getpid()}")
    try:
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
