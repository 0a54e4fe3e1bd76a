"""What `make demo` shows while it runs: a panel for each run, a mark for each request."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.columns import Columns
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from aqua_jax.bench.latency import percentile

_ROW = 16  # marks in a row
_BAR = 16  # characters of a full bar
# state -> (mark, mark where only ASCII can be shown, colour)
STATES = {
    "waiting": ("·", ".", "dim"),
    "running": ("●", "R", "bold green"),
    "peer": ("◐", "P", "bright_blue"),
    "host": ("◑", "H", "yellow"),
    "away": ("○", "o", "magenta"),
    "done": ("✓", "+", "green"),
    "failed": ("✗", "X", "bold red"),
}
MEANINGS = {
    "waiting": "waiting for a first token", "running": "running",
    "peer": "pages in the lender's memory", "host": "in our own", "away": "to be recomputed",
    "done": "done", "failed": "failed",
}


@dataclasses.dataclass
class RunView:
    """One run as it is shown.

    Attributes:
      title: what runs.
      states: of each request, keys of `STATES`.
      memory: (name, pages in use, pages in all) of the pool and of each store.
      ttft_s: seconds to the first token of those that have one.
      tokens: generated so far.
      elapsed_s: since the requests came.
      started: whether it has begun.
      note: what happened meanwhile.
    """

    title: str
    states: list[str]
    memory: list[tuple[str, int, int]] = dataclasses.field(default_factory=list)
    ttft_s: list[float] = dataclasses.field(default_factory=list)
    tokens: int = 0
    elapsed_s: float = 0.0
    started: bool = False
    note: str = ""

    def count(self, state: str) -> int:
        """Requests in a state."""
        return self.states.count(state)

    def line(self) -> str:
        """Where the run stands, in words, for when nothing can be drawn."""
        away = {name: self.count(name) for name in ("peer", "host", "away")}
        parts = [f"{self.count('done')} done", f"{self.count('running')} running"]
        parts += [
            f"{count} {words}" for (name, count), words in zip(
                away.items(), ("in the lender's memory", "in host memory", "to be recomputed"),
                strict=True,
            ) if count
        ]
        parts.append(f"{self.count('waiting')} waiting for a first token")
        rate = self.tokens / max(self.elapsed_s, 1e-9)
        return f"{self.title}: {self.elapsed_s:5.1f} s: {', '.join(parts)}; {rate:.0f} tokens/s"


def _marks(view: RunView, ascii_only: bool) -> Text:
    text = Text()
    for index, state in enumerate(view.states):
        mark, plain, colour = STATES[state]
        text.append((plain if ascii_only else mark) + " ", colour)
        if (index + 1) % _ROW == 0 and index + 1 < len(view.states):
            text.append("\n")
    return text


def _bars(view: RunView, ascii_only: bool) -> Text:
    full, empty = ("#", "-") if ascii_only else ("█", "░")
    text = Text()
    for name, used, total in view.memory:
        share = round(_BAR * used / total) if total else 0
        text.append(f"{name:<7}")
        text.append(full * share, "cyan")
        text.append(empty * (_BAR - share), "dim")
        text.append(f" {used}/{total}\n" if total else " gone\n", "dim")
    return text


def panel(view: RunView, ascii_only: bool) -> Panel:
    """One run."""
    body = Text()
    body.append_text(_marks(view, ascii_only))
    body.append("\n")
    body.append_text(_bars(view, ascii_only))
    if view.started:
        first = f"{percentile(view.ttft_s, 99):.2f} s" if view.ttft_s else "-"
        rate = view.tokens / max(view.elapsed_s, 1e-9)
        body.append(f"{view.elapsed_s:.1f} s, {rate:.0f} tokens/s\n")
        body.append(f"TTFT p99 {first}")
        if len(view.ttft_s) < len(view.states):
            body.append(f" ({len(view.ttft_s)} of {len(view.states)})", "dim")
    else:
        body.append("next", "dim")
    body.append(f"\n{view.note}", "bold red")
    done = view.count("done") == len(view.states)
    return Panel(
        body, title=view.title, title_align="left", width=2 * _ROW + 4,
        border_style="green" if done else "cyan" if view.started else "dim",
    )


def legend(console: Console) -> Text:
    """What the marks mean."""
    text = Text()
    for state, (mark, plain, colour) in STATES.items():
        if state == "failed":
            continue
        text.append(plain if console.options.ascii_only else mark, colour)
        text.append(f" {MEANINGS[state]}  ", "dim")
    return text


def board(views: Sequence[RunView], console: Console) -> Group:
    """All runs beside each other, as far as the terminal is wide."""
    ascii_only = console.options.ascii_only
    return Group(Columns([panel(view, ascii_only) for view in views]), legend(console))


def table(rows: Sequence[tuple[str, Sequence[str]]], columns: Sequence[str]) -> Table:
    """A line of measured figures for each run."""
    shown = Table(title="What was measured", box=SIMPLE_HEAD, title_justify="left")
    shown.add_column("run", no_wrap=True)
    for column in columns:
        shown.add_column(column, justify="right", no_wrap=True)
    for name, cells in rows:
        shown.add_row(name, *cells)
    return shown
