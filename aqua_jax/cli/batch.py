"""`aqua-jax batch`: a file of requests, answered line by line, resumable."""

from __future__ import annotations

import logging
import os

from aqua_jax.cli import flags as common
from aqua_jax.cli.flagset import FlagSet, UsageError
from aqua_jax.cli.signals import stop_signals

_log = logging.getLogger(__name__)

_STOPPING = "\naqua-jax: stopping after this step (again: at once)"


def define(flags: FlagSet) -> None:
    """Defines the command's flags."""
    common.define_model_flags(flags)
    with flags.group("Job"):
        flags.string("input", None, "JSONL file of requests. Required.", "FILE")
        flags.string(
            "output", None, "JSONL file that results are appended to; what it already answers is "
            "not asked again. Required.", "FILE",
        )
        flags.integer(
            "max_live_requests", None, "Most requests handed to the engine at a time; default: 4 "
            "times --max_num_seqs.", 1,
        )
        flags.switch("progress", True, "Show progress on standard error.")
    common.define_sampling_flags(flags, "Sampling, for lines that don't say")
    # Nobody waits for a first token here, so nobody is switched for one; and what gives way when
    # pages run short is not computed again.
    common.define_engine_flags(flags, policy="fcfs_swap")


def _check_paths(source: str | None, target: str | None) -> tuple[str, str]:
    if not source:
        raise UsageError("--input is required: a JSONL file of requests")
    if not target:
        raise UsageError("--output is required: the JSONL file that results go to")
    if not os.path.isfile(source):
        raise UsageError(f"flag --input={source}: allowed: a file that exists")
    if os.path.exists(target) and os.path.samefile(source, target):
        raise UsageError(f"flag --output={target}: allowed: another file than --input")
    return source, target


def run(flags: FlagSet) -> int:
    """Runs or resumes a job.

    Returns:
      0: every line answered without error; 1: some by error records; 130 or 143: stopped by a
      signal.
    """
    config = common.engine_config(flags)
    defaults = common.sampling_params(flags)
    source, target = _check_paths(flags.input, flags.output)

    from aqua_jax.batch.job import EngineLike, Job
    from aqua_jax.batch.journal import Journal
    from aqua_jax.progress import Progress, counting_bar

    def make_engine() -> EngineLike:
        _log.info("loading: %s", common.summary(config))
        from aqua_jax.engine.engine import Engine

        return Engine(config, progress=counting_bar("compiling", "program"))

    progress = Progress(os.path.getsize(source), enabled=flags.progress)
    with stop_signals(_STOPPING) as stop:
        journal = Journal(target)
        try:
            job = Job(
                journal, make_engine, defaults=defaults, model=config.model, seed=config.seed,
                max_live=flags.max_live_requests or 4 * config.max_num_seqs,
            )
            with open(source, "rb") as file, progress:
                result = job.run(file, progress, stop)
        finally:
            journal.close()
    _log.info(
        "%d answered, %d errors, %d already there%s; %d tokens, %.0f tokens/s", result.answered,
        result.errors, result.skipped,
        f" ({result.errors_before} of them errors)" if result.errors_before else "",
        result.output_tokens, progress.tokens_per_second,
    )
    if result.interrupted:
        _log.info("interrupted: the same command goes on from here")
        return 128 + stop.number
    return 0 if result.succeeded else 1
