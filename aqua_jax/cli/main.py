"""The console script: `aqua-jax COMMAND --flags`.

Nothing here imports jax: help and usage errors answer in a tenth of a second. A command's module
is imported to define its flags, and imports the engine only when it runs.

Exit status: 0 all went well; 1 some requests failed; 2 wrong usage, or the job could not be done;
130 interrupted; 141 the reader of our output went away.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import logging
import os
import sys
import textwrap
import traceback
from collections.abc import Sequence

from aqua_jax.cli.flagset import HELP_WIDTH, FlagSet, UsageError
from aqua_jax.cli.signals import gentle_interrupts, interrupted

_HELP = ("--help", "-h", "-help", "--helpfull", "--helpshort")  # absl's words, too
OK, FAILED, BROKEN_PIPE = 0, 2, 141


@dataclasses.dataclass(frozen=True)
class Command:
    """One command: its module has `define(flags)` and `run(flags) -> exit status`."""

    name: str
    module: str
    summary: str
    description: str
    examples: tuple[str, ...]


COMMANDS = (
    Command(
        "generate", "aqua_jax.cli.generate", "answer prompts and print the results",
        "Answers one or more prompts and prints the results on standard output; everything else "
        "goes to standard error.",
        (
            'aqua-jax generate --model=demo --chat --prompt="Why is the sky blue?" --stream',
            "aqua-jax generate --model=DIR --prompts_file=prompts.txt --json > answers.jsonl",
        ),
    ),
    Command(
        "batch", "aqua_jax.cli.batch", "run a file of requests that survives interruption",
        "Runs a JSONL file of requests and appends each result to the output as it finishes. "
        "Interrupted or killed, the same command finishes the job. Lines are "
        '{"id", "prompt" or "messages", sampling fields} or OpenAI Batch requests '
        "(custom_id, method, url, body). Exit status: 0 all answered, 1 some lines ended as error "
        "records, 2 the job could not run, 130 interrupted.",
        (
            "aqua-jax batch --model=demo --input=in.jsonl --output=out.jsonl",
            "aqua-jax batch --model=DIR --input=in.jsonl --output=out.jsonl --max_new_tokens=64",
        ),
    ),
    Command(
        "bench", "aqua_jax.cli.bench", "measure speed on this machine",
        "Measures throughput and latency of a model on this machine with random prompts.",
        (
            "aqua-jax bench --model=demo --workload=single",
            "aqua-jax bench --model=DIR --workload=single,prefill,batch,burst --json",
        ),
    ),
    Command(
        "simulate", "aqua_jax.cli.simulate", "compare policies on machines we don't have",
        "Runs the scheduler that serves under a virtual clock: a load, several policies, a machine "
        "given by its data sheet (every figure is modelled) or fitted to a recorded run.",
        (
            "aqua-jax simulate --machine=h100-nvlink --model=34b --policies=fcfs,fair@host,fair "
            "--request_rate=4,8,12",
            "aqua-jax simulate --machine=profile.json --workload=burst --policies=fcfs,fair "
            "--plots=DIR",
        ),
    ),
    Command(
        "serve", "aqua_jax.cli.serve", "answer requests over HTTP, in OpenAI's dialect",
        "Serves a model over HTTP: /v1/completions, /v1/chat/completions and /v1/models as OpenAI "
        "has them, /health, /metrics for Prometheus. SIGTERM or Ctrl-C lets live requests end. "
        "Needs the extra serve: pip install 'aqua-jax[serve]'.",
        (
            "aqua-jax serve --model=demo",
            "aqua-jax serve --model=DIR --host=0.0.0.0 --port=8080 --api_key_file=keys.txt",
        ),
    ),
    Command(
        "profile", "aqua_jax.cli.profile", "measure what steps cost, for the simulator",
        "Runs a model on this machine over batch shapes that tell its costs apart, fits a line to "
        "the steps, and writes a machine for `aqua-jax simulate --machine=PATH`.",
        (
            "aqua-jax profile --engine --model=demo --output=profile.json",
            "aqua-jax profile --engine --model=DIR --policy=fair --output=profile.json",
        ),
    ),
    Command(
        "coordinator", "aqua_jax.cli.coordinator", "keep the ledger of memory that models lend",
        "Keeps the ledger of memory that processes of one user lend each other on this machine. "
        "Lenders and borrowers name its socket. Killed or restarted, it learns from them who "
        "holds what; meanwhile they go on.",
        (
            "aqua-jax coordinator --socket=/tmp/aqua.sock",
            "aqua-jax coordinator --socket=/tmp/aqua.sock --status",
        ),
    ),
    Command(
        "top", "aqua_jax.cli.top", "what a server is doing, live",
        "Shows the requests of a running `aqua-jax serve`: whose they are, how far they have come, "
        "and where their pages are. Needs the extra top: pip install 'aqua-jax[top]'.",
        (
            "aqua-jax top --url=http://127.0.0.1:8000",
            "aqua-jax top --once",
        ),
    ),
    Command(
        "lend", "aqua_jax.cli.lend", "lend memory to other processes",
        "Lends memory of this process to engines of the same user. Ctrl-C (or SIGTERM) asks for "
        "it back and waits until it has come. One line on standard error tells every change.",
        (
            "aqua-jax lend --bytes=1GiB --listen=/tmp/aqua.sock",
            "aqua-jax lend --bytes=256MiB --listen=/tmp/aqua.sock --resize",
        ),
    ),
)


def overview() -> str:
    """What `aqua-jax --help` prints."""
    width = max(len(command.name) for command in COMMANDS)
    lines = [
        "aqua-jax: large language model inference on JAX.",
        "",
        "Usage: aqua-jax COMMAND --flag=value ...",
        "",
        "Commands:",
        *(f"  {command.name:<{width}}  {command.summary}" for command in COMMANDS),
        "",
        "Examples:",
        "  " + COMMANDS[0].examples[0],
        "  " + COMMANDS[1].examples[0],
        "",
        "`aqua-jax COMMAND --help` lists a command's flags; `aqua-jax --version` the version.",
    ]
    return "\n".join(lines)


def command_help(command: Command, flags: FlagSet) -> str:
    """What `aqua-jax COMMAND --help` prints."""
    lines = [
        f"aqua-jax {command.name}: {command.summary}.",
        "",
        *textwrap.wrap(command.description, HELP_WIDTH),
        "",
        "Examples:",
        *(f"  {example}" for example in command.examples),
        "",
        flags.help(),
        "",
        "Flags may also stand in a file, one a line: --flagfile=PATH.",
    ]
    return "\n".join(lines)


def _complain(text: str, help_command: str) -> int:
    print(f"{text}\nSee {help_command}.", file=sys.stderr)
    return FAILED


def _find(name: str) -> Command | None:
    return next((command for command in COMMANDS if command.name == name), None)


def _unknown_command(name: str) -> int:
    if name.startswith("-"):
        return _complain(
            f"aqua-jax: the command comes first, before flags such as {name}", "aqua-jax --help"
        )
    near = difflib.get_close_matches(name, [command.name for command in COMMANDS], 1)
    hint = f" Did you mean {near[0]}?" if near else ""
    return _complain(f"aqua-jax: unknown command {name!r}.{hint}", "aqua-jax --help")


def main(arguments: Sequence[str]) -> int:
    """Runs one command.

    Args:
      arguments: the command line without the program's name.

    Returns:
      The exit status.
    """
    arguments = list(arguments)
    if not arguments or arguments[0] in (*_HELP, "help"):
        if arguments[:1] != ["help"] or len(arguments) == 1:
            print(overview())
            return OK
        arguments = [arguments[1], "--help"]
    if arguments[0] in ("--version", "version"):
        import aqua_jax

        print(f"aqua-jax {aqua_jax.__version__}")
        return OK
    command = _find(arguments[0])
    if command is None:
        return _unknown_command(arguments[0])
    module = importlib.import_module(command.module)
    flags = FlagSet()
    module.define(flags)
    rest = arguments[1:]
    if any(argument in _HELP for argument in rest):
        print(command_help(command, flags))
        return OK
    try:
        flags.parse(rest)
        return _run(module, flags)
    except UsageError as error:
        return _complain(f"aqua-jax {command.name}: {error}", f"aqua-jax {command.name} --help")


def _run(module: object, flags: FlagSet) -> int:
    import absl.logging

    from aqua_jax.cli.flags import as_usage
    from aqua_jax.errors import AquaError, ConfigError

    logging.basicConfig(
        stream=sys.stderr, level=logging.WARNING, format="%(asctime)s %(message)s",
        datefmt="%H:%M:%S",
    )
    logging.getLogger("aqua_jax").setLevel(logging.INFO)
    absl.logging.set_verbosity(absl.logging.INFO)  # the engine's: what was loaded, and how long
    try:
        return module.run(flags)  # type: ignore[attr-defined]
    except AquaError as error:
        if isinstance(error, ConfigError) and flags.knows(error.field):
            raise as_usage(error, flags) from None
        print(f"aqua-jax: {error}", file=sys.stderr)
        return FAILED


def _detach_stdout() -> None:
    """Lets the interpreter's last flush of stdout go nowhere instead of failing."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run() -> None:
    """Runs the command that the process was started with; exits with its status."""
    gentle_interrupts()
    try:
        status = main(sys.argv[1:])
        sys.stdout.flush()
    except KeyboardInterrupt:
        status = interrupted()
    except BrokenPipeError:
        _detach_stdout()
        status = BROKEN_PIPE
    except Exception:
        # Ours, not the user's: show where. Not Python's status 1, which says "some failed" here.
        traceback.print_exc()
        status = FAILED
    sys.exit(status)


if __name__ == "__main__":
    run()
