"""A burst of prompts on SmolLM2-135M with memory for a tenth of it: first come first served beside
fair slices that page to another process's memory; then that process is killed in mid-burst.

  .venv/bin/python scripts/demo.py [--model=demo] [--max_tokens=64] [--output=build/demo] [--plain]

Three runs of the same prompts, each in an engine of its own. *fcfs*: whoever doesn't fit waits, or
is recomputed. *fair*: everybody gets turns, and the keys and values of whoever gives way go to a
lender, a process of its own (`aqua-jax lend`). *fair, lender killed*: the same, and the lender gets
SIGKILL when 40% of the tokens are there; what it held is recomputed, and every request still ends.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import demo_board
from demo_board import RunView
from rich.console import Console
from rich.live import Live

from aqua_jax import AquaError, Engine, EngineConfig, SamplingParams
from aqua_jax.bench import counters, plots, service
from aqua_jax.bench.open_loop import Run, Sample, Served
from aqua_jax.bench.traces import TraceRequest
from aqua_jax.engine.inspect import inspect
from aqua_jax.loading import load_tokenizer, resolve

_PROMPTS = pathlib.Path(__file__).with_name("demo_prompts.txt")
_SHARE = 10  # the pool holds one part in so many of what all answers need
_KILL_AT = 0.4  # of all tokens
_LOOK_EVERY_S = 0.1
_SAY_EVERY_S = 2.0  # without a terminal
_LENDER_S = 30.0  # until the lender listens

NEXT = (
    ("Ask it yourself", "generate --model=demo --chat --stream --prompt='Why do cats purr?'"),
    ("A file of jobs, resumable", "batch --model=demo --input=in.jsonl --output=out.jsonl"),
    ("This, measured", "bench --model=demo --workload=burst --policies=fcfs,fair --slices=5,20"
     " --with_floor --plots=build/bench"),
)


@dataclasses.dataclass
class Burst:
    """The prompts as token ids, and how long answers may get."""

    prompts: list[list[int]]
    texts: list[str]
    max_tokens: int
    page_tokens: int

    @property
    def pages(self) -> int:
        """That all prompts and answers need at the longest."""
        return sum(
            -(-(len(one) + self.max_tokens) // self.page_tokens) for one in self.prompts
        )


@dataclasses.dataclass
class Result:
    """One run: what it measured, what was answered."""

    run: Run
    tokens: list[list[int]]
    answers: list[str]
    metrics: dict[str, float]
    unfinished: int
    page_bytes: int
    lost_requests: int = 0  # had pages with the lender when it was killed


def read_burst(model: str, max_tokens: int, page_tokens: int) -> Burst:
    """The prompts through the model's chat template.

    Raises:
      AquaError: the model or its tokenizer isn't there.
    """
    tokenizer = load_tokenizer(resolve(model).path)
    texts = [line for line in _PROMPTS.read_text(encoding="utf-8").splitlines() if line.strip()]
    prompts = []
    for text in texts:
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True
        )
        prompts.append(tokenizer.encode(chat, add_special=False))
    return Burst(prompts, texts, max_tokens, page_tokens)


def start_lender(address: str, size: int) -> subprocess.Popen[str]:
    """`aqua-jax lend` as a process, once it listens.

    Raises:
      RuntimeError: it ended, or said nothing.
    """
    lender = subprocess.Popen(
        [sys.executable, "-m", "aqua_jax.cli.main", "lend", f"--bytes={size}",
         f"--listen={address}"],
        stderr=subprocess.PIPE, text=True,
    )
    assert lender.stderr is not None
    started = time.monotonic()
    line = lender.stderr.readline()
    if address not in line or time.monotonic() - started > _LENDER_S:
        lender.kill()
        raise RuntimeError(f"the lender did not start: {line}")
    return lender


def stop(lender: subprocess.Popen[str] | None) -> None:
    """Ends the lender, whatever it does."""
    if lender is not None:
        lender.kill()
        lender.wait()
        assert lender.stderr is not None
        lender.stderr.close()


def memory(stats: dict[str, Any]) -> list[tuple[str, int, int]]:
    """(name, pages in use, pages in all): the pool, then the tiers."""
    rows = [("pool", stats["pages"]["in_use"], stats["pages"]["total"])]
    for name, one in counters.stores(stats).items():
        lost = one.get("lost", False)
        shown = "lender" if name == "peer" else name
        rows.append((shown, 0 if lost else one["in_use"], 0 if lost else one["capacity"]))
    return rows


def states_of(engine: Engine, served: Sequence[Served], ended: Sequence[bool]) -> list[str]:
    """What each request is doing, by index."""
    look = inspect(engine)
    found = [
        ("failed" if one.error else "done") if over else "waiting"
        for one, over in zip(served, ended, strict=True)
    ]
    for values in look["rows"]:
        row = dict(zip(look["columns"], values, strict=True))
        if row["state"] == "running":
            state = "running"
        elif row.get("peer_pages"):
            state = "peer"
        elif row.get("host_pages"):
            state = "host"
        else:
            state = "away" if row["output_tokens"] else "waiting"
        found[int(row["request"])] = state
    return found


def run(
    config: EngineConfig, burst: Burst, view: RunView, show: Callable[[], None],
    watch: Callable[[int, list[str]], bool] = lambda tokens, states: False,
) -> Result:
    """One run of the burst in an engine of its own.

    Args:
      config: of the engine.
      burst: what is asked.
      view: kept up to date.
      show: called when it has changed.
      watch: called now and then with the tokens there are and the requests' states; true: it did
        something to requests whose pages a lender has.
    """
    params = SamplingParams(temperature=0.0, max_tokens=burst.max_tokens)
    served = [
        Served(TraceRequest(0.0, len(ids), burst.max_tokens), 0.0) for ids in burst.prompts
    ]
    outputs: list[Any] = [None] * len(served)
    ended = [False] * len(served)
    samples: list[Sample] = []
    lost = tokens = 0
    looked = -1.0
    with Engine(config) as engine:
        view.started = True
        before = engine.stats()
        start = time.monotonic()
        for index, ids in enumerate(burst.prompts):
            engine.add_request(str(index), {"prompt_token_ids": ids}, params, arrival=start)
        while engine.has_unfinished():
            changed = engine.step()
            now = time.monotonic() - start
            for output in changed:
                index = int(output.request_id)
                outputs[index] = output
                fresh = len(output.outputs[0].token_ids) - len(served[index].tokens)
                served[index].tokens += [now] * fresh
                tokens += fresh
                ended[index], served[index].error = output.finished, output.error
            if now - looked < _LOOK_EVERY_S and not all(ended):
                continue
            looked = now
            stats = engine.stats()
            moved = counters.difference(before, stats)
            waiting = sum(not one.tokens for one in served)
            samples.append(Sample(
                now, waiting, ended.count(False), stats["pages"]["in_use"], stats["running"],
                {name: one["in_use"] for name, one in counters.stores(stats).items()},
                int(moved.get("bytes_out", 0)), int(moved.get("bytes_in", 0)),
            ))
            view.states, view.memory = states_of(engine, served, ended), memory(stats)
            view.ttft_s = [one.tokens[0] for one in served if one.tokens]
            view.tokens, view.elapsed_s = tokens, now
            if watch(tokens, view.states):
                lost = view.count("peer")
            show()
        after = engine.stats()
        model = engine.model_config
    page_bytes = model.num_layers * 2 * model.kv_size * 2 * config.page_tokens  # bfloat16
    done = Run(
        served, samples, after["pages"]["total"],
        {name: one["capacity"] for name, one in counters.stores(before).items()},
        counters.difference(before, after),
    )
    metrics = service.run_metrics(done, ttft_slo_s=1.0, tbt_slo_s=0.1)
    metrics |= counters.figures(done.counters, metrics["total_s"])
    unfinished = sum(
        one is None or not one.finished or one.error is not None for one in outputs
    )
    answers = ["" if one is None else one.outputs[0].text for one in outputs]
    ids = [[] if one is None else list(one.outputs[0].token_ids) for one in outputs]
    return Result(done, ids, answers, metrics, unfinished, page_bytes, lost)


class Display:
    """The live board on a terminal; elsewhere a line every two seconds."""

    def __init__(self, console: Console, views: Sequence[RunView], plain: bool) -> None:
        self.console, self.views, self.plain = console, views, plain
        self._said = 0.0

    @contextlib.contextmanager
    def live(self) -> Iterator[None]:
        """Draws while inside; leaves the last picture."""
        if self.plain:
            yield
            return
        with Live(
            get_renderable=lambda: demo_board.board(self.views, self.console),
            console=self.console, refresh_per_second=5,
        ):
            yield

    def show(self, view: RunView) -> None:
        """Something has changed; the live board sees it by itself."""
        now = time.monotonic()
        over = view.count("done") + view.count("failed") == len(view.states)
        if self.plain and (over or now - self._said >= _SAY_EVERY_S):
            self._said = now
            self.say(view.line())

    def say(self, text: str) -> None:
        """A line of its own."""
        self.console.print(text, soft_wrap=True, highlight=False)


COLUMNS = (  # short, for terminals of 80 characters; TTFT: time to the first token
    "TTFT p50", "TTFT p99", "worst gap", "tok/s", "paged MiB", "computed again",
)


def cells(metrics: dict[str, float]) -> list[str]:
    """A run's figures for the table."""
    paged = "-"
    if "paged_out_mib" in metrics:
        paged = f"{metrics['paged_out_mib'] + metrics['paged_in_mib']:.0f}"
    return [
        f"{metrics['ttft_p50_s']:.2f} s", f"{metrics['ttft_p99_s']:.2f} s",
        f"{metrics.get('tbt_max_ms', 0.0) / 1e3:.2f} s", f"{metrics['output_tok_s']:.0f}",
        paged, f"{metrics['recomputed_tokens']:.0f} tokens",
    ]


