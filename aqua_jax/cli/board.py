"""What `aqua-jax top` shows: a snapshot of a server as lines of styled text. No terminal here.

Lines are put together by hand: two thousand requests twice a second leave no time for a table that
measures its cells, and only what fits on the screen is looked at closely.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

Span = tuple[str, str]  # text, style
Line = list[Span]

STATES = ("running", "swapped", "waiting")
_STYLES = {"running": "green", "swapped": "yellow", "waiting": "dim"}
_TIERS = (
    ("pool_pages", "█", "cyan"), ("peer_pages", "▓", "magenta"), ("host_pages", "▒", "yellow"),
)
_BAR = 20  # cells of a residency bar

# Title, column of the snapshot, width, alignment.
_COLUMNS = (
    ("REQUEST", "request", 14, "<"), ("USER", "user", 10, "<"), ("STATE", "state", 8, "<"),
    ("PROMPT", "prompt_tokens", 7, ">"), ("OUT", "output_tokens", 6, ">"),
    ("VRUNTIME", "vruntime", 10, ">"), ("SLICE", "slice_left", 6, ">"),
    ("POOL", "pool_pages", 5, ">"), ("PEER", "peer_pages", 5, ">"), ("HOST", "host_pages", 5, ">"),
    ("TTFT", "ttft_s", 8, ">"), ("AGE", "age_s", 7, ">"),
)
_LENDERS = 4  # shown at most


@dataclasses.dataclass(frozen=True)
class Rates:
    """What happened between two snapshots, a second.

    Attributes:
      steps: run.
      tokens: generated.
      out_bytes: moved from the pool into stores.
      in_bytes: moved back.
      preemptions: sequences that gave way.
      lenders: by name, bytes moved into their memory, and back.
    """

    steps: float = 0.0
    tokens: float = 0.0
    out_bytes: float = 0.0
    in_bytes: float = 0.0
    preemptions: float = 0.0
    lenders: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)


def rates(before: Mapping[str, Any] | None, after: Mapping[str, Any]) -> Rates:
    """Of two snapshots of the same server; zeros without a first one."""
    if before is None or after["time"] <= before["time"]:
        return Rates()
    span = after["time"] - before["time"]
    old, new = before["stats"], after["stats"]

    def rate(*path: str) -> float:
        values = []
        for stats in (old, new):
            value: Any = stats
            for key in path:
                value = (value or {}).get(key, 0)
            values.append(value or 0)
        return max(0.0, (values[1] - values[0]) / span)

    return Rates(
        rate("steps"), rate("output_tokens"), rate("paging", "bytes_out"),
        rate("paging", "bytes_in"), rate("preemptions"),
        {
            name: (max(0.0, out - was[0]) / span, max(0.0, back - was[1]) / span)
            for name, (out, back) in _lenders(new).items()
            for was in (_lenders(old).get(name, (out, back)),)
        },
    )


def _lenders(stats: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Bytes moved into lenders' memory and back, by name."""
    return {
        lender["lender"]: (lender["bytes_out"], lender["bytes_in"])
        for store in (stats.get("paging") or {}).get("stores", ())
        for lender in store.get("lenders", ())
    }


