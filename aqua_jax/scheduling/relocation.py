"""Empties pages that are to be lent while sequences run on them: copies to other pages of the pool.

Copied at the head of a step that computes something, after the step before has written them, so no
sequence notices. A page that anything else still reads or writes (a copy to a store, a page on its
way in, a fork that is being made) is left for a later plan; so are all while there is no room
besides what running sequences are about to ask for: lending never makes anybody give way.
"""

from __future__ import annotations

from collections.abc import Collection

from aqua_jax.paging.pages import PageHandle
from aqua_jax.paging.withdrawal import WithdrawablePool
from aqua_jax.scheduling.holdings import Holdings
from aqua_jax.scheduling.room import Room
from aqua_jax.scheduling.sequence import Sequence

# Of one step: they are on its way. 16 pages of 384 KiB are 6 MiB.
MOST = 16


def relocate(
    holdings: Holdings, room: Room, running: Collection[Sequence], copies: list[tuple[int, int]]
) -> tuple[Sequence, ...]:
    """Moves sequences off pages that are being withdrawn.

    To be called when everything else of a plan is decided: what is added is copied before any of
    the plan's tokens are computed, and by then nothing else of the plan may name the old pages.

    Args:
      holdings: of a pool, perhaps with pages in use that are withdrawn.
      room: knows what sequences are about to ask for.
      running: all sequences with pages.
      copies: of the plan, page ids (source, target); those that are needed are added.

    Returns:
      The sequences whose page tables have changed.
    """
    pool, residency = holdings.pool, holdings.residency
    if not pool.draining:
        return ()
    assert isinstance(pool, WithdrawablePool)
    holders: dict[PageHandle, list[tuple[Sequence, int]]] = {}
    for sequence in running:
        for index, page in enumerate(sequence.pages):
            if pool.withdrawn(page.id):
                holders.setdefault(page, []).append((sequence, index))
    spare = pool.available - room.needs(running)
    most = min(spare, MOST, room.copies - len(copies))
    changed: dict[Sequence, None] = {}
    for old, places in holders.items():
        if most <= 0:
            break
        pages = pool.allocate(1) if pool.references(old) == len(places) else None
        if pages is None:
            continue
        new = pages[0]
        pool.move(old, new, len(places))
        if residency is not None:
            residency.moved(old, new)
        for sequence, index in places:
            sequence.pages[index] = new
            changed[sequence] = None
        copies.append((old.id, new.id))
        most -= 1
    return tuple(changed)
