"""The coordinator's status as a table for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def size(count: int) -> str:
    """Bytes in the largest unit that gives at least one."""
    value, unit = float(count), 0
    while value >= 1024 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.4g} {_UNITS[unit]}"


def age(milliseconds: int) -> str:
    """A duration in its largest unit."""
    seconds = milliseconds / 1000
    for length, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [head, *rows]
    ]


def _lease_state(row: Any) -> str:
    words = []
    if row.quarantined:
        words.append("quarantined")
    if row.wanted:
        late = row.deadline_ms < 0
        when = f"late by {age(-row.deadline_ms)}" if late else f"within {age(row.deadline_ms)}"
        words.append(f"{size(row.wanted)} wanted back, {when}")
    return ", ".join(words) or "held"


def table(reply: Any) -> str:
    """A `StatusReply` as lines: who lends, who holds, since when, what is wanted back."""
    lines = [f"up {age(reply.up_ms)}, {len(reply.clients)} clients, term {age(reply.term_ms)}"]
    if reply.arenas:
        lines += ["", *_table(
            (
                "ARENA", "LENDER", "PID", "KIND", "WHERE", "LENT", "FREE", "ZEROING", "HELD",
                "WANTED",
            ),
            [
                (
                    row.name or str(row.arena), row.lender or "-", str(row.pid), row.kind,
                    row.domain or "-", size(row.lent), size(row.free), size(row.dirty),
                    size(row.held), size(row.wanted),
                )
                for row in reply.arenas
            ],
        )]
    if reply.leases:
        names = {row.arena: row.name or str(row.arena) for row in reply.arenas}
        lines += ["", *_table(
            ("HOLDER", "PID", "HOLDS", "OF", "SINCE", "STATE"),
            [
                (
                    row.holder or "-", str(row.pid), size(row.held), names[row.arena],
                    age(row.age_ms), _lease_state(row),
                )
                for row in reply.leases
            ],
        )]
    away = [row for row in reply.clients if row.state != "connected"]
    if away:
        lines += ["", *_table(
            ("CLIENT", "PID", "STATE", "LENDS", "HOLDS"),
            [
                (row.name or "-", str(row.pid), row.state, size(row.lent), size(row.held))
                for row in away
            ],
        )]
    return "\n".join(lines)
