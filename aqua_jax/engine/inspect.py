"""A look at everything alive inside an engine, for people. Runs on the engine's thread.

Looked at are the samples that a step may have changed since the last look: those that run or ran
then, those that have given way since, those whose pages are on their way. All others cost a
comparison: of 2,000 live samples of which 64 run, a look takes in a hundred or two. What isn't
there (a policy without vruntime, no tier below the pool, a slice without end) is None.
"""

from __future__ import annotations

import dataclasses
import math
import time
from typing import Any

from aqua_jax.engine.engine import Engine
from aqua_jax.engine.request import Request
from aqua_jax.paging.residency import Residency
from aqua_jax.scheduling.policies import Policy
from aqua_jax.scheduling.sequence import Sequence, Status

COLUMNS = (
    "request", "sample", "user", "state", "prompt_tokens", "output_tokens", "computed_tokens",
    "arrived", "ttft_s", "vruntime", "slice_left", "pool_pages", "peer_pages", "host_pages",
    "preemptions",
)

Key = tuple[str, int]  # request and sample: the first two columns
Row = tuple[Any, ...]

_STATE, _SWAPPED = COLUMNS.index("state"), "swapped"
_NOTHING: Row = (None,) * len(COLUMNS)


@dataclasses.dataclass(frozen=True)
class Look:
    """What has changed.

    Attributes:
      number: of this look, rising.
      rows: by request and sample, those that are new or have changed; states "running", "waiting"
        or "swapped", pages in a store counted whether or not the pool has them as well, "arrived"
        in seconds of `time.monotonic()`. New ones come in order of arrival.
      gone: those that have ended; a key may have come again and be in `rows` as well.
      users: vruntime by name of those for whom it has changed; None: nothing of them is alive.
      stats: `Engine.stats()` without the bound on waiting.
      time: of `time.monotonic()`.
    """

    number: int
    rows: dict[Key, Row]
    gone: tuple[Key, ...]
    users: dict[str, float | None]
    stats: dict[str, Any]
    time: float


class _Entry:
    """A live sample as it was when it was looked at."""

    __slots__ = (
        "arrived", "copies", "key", "preemptions", "request", "row", "sequence", "settled", "ttft",
    )

    def __init__(self, request: Request, sequence: Sequence) -> None:
        self.request, self.sequence = request, sequence
        self.key: Key = (sequence.request_id, sequence.sample_index)
        self.arrived = round(request.output.metrics.arrival_time, 4)
        self.ttft: float | None = None
        self.row: Row = _NOTHING
        self.settled = False  # it waits, and nothing of it is under way
        self.preemptions = 0
        self.copies = 0


