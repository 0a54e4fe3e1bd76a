"""Samples of one request that wait for its prompt to be computed once.

Held aside they block nobody; in the waiting queue they would be heads that compute the same prompt
again.
"""

from __future__ import annotations

from aqua_jax.scheduling.sequence import Sequence


class Forks:
    """Who waits for which parent. Ended parents have no forks here."""

    def __init__(self) -> None:
        self._held: dict[Sequence, list[Sequence]] = {}  # parent -> forks that await its prompt

    def __len__(self) -> int:
        return sum(map(len, self._held.values()))

    @staticmethod
    def awaits(sequence: Sequence, live: set[Sequence]) -> bool:
        """Whether a parent's prompt can be shared soon, and cannot be yet."""
        parent = sequence.parent
        return (
            parent is not None
            and parent in live
            and sequence.preemptions == 0
            and parent.num_computed < sequence.prompt_len - 1
        )

    def hold(self, sequence: Sequence) -> None:
        """Puts a fork aside."""
        assert sequence.parent is not None
        self._held.setdefault(sequence.parent, []).append(sequence)

    def remove(self, sequence: Sequence) -> bool:
        """Takes a fork out that has ended; False if it isn't here."""
        parent = sequence.parent
        forks = self._held.get(parent) if parent is not None else None
        if parent is None or forks is None or sequence not in forks:
            return False
        forks.remove(sequence)
        if not forks:
            del self._held[parent]
        return True

    def release(self, parent: Sequence) -> list[Sequence]:
        """The forks of a parent whose prompt is computed, or that has ended."""
        return self._held.pop(parent, [])
