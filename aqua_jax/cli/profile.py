"""`aqua-jax profile`: what steps and copies cost on this machine, for the simulator."""

from __future__ import annotations

import contextlib
import json
import sys
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
        path.touch()
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
    path.write_text(json.dumps(machine, allow_nan=False))
    print(
        f"{fit.steps} steps; the line is off by {fit.error_p50:.1%} in the median, 90% of steps "
        f"by less than {fit.error_p90:.1%}", file=sys.stderr,
    )
    return 0
