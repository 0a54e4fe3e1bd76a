"""Resident memory of this process and its children, from /proc. No jax."""

from __future__ import annotations

import os
from pathlib import Path


def _fields(pid: int) -> dict[str, str]:
    """/proc/PID/status as a dictionary; empty when the process is gone."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in text.splitlines() if ":" in line)
    return {name: value.strip() for name, value in pairs}


def process_tree(root: int | None = None) -> list[int]:
    """`root` (None: this process) and all its descendants."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            parent = _fields(int(entry.name)).get("PPid")
            if parent is not None:
                children.setdefault(int(parent), []).append(int(entry.name))
    found, todo = [], [root or os.getpid()]
    while todo:
        pid = todo.pop()
        found.append(pid)
        todo += children.get(pid, [])
    return found


def peak_rss(root: int | None = None) -> dict[str, object]:
    """Highest resident sizes of a process tree, MiB.

    Returns:
      sum_mib over the processes (shared pages count in each), max_mib, and [name, MiB] of each.
    """
    parts: list[tuple[str, int]] = []
    for pid in process_tree(root):
        fields = _fields(pid)
        if "VmHWM" in fields:
            parts.append((fields["Name"], int(fields["VmHWM"].split()[0]) // 1024))
    sizes = [size for _, size in parts]
    return {
        "sum_mib": sum(sizes), "max_mib": max(sizes, default=0),
        "processes": sorted(parts, key=lambda part: -part[1]),
    }


def reset_peak() -> bool:
    """Starts this process's peak anew from what is resident now; False where that can't be."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True
