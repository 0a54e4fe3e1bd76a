"""The queue, and samples beside it that wait for their request's prompt to be computed once.

Held aside they block nobody; in the queue they would be heads that compute the same prompt again.
"""

from __future__ import annotations

from collections.abc import Set

from aqua_jax.scheduling.policies import Policy
from aqua_jax.scheduling.sequence import Sequence


class Queue:
    """Everyone who waits. Ended parents have no forks here."""

    def __init__(self, policy: Policy, live: Set[Sequence]) -> None:
        """`live`: sequences added and not ended, as they are at any time."""
        self._policy, self._live = policy, live
        self._held: dict[Sequence, list[Sequence]] = {}  # parent -> forks that await its prompt

    @property
    def num_held(self) -> int:
        """Forks that wait aside."""
        return sum(map(len, self._held.values())) if self._held else 0

    def push(self, sequence: Sequence) -> None:
        """Into the policy's queue, or, for a fork that can share its parent's prompt soon, aside:
        it comes back when the prompt is computed or the parent ends."""
        if self._awaits(sequence):
            assert sequence.parent is not None
            self._held.setdefault(sequence.parent, []).append(sequence)
        else:
            self._policy.push(sequence)

    def head(self, now: float) -> Sequence | None:
        """The head of the queue, if it can be admitted as far as its tokens are concerned."""
        while True:
            sequence = self._policy.head(now)
            if sequence is None or sequence.num_inflight > 0:
                return None
            if sequence.parent is None or not self._awaits(sequence):
                return sequence
            self._policy.remove(sequence)  # its parent was preempted meanwhile
            self.push(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out that has ended."""
        parent = sequence.parent
        forks = self._held.get(parent) if parent is not None else None
        if parent is None or forks is None or sequence not in forks:
            self._policy.remove(sequence)
            return
        forks.remove(sequence)
        if not forks:
            del self._held[parent]

    def release(self, parent: Sequence) -> None:
        """The prompt of a parent is computed, or it has ended: its forks queue."""
        for fork in self._held.pop(parent, ()):
            self._policy.push(fork)

    def _awaits(self, sequence: Sequence) -> bool:
        """Whether a parent's prompt can be shared soon, and cannot be yet."""
        parent = sequence.parent
        return (
            parent is not None
            and parent in self._live
            and sequence.preemptions == 0
            and parent.num_computed < sequence.prompt_len - 1
        )