def run_all(
    config: EngineConfig, burst: Burst, display: Display, folder: pathlib.Path
) -> dict[str, Result]:
    """The three runs, with a lender for the last two."""
    fcfs, fair, killed = display.views
    results = {"fcfs": run(config, burst, fcfs, lambda: display.show(fcfs))}
    address = f"@aqua-demo-{os.getpid()}"
    lender = start_lender(address, burst.pages * results["fcfs"].page_bytes)
    try:
        paged = dataclasses.replace(config, policy="fair", peer=address)
        timeline = str(folder / "fair.trace.json")
        results["fair"] = run(
            dataclasses.replace(paged, trace_events=timeline), burst, fair,
            lambda: display.show(fair),
        )
        kill_at = _KILL_AT * results["fair"].metrics["tokens"]

        def watch(tokens: int, states: list[str]) -> bool:
            if tokens < kill_at or lender.poll() is not None or "peer" not in states:
                return False
            lender.send_signal(signal.SIGKILL)
            lender.wait()
            killed.note = f"lender killed at {killed.elapsed_s:.1f} s"
            if display.plain:
                display.say(killed.note)
            return True

        results["fair, lender killed"] = run(
            paged, burst, killed, lambda: display.show(killed), watch
        )
    finally:
        stop(lender)
    return results


