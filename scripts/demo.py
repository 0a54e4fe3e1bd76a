"""Answer a handful of prompts with SmolLM2-135M-Instruct, all in one batch, and show the work.

  .venv/bin/python scripts/demo.py [--model=demo] [--max_tokens=96] [--plain]

On a terminal the answers grow side by side; elsewhere (or with --plain) each is printed when it
is done. Everything goes through aqua_jax's public names: EngineConfig, Engine, SamplingParams.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import pathlib
import sys
import time

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from aqua_jax import AquaError, Engine, EngineConfig, RequestOutput, SamplingParams


@dataclasses.dataclass(frozen=True)
class Example:
    """One prompt of the demo: what it is for, what is asked, how it is sampled."""

    title: str
    prompt: str
    temperature: float = 0.0
    chat: bool = True


EXAMPLES = {  # request id -> example
    "fact": Example("a fact", "What is the capital of France?"),
    "why": Example("a reason", "Why is the sky blue? Answer in two sentences."),
    "list": Example("a list", "List three things to pack for a rainy hike."),
    "code": Example("code", "Write a Python function that returns the n-th Fibonacci number."),
    "story": Example(
        "a story", "Tell a very short story about a lighthouse and a cat.", 0.7
    ),
    "completion": Example(
        "completion", "Once upon a time, in a village by the sea,", 0.7, chat=False
    ),
}

NEXT = (
    ("Ask it yourself", "generate --model=demo --chat --stream --prompt='Why do cats purr?'"),
    ("Every flag", "generate --help"),
    ("A file of jobs, resumable", "batch --model=demo --input=in.jsonl --output=out.jsonl"),
    ("Time it", "bench --model=demo --workload=batch"),
)


def add(engine: Engine, name: str, example: Example, max_tokens: int) -> None:
    """Hand one example to the engine, through the model's chat template if it is a chat."""
    params = SamplingParams(
        temperature=example.temperature, top_p=0.95, seed=0, max_tokens=max_tokens
    )
    if not example.chat:
        engine.add_request(name, example.prompt, params)
        return
    messages = [{"role": "user", "content": example.prompt}]
    text = engine.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    ids = engine.tokenizer.encode(text, add_special=False)
    engine.add_request(name, {"prompt_token_ids": ids}, params)


def panel(example: Example, output: RequestOutput | None) -> Panel:
    """One prompt with the answer so far and its timings."""
    body = Text(example.prompt, style="bold")
    footer = "waiting"
    if output is not None:
        answer = output.outputs[0]
        body.append("\n" if example.chat else "")
        body.append(answer.text.strip() if example.chat else answer.text, style="not bold")
        metrics = output.metrics
        footer = f"{len(answer.token_ids)} tokens"
        if metrics.ttft_s is not None:
            footer += f" · first after {metrics.ttft_s * 1e3:.0f} ms"
        if output.finished:
            footer += f" · {answer.finish_reason}"
            if metrics.tpot_s:
                footer += f" · {1 / metrics.tpot_s:.0f} tok/s"
    done = output is not None and output.finished
    return Panel(
        body, title=example.title, title_align="left", subtitle=footer, subtitle_align="right",
        border_style="green" if done else "cyan",
    )


def summary(outputs: dict[str, RequestOutput], seconds: float) -> Table:
    """A line per request and the total."""
    table = Table(title="What it took (tokens in and out, times)")
    table.add_column("prompt")
    for column in ("in", "out", "first token", "a token", "total"):
        table.add_column(column, justify="right")
    table.add_column("ended by")
    written = 0
    for name, example in EXAMPLES.items():
        output = outputs[name]
        answer, metrics = output.outputs[0], output.metrics
        written += len(answer.token_ids)
        table.add_row(
            example.title, str(len(output.prompt_token_ids)), str(len(answer.token_ids)),
            f"{(metrics.ttft_s or 0) * 1e3:.0f} ms", f"{(metrics.tpot_s or 0) * 1e3:.1f} ms",
            f"{metrics.e2e_s or 0:.2f} s", output.error or str(answer.finish_reason),
        )
    table.caption = f"{written} tokens in {seconds:.2f} s: {written / seconds:.0f} tokens/s in all"
    return table


class Board:
    """What the display shows: the newest output of every request, and how many are done."""

    def __init__(self) -> None:
        self.outputs: dict[str, RequestOutput] = {}
        self.started = time.perf_counter()
        self.progress = Progress(
            TextColumn("[bold]requests"), BarColumn(), MofNCompleteColumn(),
            TimeElapsedColumn(), TextColumn("{task.fields[rate]}"),
        )
        self.task = self.progress.add_task("requests", total=len(EXAMPLES), rate="")

    def update(self, outputs: list[RequestOutput]) -> None:
        """Take in what a step returned."""
        self.outputs.update((output.request_id, output) for output in outputs)
        seen = list(self.outputs.values())
        tokens = sum(len(output.outputs[0].token_ids) for output in seen)
        self.progress.update(
            self.task,
            completed=sum(output.finished for output in seen),
            rate=f"{tokens / (time.perf_counter() - self.started):.0f} tokens/s",
        )

    def panels(self) -> list[Panel]:
        """One panel per prompt, in the order asked."""
        return [panel(example, self.outputs.get(name)) for name, example in EXAMPLES.items()]

    def view(self) -> Group:
        """Everything, the bar first: a short terminal cuts off what is below."""
        return Group(self.progress, *self.panels())


def run(engine: Engine, console: Console, max_tokens: int, plain: bool) -> int:
    """Answer all examples at once; returns how many ended in an error."""
    board = Board()
    for name, example in EXAMPLES.items():
        add(engine, name, example, max_tokens)
    live = Live(
        get_renderable=board.view, console=console, refresh_per_second=8, transient=True
    )
    with contextlib.nullcontext() if plain else live:
        while engine.has_unfinished():
            outputs = engine.step()
            board.update(outputs)
            if plain:
                for output in outputs:
                    if output.finished:
                        console.print(panel(EXAMPLES[output.request_id], output))
    seconds = time.perf_counter() - board.started
    if not plain:
        console.print(*board.panels(), sep="\n")
    console.print(summary(board.outputs, seconds))
    return sum(output.outputs[0].finish_reason == "error" for output in board.outputs.values())


def main() -> int:
    """Load, answer, tell what to try next; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="demo", help="'demo', a directory or a .gguf file")
    parser.add_argument("--max_tokens", type=int, default=96, help="longest answer, in tokens")
    parser.add_argument("--plain", action="store_true", help="no live display")
    arguments = parser.parse_args()
    console = Console()
    plain = arguments.plain or not console.is_terminal
    started = time.perf_counter()
    try:
        with console.status("Loading the model and compiling its steps ..."):
            engine = Engine(EngineConfig(model=arguments.model))
    except AquaError as error:
        console.print(f"[red]{type(error).__name__}[/]: {error}")
        return 1
    console.print(f"[bold]{arguments.model}[/] ready in {time.perf_counter() - started:.1f} s")
    try:
        errors = run(engine, console, arguments.max_tokens, plain)
    finally:
        engine.close()
    console.print("\n[bold]Try next[/]")
    command = pathlib.Path(sys.executable).with_name("aqua-jax")
    with contextlib.suppress(ValueError):
        command = command.relative_to(pathlib.Path.cwd())
    for what, rest in NEXT:
        line = f"  [cyan]{command} {rest}[/]  [dim]{what}[/]"
        console.print(line, soft_wrap=True, highlight=False)
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
