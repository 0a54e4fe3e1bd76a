"""The coordinator's status as a table for people."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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


def _arenas(rows: Iterable[Any]) -> list[tuple[str, ...]]:
    """A line for what one process lends under one name: an engine's extents are an arena each."""
    found: dict[tuple[str, ...], list[Any]] = {}
    for row in rows:
        key = row.name or str(row.arena), row.lender or "-", str(row.pid), row.kind, row.domain
        found.setdefault(key, []).append(row)
    return [
        (
            *key[:4], key[4] or "-", str(len(group)),
            *(size(sum(getattr(row, column) for row in group))
              for column in ("lent", "free", "dirty", "held", "wanted")),
        )
        for key, group in found.items()
    ]


def _leases(rows: Iterable[Any], names: Mapping[int, str]) -> list[tuple[str, ...]]:
    """A line for what one process holds of that, as long as nothing is wanted back; the parts of
    which something is wanted have their own."""
    found: dict[tuple[str, str, str, bool], list[Any]] = {}
    for row in rows:
        key = row.holder or "-", str(row.pid), names[row.arena], row.wanted > 0
        found.setdefault(key, []).append(row)
    return [
        (
            holder, pid, size(sum(row.held for row in group)), name, str(len(group)),
            age(max(row.age_ms for row in group)), _state(group),
        )
        for (holder, pid, name, _), group in found.items()
    ]


def _state(group: Sequence[Any]) -> str:
    words = []
    if any(row.quarantined for row in group):  # one process: all of them
        words.append("quarantined")
    wanted = sum(row.wanted for row in group)
    if wanted:
        deadline = min(row.deadline_ms for row in group)
        when = f"late by {age(-deadline)}" if deadline < 0 else f"within {age(deadline)}"
        words.append(f"{size(wanted)} wanted back, {when}")
    return ", ".join(words) or "held"


def table(reply: Any) -> str:
    """A `StatusReply` as lines: who lends, who holds, since when, what is wanted back."""
    lines = [f"up {age(reply.up_ms)}, {len(reply.clients)} clients, term {age(reply.term_ms)}"]
    if reply.arenas:
        lines += ["", *_table(
            (
                "ARENA", "LENDER", "PID", "KIND", "WHERE", "PARTS", "LENT", "FREE", "ZEROING",
                "HELD", "WANTED",
            ),
            _arenas(reply.arenas),
        )]
    if reply.leases:
        names = {row.arena: row.name or str(row.arena) for row in reply.arenas}
        lines += ["", *_table(
            ("HOLDER", "PID", "HOLDS", "OF", "PARTS", "SINCE", "STATE"),
            _leases(reply.leases, names),
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