def size(count: float) -> str:
    """Bytes in at most four digits and a unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def board(state: Mapping[str, Any], speed: Rates, width: int, height: int) -> list[Line]:
    """The whole screen.

    Args:
      state: what `/debug/state` says.
      speed: since the snapshot before.
      width: of the screen, in cells.
      height: of the screen, in lines.
    """
    place = {name: number for number, name in enumerate(state["columns"])}
    groups: dict[str, list[Sequence[Any]]] = {name: [] for name in STATES}
    at = place["state"]
    for row in state["rows"]:
        groups[row[at]].append(row)
    lines = _head(state, speed, {name: len(rows) for name, rows in groups.items()}, width)
    room = max(0, height - len(lines) - 1)
    shown = [row for name in STATES for row in groups[name][:room]][:room]
    titles = " ".join(f"{title:{side}{cells}}" for title, _, cells, side in _COLUMNS)
    lines.append([(f"{titles}  PAGES"[:width].ljust(width), "reverse")])
    most = max((sum(row[place[name]] or 0 for name, _, _ in _TIERS) for row in shown), default=1)
    for row in shown:
        lines.append(_row(row, place, state["time"], most, width))
    left = len(state["rows"]) - len(shown)
    if left > 0:
        lines[-1] = [(f"... and {left + 1} more", "dim")]
    return lines[:height]


def _head(
    state: Mapping[str, Any], speed: Rates, counts: Mapping[str, int], width: int
) -> list[Line]:
    stats = state["stats"]
    first: Line = [(f" {state['model']} ", "bold reverse"), ("  ", "")]
    for name in STATES:
        first.append((f"{counts[name]} {name}  ", _STYLES[name]))
    first.append((
        f"{speed.steps:.1f} steps/s  {speed.tokens:.0f} tokens/s  "
        f"{speed.preemptions:.1f} preemptions/s", "",
    ))
    pages = stats["pages"]
    second: Line = [("pool ", "bold"), *_meter(pages["in_use"], pages["cached"], pages["total"])]
    second.append((f" {pages['in_use']}/{pages['total']} pages", ""))
    if pages["cached"]:
        second.append((f", {pages['cached']} cached", "dim"))
    lines = [_cut(first, width), _cut(second, width)]
    lending = stats.get("lending")
    if lending:
        lines.append(_cut(_lent(lending), width))
    paging = stats.get("paging") or {}
    for store in paging.get("stores", ()):
        total = store["capacity"]
        line: Line = [(f"{store['name'][:4]:4} ", "bold"), *_meter(store["in_use"], 0, total)]
        line.append((f" {store['in_use']}/{total} pages" + (" LOST" * bool(store["lost"])), ""))
        lines.append(_cut(line, width))
        # Those whose memory is there, the one with most pages in it first.
        lenders = sorted(store.get("lenders", ()), key=lambda one: -one["in_use"])
        for lender in lenders[:_LENDERS]:
            lines.append(_cut(_lender(lender, speed), width))
    if paging:
        link = f" out {size(speed.out_bytes)}/s, in {size(speed.in_bytes)}/s"
        moves = f", {paging['outstanding']} moves under way"
        lines.append(_cut([("link", "bold"), (link, ""), (moves, "dim")], width))
    return [*lines, []]


def _lender(lender: Mapping[str, Any], speed: Rates) -> Line:
    """Whose memory pages are in, what is wanted back, and what moves there and back."""
    out, back = speed.lenders.get(lender["lender"], (0.0, 0.0))
    line: Line = [
        ("  of ", "dim"), (printable(lender["lender"] or "a lender"), "magenta"),
        (f" {lender['in_use']}/{lender['capacity']} pages", ""),
        (f" out {size(out)}/s, in {size(back)}/s", "dim"),
    ]
    if lender["wanted"]:
        line.append((f" {lender['wanted']} WANTED BACK", "bold red"))
    if lender["lost"]:
        line.append((" LOST", "bold red"))
    return line


def _meter(used: int, cached: int, total: int, cells: int = 30) -> Line:
    """How full something is."""
    full = round(used / total * cells) if total else 0
    half = min(cells - full, round(cached / total * cells)) if total else 0
    return [("█" * full, "cyan"), ("░" * half, "cyan"), ("·" * (cells - full - half), "dim")]


def _row(
    row: Sequence[Any], place: Mapping[str, int], now: float, most: int, width: int
) -> Line:
    state = row[place["state"]]
    cells = []
    for _, name, room, side in _COLUMNS:
        if name == "age_s":
            text = f"{now - row[place['arrived']]:.1f}s"
        elif name == "ttft_s":
            known = row[place[name]]
            # Brackets: still waiting for the first token.
            text = f"({now - row[place['arrived']]:.1f}s)" if known is None else f"{known:.2f}s"
        elif name == "request":
            sample = row[place["sample"]]
            text = f"{row[place[name]]}" + (f"/{sample}" if sample else "")
        else:
            value = row[place[name]]
            text = "-" if value is None or value == "" else f"{value}"
        text = printable(text)
        text = text if len(text) <= room else text[: room - 1] + "…"
        cells.append(f"{text:{side}{room}}")
    line: Line = [(" ".join(cells) + "  ", _STYLES[state])]
    for name, mark, style in _TIERS:
        count = row[place[name]] or 0
        line.append((mark * max(bool(count), round(count / max(1, most) * _BAR)), style))
    return _cut(line, width)


def _lent(lending: Mapping[str, Any]) -> Line:
    """What of the pool others have."""
    lent, lendable = lending["lent"], lending["lendable"]
    line: Line = [("lent ", "bold"), *_meter(lent, lending["emptying"], lendable)]
    line.append((f" {lent}/{lendable} pages", ""))
    for count, words in (
        (lending["wanted_back"], "wanted back"), (lending["emptying"], "being emptied"),
        (lending["lost"], "lost"),
    ):
        if count:
            line.append((f", {count} {words}", "yellow"))
    if not lending["connected"]:
        line.append((", the coordinator is away", "yellow"))
    return line


def printable(text: str) -> str:
    """Names come from clients: nothing in them may steer a terminal."""
    return text if text.isprintable() else "".join(c if c.isprintable() else "?" for c in text)


def _cut(line: Line, width: int) -> Line:
    """The beginning of a line that fits."""
    result: Line = []
    for text, style in line:
        if width <= 0:
            break
        result.append((text[:width], style))
        width -= len(text)
    return result