def report(results: dict[str, Result], burst: Burst, killed: RunView, display: Display) -> bool:
    """Tables and what happened, as measured; whether every request ended well."""
    rows = [(name, cells(result.metrics)) for name, result in results.items()]
    display.console.print(demo_board.table(rows, COLUMNS))
    fcfs, fair, last = results.values()
    gain = fcfs.metrics["ttft_p99_s"] / fair.metrics["ttft_p99_s"]
    rate = fair.metrics["output_tok_s"] / fcfs.metrics["output_tok_s"]
    display.say(
        f"The p99 of times to the first token was {gain:.1f} times as long under fcfs as under "
        f"fair, which wrote {rate * 100:.0f}% of its tokens/s."
    )
    count = len(burst.prompts)
    if killed.note:
        display.say(
            f"The lender was killed while it held pages of {last.lost_requests} requests. "
            f"{count - last.unfinished} of {count} requests finished; "
            f"{last.metrics['recomputed_tokens']:.0f} tokens were computed again."
        )
    else:
        display.say("The lender held nothing at the time it was to be killed; it was not.")
    alike = []
    for name, other in (("fcfs", fcfs), ("the undisturbed run", fair)):
        alike.append(sum(one == two for one, two in zip(last.tokens, other.tokens, strict=True)))
        display.say(f"{alike[-1]} of its {count} answers are those of {name}, token by token.")
    if min(alike) < count:
        display.say(
            "(Others part where two words were almost equally likely: sums are rounded "
            "differently in batches of different sizes. --deterministic makes all equal.)"
        )
    for text, answer in list(zip(burst.texts, last.answers, strict=True))[:2]:
        display.say(f"\n[bold]{text}[/]\n{answer.strip()[:300]}")
    return all(result.unfinished == 0 for result in results.values())


