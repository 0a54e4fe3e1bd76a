"""Where a request's bytes come from: preference first, then distance, then free space."""

from __future__ import annotations

from collections.abc import Sequence

from aqua_jax.coordinator.records import Arena, round_up

Piece = tuple[Arena, int, int]  # arena, start, units


def distance(here: str, there: str) -> int:
    """Steps from one domain to another: names not shared, from the first that differs."""
    a = here.split("/") if here else []
    b = there.split("/") if there else []
    shared = 0
    while shared < min(len(a), len(b)) and a[shared] == b[shared]:
        shared += 1
    return len(a) + len(b) - 2 * shared


def in_order(arenas: Sequence[Arena], domain: str, prefer: Sequence[str]) -> list[Arena]:
    """Arenas, best first.

    Args:
      arenas: to choose from.
      domain: of the consumer.
      prefer: kinds of memory, best first; others come after them.
    """
    rank = {kind: place for place, kind in reversed(list(enumerate(prefer)))}
    return sorted(
        arenas,
        key=lambda arena: (
            rank.get(arena.terms.kind, len(rank)), distance(domain, arena.terms.domain),
            -arena.free.total, arena.id,
        ),
    )


def _units(length: int, unit: int) -> int:
    """How many units fit into `length` bytes when each piece is rounded up to whole pages."""
    units = length // unit
    while units and round_up(units * unit) > length:
        units -= 1
    return units


def _runs(arena: Arena, unit: int) -> list[tuple[int, int]]:
    """(units, start) of the free runs that hold a unit."""
    found = [(_units(end - start, unit), start) for start, end in arena.free]
    return [run for run in found if run[0]]


def _fill(ordered: list[list[tuple[Arena, int, int]]], units: int, pieces: int) -> list[Piece]:
    """Takes from groups of (arena, start, units) in order, within a group the fewest pieces."""
    taken: list[Piece] = []
    for group in ordered:
        rest = sorted(group, key=lambda run: (run[2], run[0].id, run[1]))
        while rest and units and len(taken) < pieces:
            # The smallest that is enough; otherwise the largest.
            found = next((run for run in rest if run[2] >= units), rest[-1])
            rest.remove(found)
            taken.append((found[0], found[1], min(units, found[2])))
            units -= taken[-1][2]
    return taken


def choose(arenas: Sequence[Arena], units: int, unit: int, pieces: int) -> list[Piece]:
    """Free runs for `units` units of `unit` bytes in at most `pieces` runs.

    Args:
      arenas: best first.
      units: how many.
      unit: bytes that may not be torn apart.
      pieces: runs at most.

    Returns:
      (arena, start, units) for each piece: all of them from the best arenas if that is possible,
      otherwise from as few as it takes; as much as there is when it isn't enough.
    """
    groups = [[(arena, start, n) for n, start in _runs(arena, unit)] for arena in arenas]
    everything = [run for group in groups for run in group]
    plans = [_fill(groups, units, pieces)]
    # Small runs of the best arenas may have used the pieces up: one arena alone, or the longest.
    plans += [_fill([group], units, pieces) for group in groups]
    plans.append(_fill([everything], units, pieces))
    return max(plans, key=lambda plan: sum(piece[2] for piece in plan))  # the first of equals