class Inspector:
    """Looks at one engine again and again."""

    def __init__(self) -> None:
        self._number = 0
        self._entries: dict[int, _Entry] = {}  # by sequence
        self._users: dict[str, dict[_Entry, None]] = {}  # who is alive of them
        self._vruntimes: dict[str, float] = {}
        self._newest = -1  # sequence known
        self._swapped = 0
        self._shifts = 0  # of copies from store to store, when last looked
        # Not taken by whoever asks.
        self._rows: dict[Key, Row] = {}
        self._gone: dict[Key, None] = {}
        self._changed: dict[str, float | None] = {}

    def look(self, engine: Engine, taken: int = 0) -> Look:
        """What has changed since look number `taken`, if that was the last one, or else since an
        earlier one that was taken: an answer that got lost costs nothing but its repetition.

        Args:
          engine: the same one each time.
          taken: number of the look that arrived last; 0: none did.
        """
        if taken == self._number:
            self._rows, self._gone, self._changed = {}, {}, {}
        self._number += 1
        residency, policy = engine.scheduler.residency, engine.scheduler.policy
        looked_at = self._touched(residency)
        for entry in looked_at:
            if entry.sequence.status is Status.FINISHED:
                self._drop(entry)
        self._add(engine, looked_at)
        for entry in looked_at:
            if entry.sequence.status is not Status.FINISHED:
                self._look_at(entry, policy, residency)
        self._look_at_users(policy)
        return Look(
            self._number, self._rows, tuple(self._gone), self._changed,
            {**engine.stats(bounds=False), "swapped": self._swapped}, time.monotonic(),
        )

    def _touched(self, residency: Residency | None) -> list[_Entry]:
        """Those known that may have changed."""
        # Two thousand times: what is looked up twice here is a tenth of a millisecond.
        waiting, entries = Status.WAITING, self._entries.values()
        found = [
            entry for entry in entries
            if not entry.settled or (one := entry.sequence).preemptions != entry.preemptions
            or one.status is not waiting
        ]
        if residency is None:
            return found
        counters, copies = residency.counters, residency.copies
        shifts = counters.relocated + counters.climbed
        lost = any(store.lost for store in residency.tiers)  # until its copies are given up
        everything, self._shifts = lost or shifts != self._shifts, shifts
        known = set(found)
        return found + [
            entry for entry in entries
            if entry.copies and (everything or len(copies(entry.sequence)) != entry.copies)
            and entry not in known
        ]

    def _add(self, engine: Engine, looked_at: list[_Entry]) -> None:
        """Appends those that are new, in order of arrival."""
        new: list[Request] = []
        for request in reversed(engine.requests):
            if request.samples[0].sequence.seq_id <= self._newest:
                break
            new.append(request)
        for request in reversed(new):
            for sample in request.samples:
                sequence = sample.sequence
                self._newest = sequence.seq_id
                if sequence.status is not Status.FINISHED:
                    entry = self._entries[sequence.seq_id] = _Entry(request, sequence)
                    self._users.setdefault(sequence.user, {})[entry] = None
                    looked_at.append(entry)

    def _drop(self, entry: _Entry) -> None:
        user = entry.sequence.user
        del self._entries[entry.sequence.seq_id]
        self._swapped -= entry.row[_STATE] == _SWAPPED
        del self._users[user][entry]
        if not self._users[user]:
            del self._users[user]
        self._rows.pop(entry.key, None)
        self._gone[entry.key] = None

    def _look_at(self, entry: _Entry, policy: Policy, residency: Residency | None) -> None:
        sequence, request = entry.sequence, entry.request
        running = sequence.status is Status.RUNNING
        if entry.ttft is None and (first := request.output.metrics.first_token_time) is not None:
            entry.ttft = round(first - request.output.metrics.arrival_time, 4)
        vruntime = slice_left = peer = host = None
        standing = policy.standing(sequence)
        if standing is not None:
            vruntime = round(standing.vruntime, 4)
            if standing.slice_left != math.inf:
                slice_left = round(standing.slice_left, 4)
        under_way = running or sequence.num_inflight > 0
        if residency is not None:
            copies = residency.copies(sequence)
            names = [copy.store.name for copy in copies if copy.tokens]
            peer = names.count("peer")
            host = len(names) - peer
            entry.copies = len(copies)
            under_way = under_way or len(names) < len(copies)
        # The first token may be a sibling's; a fork may join the queue later, and again.
        siblings = len(request.samples) > 1 and (entry.ttft is None or sequence.preemptions == 0)
        entry.settled = not (under_way or siblings)
        entry.preemptions = sequence.preemptions
        prompt = sequence.prompt_len
        row = (
            *entry.key, sequence.user,
            "running" if running else _SWAPPED if sequence.swapped else "waiting",
            prompt, len(sequence.tokens) - prompt, sequence.num_computed,
            entry.arrived, entry.ttft, vruntime, slice_left, len(sequence.pages), peer,
            host, sequence.preemptions,
        )
        if row != entry.row:
            self._swapped += (row[_STATE] == _SWAPPED) - (entry.row[_STATE] == _SWAPPED)
            entry.row = self._rows[entry.key] = row

    def _look_at_users(self, policy: Policy) -> None:
        """At all of them: requests that came and went between two looks are charged to theirs, and
        so are copies made ahead of need, which change nothing else of those who wait."""
        for user in [user for user in self._vruntimes if user not in self._users]:
            del self._vruntimes[user]
            self._changed[user] = None
        for user, entries in self._users.items():
            found = (policy.standing(entry.sequence) for entry in entries)
            standing = next(filter(None, found), None)  # a fork has none before it runs
            if standing is not None and self._vruntimes.get(user) != standing.user_vruntime:
                self._vruntimes[user] = standing.user_vruntime
                self._changed[user] = round(standing.user_vruntime, 4)


def inspect(engine: Engine) -> dict[str, Any]:
    """Everything, as a first look finds it.

    Returns:
      "columns": names; "rows": a list a live sample, in order of arrival; "users", "stats", "time":
      as in `Look`.
    """
    look = Inspector().look(engine)
    return {
        "columns": COLUMNS, "rows": list(look.rows.values()), "users": look.users,
        "stats": look.stats, "time": look.time,
    }