def main() -> int:
    """Run the burst three times and say what was seen; returns the exit status."""
    parser = argparse.ArgumentParser(description="A burst with memory for a tenth of it.")
    parser.add_argument("--model", default="demo", help="'demo', a directory or a .gguf file")
    parser.add_argument("--max_tokens", type=int, default=64, help="longest answer, in tokens")
    parser.add_argument("--output", default="build/demo", help="folder for pictures")
    parser.add_argument("--plain", action="store_true", help="no live display")
    parser.add_argument(
        "--deterministic", action="store_true", help="equal answers in all runs; slower"
    )
    arguments = parser.parse_args()
    # So that the lender ends with us.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    console = Console()
    if not console.is_terminal:
        console = Console(width=100)
    try:
        folder = plots.prepare_folder(arguments.output)
        burst = read_burst(arguments.model, arguments.max_tokens, EngineConfig.page_tokens)
        pool = -(-burst.pages // _SHARE)
        config = EngineConfig(
            model=arguments.model, dtype="bfloat16", kv_cache_tokens=pool * burst.page_tokens,
            warmup="full", policy="fcfs", deterministic=arguments.deterministic,
        )
        titles = ("fcfs", "fair", "fair, lender killed")
        views = [RunView(title, ["waiting"] * len(burst.prompts)) for title in titles]
        display = Display(console, views, arguments.plain or not console.is_terminal)
        display.say(
            f"[bold]{len(burst.prompts)} prompts at once[/], answers of up to "
            f"{burst.max_tokens} tokens: they need up to {burst.pages} pages of "
            f"{burst.page_tokens} tokens, the pool has {pool}."
        )
        with display.live():
            results = run_all(config, burst, display, folder)
    except (AquaError, RuntimeError) as error:
        console.print(f"[red]{type(error).__name__}[/]: {error}")
        return 1
    good = report(results, burst, views[2], display)
    files = plots.save_plots(
        {name: one.run for name, one in results.items()}, folder,
        f"{arguments.model}, burst of {len(burst.prompts)}, memory for a tenth of it",
    )
    display.say("\n[bold]Saved[/]")
    for file in (*files, folder / "fair.trace.json"):
        hint = "  (open it in ui.perfetto.dev)" if file.name.endswith("trace.json") else ""
        display.say(f"  {file}{hint}")
    display.say("\n[bold]Try next[/]")
    command = pathlib.Path(sys.executable).with_name("aqua-jax")
    with contextlib.suppress(ValueError):
        command = command.relative_to(pathlib.Path.cwd())
    for what, rest in NEXT:
        display.say(f"  [cyan]{command} {rest}[/]  [dim]{what}[/]")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
