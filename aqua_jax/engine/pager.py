"""Carries out the page moves of plans: batches for the copy queue, tickets, reports to the planner.

The planner says which tokens of which page go where; `batch` makes of that what the head of the
step's program takes, `poll` asks the copy queue by ticket and reports each move that has ended.
What is one move here is a copy for each device that shares the model (`copies`).
Nothing here waits for a copy, except where nothing else is left to do (`wait`), and where memory is
about to go away (`settle`, `reset`, `close`; each keeps the order that rule 5 of `ops.moves` asks
for: the pool, then segments, then the stores' memory).

Lenders' memory comes and goes at step boundaries, a store for each lease (`borrowing`). A store
whose lender is gone stays mapped until nobody holds a slot of it. From when that is noticed no move
touches it: those on their way fail one by one, and the planner recomputes. What goes from store to
store is copied by a thread (`shifts`), up to a faster tier only while no other move is under way.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, cast

import jax

from aqua_jax.engine.borrowing import Borrowing
from aqua_jax.engine.copies import OwnedStore, PoolCopies, SlotMemory, Tickets
from aqua_jax.engine.shifts import Shifter
from aqua_jax.errors import StaleHandleError
from aqua_jax.memory.lease import Bell
from aqua_jax.memory.stores import HostStore
from aqua_jax.ops import moves as copy_queue
from aqua_jax.ops import pinning
from aqua_jax.ops.moves import Copy, Part, Status
from aqua_jax.ops.spaces import Spaces
from aqua_jax.paging.moves import Move, Shift, Store
from aqua_jax.paging.stored import Tiers

ShiftCopy = Callable[[Shift], None]

# Between two looks at the queue while waiting: a page of 384 KiB takes about 40 us to copy.
_NAP_S = 100e-6
_NANO = 1e-9
_NAMES = {status.value: status.name for status in Status}
_PENDING, _DONE = int(Status.PENDING), Status.DONE.name
# Climbing: bytes on their way at a time, seconds that lenders have wanted nothing before, and
# between two looks when nothing could climb.
_CLIMB_BYTES, _CALM_S, _REST_S = 8 << 20, 1.0, 0.01
# What a lender wants is copied in a moment, and would else be given back a step later; the device
# has a step to run meanwhile.
_RESPOND_S = 0.02


def _slot(move: Move) -> int:
    return move.slot.id


class Planner(Protocol):
    """What the pager needs of the planning side (`paging.residency.Residency`)."""

    @property
    def outstanding(self) -> int:
        """Moves that have not ended, planned or still to be."""

    @property
    def shifting(self) -> int:
        """Copies from store to store that `respond` has yet to end."""

    def finished(self, move: Move, ok: bool, checksum: int | None) -> None:
        """A planned move has ended; `checksum` of what was copied out, if asked for."""

    @property
    def tiers(self) -> Tiers:
        """The stores it plans with; asked for only where lenders' memory comes and goes."""

    def respond(self, copy: ShiftCopy, climb: int = 0) -> None:
        """Gives back what lenders want, pages going from store to store by `copy`; up to `climb`
        pages may be on their way to a faster one."""

    def abandon(self) -> None:
        """The pool's content is lost and no copy is under way: every move has ended."""


@dataclasses.dataclass
class _Tier:
    """A store and its memory as the copy queue knows it."""

    store: OwnedStore
    segment: SlotMemory
    closed: bool = False


class Pager:
    """The engine's side of paging. Belongs to the engine's thread, `stats` excepted.

    Attributes:
      wait_s: seconds in which nothing could run because moves had not ended.
      linger_s: seconds in which the host waited for moves while the device ran.
    """

    def __init__(
        self, planner: Planner, stores: Sequence[OwnedStore], kv: jax.Array | jax.ShapeDtypeStruct,
        *, borrowing: Borrowing | None = None, verify: bool = False,
        observe: Callable[[float, float], None] | None = None,
        ended: Callable[[Move, bool], None] | None = None,
        delayed: Callable[[float], None] | None = None, spaces: Spaces | None = None,
        devices: int = 1,
    ) -> None:
        """
        Args:
          planner: told what has become of each move.
          stores: where pages go, with slots of a page's bytes; owned, closed by `close`.
          borrowing: lenders' memory; its stores are of `stores`, and those to come join them.
            Owned. None: the stores are all there will be.
          kv: the pool, [P, L, 2, page_tokens, K, D], or its shape.
          verify: compute checksums of what is copied out.
          observe: told how many pages, in sum, were copied in how many seconds of the workers.
          ended: told about each move as the planner is, for a timeline.
          delayed: told by how many seconds lenders' caps delay a page now, when that changes.
          spaces: memory of ours that holds pages behind the pool's.
          devices: that share the model, with as many of the pool's heads each.
        """
        self._planner, self._verify, self._borrowing = planner, verify, borrowing
        self._observe, self._ended, self._delayed = observe, ended, delayed
        self._page_delay_s = 0.0
        self._copies = PoolCopies(kv, devices, spaces)
        self._devices = devices
        self._tiers = [_Tier(store, SlotMemory(store, devices)) for store in stores]
        self._by_store = {id(tier.store): tier for tier in self._tiers}
        self._shifter = Shifter(pinning.copier())
        self._climb_at = 0.0  # on time.monotonic(): from then on copies may climb
        self._bell = Bell()  # a lender wants something, is gone, or what it wanted is under way
        self._changed = True  # stores may have to be left
        peers = [store for store in stores if not isinstance(store, HostStore)]
        for store in peers:
            store.ring(self._bell)
        # From where copies climb, if there is anywhere to climb to.
        lowest = stores[-1] if stores else None
        self._lowest = lowest if (peers or borrowing) and isinstance(lowest, HostStore) else None
        self._token_bytes = self._copies.page_bytes // kv.shape[3]  # in all layers
        self._climb = max(1, _CLIMB_BYTES // self._copies.page_bytes)
        self._parts: dict[tuple[int, int], Part] = {}
        # Moves handed to a step, and their tickets in the same order.
        self._tickets = Tickets(devices)
        self._under_way: list[Move] = []
        self._refused: list[tuple[Move, str]] = []  # never handed over; reported by `poll`
        self._before = self._last = copy_queue.counters()
        self._finished = -1  # `copy_queue.finished` at the last look at tickets
        self._failed: collections.Counter[str] = collections.Counter()
        self._bytes_out = self._bytes_in = 0
        self.wait_s = self.linger_s = 0.0

    @property
    def outstanding(self) -> int:
        """Moves taken by `batch` whose end has not been reported."""
        return len(self._under_way) + len(self._refused)

    @property
    def unfinished(self) -> bool:
        """Whether moves are to be seen through, be it in steps to come, or shifts."""
        return self._planner.outstanding > 0 or self._planner.shifting > 0

    # A step's moves.

    def batch(self, planned: Sequence[Move]) -> list[bytes]:
        """The moves of one step, for its vector; the step must be dispatched with them.

        Moves whose store has gone since they were planned are left out and reported as failed.

        Returns:
          As `copies.Batch.packed`, with at most those planned.
        """
        # Each direction of a store apart, those into the pool first, as they are planned.
        groups: dict[tuple[int, bool], list[Move]] = {}
        for move in planned:
            groups.setdefault((id(move.store), move.inward), []).append(move)
        batch = self._copies.batch(len(planned))
        for (store, inward), group in groups.items():
            # Neighbours at both ends are copied as one: slots are handed out in order.
            group.sort(key=_slot)
            good, copies = self._good(self._by_store.get(store), group, inward)
            if good:
                memory = self._by_store[store].segment
                self._tickets.add(batch.add(copies, memory, inward=inward))
                self._under_way += good
        return batch.packed()

    def _part(self, start: int, count: int) -> Part:
        part = self._parts[start, count] = Part.of_tokens(self._copies.kv, start, count)
        return part

    def _good(
        self, tier: _Tier | None, group: list[Move], inward: bool
    ) -> tuple[list[Move], list[Copy]]:
        """The moves of a group that can be made, and what the copy queue needs to know of them."""
        good: list[Move] = []
        copies: list[Copy] = []
        if tier is None or not tier.segment.live:  # let go, or about to be
            self._refused += [(move, Status.SEGMENT_STALE.name) for move in group]
            return good, copies
        offset, parts = tier.store.offset, self._parts
        summed = 0 if self._verify else None
        for move in group:
            try:
                at = offset(move.slot)  # type: ignore[arg-type]
            except StaleHandleError:
                self._refused.append((move, Status.SEGMENT_STALE.name))
                continue
            span = move.start, move.count
            part = parts.get(span) or self._part(*span)
            good.append(move)
            copies.append(Copy(move.page.id, at, part, move.checksum if inward else summed))
        return good, copies

    # Between steps.

    def poll(self) -> int:
        """Reports the moves that have ended since the last call; how many. Never waits for a copy.

        Only when a lender has just been found dead it waits for the one that has begun.
        """
        self._tend_stores()
        ended = len(self._refused)
        if ended:
            refused, self._refused = self._refused, []
            for move, why in refused:
                self._report(move, why, None)
        if not self._under_way:
            return ended
        finished = copy_queue.finished()
        if finished == self._finished:
            return ended
        self._finished = finished
        checksums: Iterable[int | None] = itertools.repeat(None)
        if self._verify:
            statuses, checksums = self._tickets.poll_sums()
        else:
            statuses = self._tickets.poll()
        moves, self._under_way = self._under_way, []
        left: list[int] = []
        ends = zip(moves, statuses, checksums, strict=False)
        for index, (move, status, checksum) in enumerate(ends):
            if status == _PENDING:
                left.append(index)
                self._under_way.append(move)
            else:
                self._report(move, _NAMES[status], checksum)
        if len(left) < len(moves):
            self._tickets.keep(left)
            self._observe_copies()
            self._tell_delay()
        return ended + len(moves) - len(left)

    def _observe_copies(self) -> None:
        if self._observe is None:
            return
        now, last = copy_queue.counters(), self._last
        copied = now.bytes_out + now.bytes_in - last.bytes_out - last.bytes_in
        self._observe(copied / self._copies.page_bytes, (now.busy_ns - last.busy_ns) * _NANO)
        self._last = now

    def _report(self, move: Move, status: str, checksum: int | None) -> None:
        store = move.store
        ok = status == _DONE
        if ok and not (store.holds(move.slot) if move.inward else not store.lost):
            # What was copied may not be what the slot held: its owner had it back meanwhile.
            ok, status = False, "STORE_LOST" if store.lost else "SLOT_STALE"
        if ok:
            size = move.count * self._token_bytes
            if self._borrowing is not None:
                self._borrowing.count(store, size, move.inward)
            if move.inward:
                self._bytes_in += size
            else:
                self._bytes_out += size
        else:
            self._failed[status] += 1
        wanted = ok and self._verify and not move.inward
        self._planner.finished(move, ok, checksum if wanted else None)
        if self._ended is not None:
            self._ended(move, ok)

    def _tend_stores(self) -> None:
        """Leaves stores that are lost or given back; takes in those that have come."""
        borrowing = self._borrowing
        come = borrowing is not None and borrowing.arrived
        if not (self._changed or self._bell.rung or come):
            return
        self._changed = False
        for tier in list(self._tiers):
            store = tier.store
            if tier.closed or not (store.lost or store.capacity == 0):
                continue
            if tier.segment.live:
                tier.segment.retire(abandon=True)
            if store.in_use == 0:
                self._leave(tier)
            self._changed |= not tier.closed
        if borrowing is None:
            return
        for store in borrowing.take():
            store.ring(self._bell)
            tier = _Tier(store, SlotMemory(store, self._devices))
            self._tiers.append(tier)
            self._by_store[id(store)] = tier
            self._planner.tiers.add(cast(Store, store))

    def _leave(self, tier: _Tier) -> None:
        tier.closed = True
        store = tier.store
        if self._borrowing is None or isinstance(store, HostStore):
            store.close()
        elif self._planner.tiers.remove(cast(Store, store)):
            self._tiers.remove(tier)
            del self._by_store[id(store)]
            self._borrowing.drop(store)

    def linger(self, limit_s: float) -> None:
        """Gives moves into the pool a moment more, so that what they bring joins the next step;
        `poll` then says which.

        They began with the step that runs now, so a plan made at once would miss them by a
        millisecond, and a sequence would sit out a whole step. `limit_s` must be well below what is
        left of that step: the device never waits for this. The time counts as `linger_s`.
        """
        arriving = [index for index, move in enumerate(self._under_way) if move.inward]
        if arriving and limit_s > 0.0:
            started = time.perf_counter()
            self._tickets.wait(arriving, limit_s)
            self.linger_s += time.perf_counter() - started

    def wait(self, timeout_s: float) -> int:
        """Waits until some move has ended, at most `timeout_s`; reports and counts as `poll`.

        For when nothing can run before that; the time counts as `wait_s`. Moves of a step that has
        not run its head can't end: wait for the step first.
        """
        started = time.perf_counter()
        ended = self.poll()
        while not ended and self.outstanding and time.perf_counter() - started < timeout_s:
            time.sleep(_NAP_S)
            ended = self.poll()
        if not ended and not self.outstanding and self._shifter.under_way:
            self._shifter.linger(timeout_s)
        elif not ended and not self.outstanding and self._borrowing is not None:
            # Moves are planned, and their lenders let none of them be made yet.
            pauses = filter(None, (pace.ready_in() for pace in self._borrowing.paces.values()))
            time.sleep(min(timeout_s, min(pauses, default=_NAP_S)))
        self.wait_s += time.perf_counter() - started
        return ended

    def respond(self) -> None:
        """Gives back what lenders want; a look at one flag, however many leases there are, when
        they want nothing. Copies climb when no move is under way."""
        if self._bell.rung:
            self._answer()
        elif self._lowest is not None and self._lowest.in_use and not self._planner.outstanding:
            self._climb_some()
        if self._page_delay_s:
            self._tell_delay()

    def _answer(self) -> None:
        self._bell.rung = False  # before looking: what comes in between is seen next time
        self._changed = True
        now, tiers = time.monotonic(), self._tiers
        wanted = any(tier.store.wanted_slots for tier in tiers)
        if wanted:
            self._climb_at = now + _CALM_S
        idle = now >= self._climb_at and not self._planner.outstanding
        self._planner.respond(self._shifter.begin, self._climb if idle else 0)
        if wanted and self._shifter.under_way:
            self._shifter.linger(_RESPOND_S)
            self._planner.respond(self._shifter.begin, 0)
        if self._planner.shifting or (wanted and any(tier.store.wanted_slots for tier in tiers)):
            self._bell.rung = True  # and again at the next boundary
        self._tell_delay()

    def _climb_some(self) -> None:
        now = time.monotonic()
        if now >= self._climb_at:
            self._planner.respond(self._shifter.begin, self._climb)
            if self._planner.shifting:
                self._bell.rung = True
            else:
                self._climb_at = now + _REST_S

    def _tell_delay(self) -> None:
        if self._delayed is not None and self._borrowing is not None and self._borrowing.paces:
            delay = self._planner.tiers.paced_page_s
            if delay != self._page_delay_s:
                self._page_delay_s = delay
                self._delayed(delay)

    # Ends. Every dispatched step has run, or failed, before these.

    def settle(self) -> None:
        """The pool's end: waits for copies, ends every move for the planner. `close` follows."""
        self._drop_moves()
        self._planner.abandon()

    def reset(self) -> None:
        """A failed step took the pool: waits for copies and is ready for a new one.

        Nothing is reported: the planner is told what a failed step means (`Scheduler.reset`).
        """
        self._drop_moves()
        self._copies.open()

    def close(self) -> None:
        """Waits for copies, lets go of all memory and gives back what was borrowed. Repeatable."""
        self._drop_moves()
        self._shifter.close()
        for tier in self._tiers:
            if tier.segment.live:
                tier.segment.retire()
            if not tier.closed:
                tier.closed = True
                tier.store.close()
        if self._borrowing is not None:
            self._borrowing.close()

    def _drop_moves(self) -> None:
        self._copies.close()
        self._tickets.keep(())
        self._under_way, self._refused = [], []

    # Figures.

    def stats(self) -> dict[str, Any]:
        """Stores, bytes moved, failures by status, seconds waited and copied.

        `copy_busy_s` and `copy_cpu_s` are the process's: engines share the queue.
        """
        now, before = copy_queue.counters(), self._before
        return {
            "stores": self._store_stats(),
            "bytes_out": self._bytes_out,
            "bytes_in": self._bytes_in,
            "bytes_shifted": self._shifter.bytes,
            "shift_s": self._shifter.busy_s,
            "moves_failed": dict(self._failed),
            "outstanding": self.outstanding,
            "wait_s": self.wait_s,
            "linger_s": self.linger_s,
            **self._pace_stats(),
            "copy_busy_s": (now.busy_ns - before.busy_ns) * _NANO,
            "copy_cpu_s": (now.cpu_ns - before.cpu_ns) * _NANO,
        }

    def _pace_stats(self) -> dict[str, Any]:
        """What lenders' bandwidth caps have delayed."""
        paces = [] if self._borrowing is None else list(self._borrowing.paces.values())
        return {
            "capped_copies": sum(pace.delayed for pace in paces),
            "capped_s": sum(pace.delay_s for pace in paces),
        }

    def _store_stats(self) -> list[dict[str, Any]]:
        """By name; under "lenders" what is lent by whom."""
        found: dict[str, dict[str, Any]] = {}
        borrowing = self._borrowing
        if borrowing is not None:
            # Lost: there was memory, its lender went, and nobody lends now.
            found["peer"] = {
                "name": "peer", "slot_bytes": self._copies.page_bytes, "capacity": 0, "in_use": 0,
                "free": 0, "lost": bool(borrowing.lost or borrowing.stores),
                "lenders": borrowing.lenders(), "leases": borrowing.leases,
                "leases_lost": borrowing.lost,
            }
        for store in [tier.store for tier in self._tiers]:
            shown = found.setdefault(store.name, {
                "name": store.name, "slot_bytes": store.slot_bytes, "capacity": 0, "in_use": 0,
                "free": 0, "lost": True,
            })
            shown["capacity"] += store.capacity
            shown["in_use"] += store.in_use
            shown["free"] += store.free_slots
            shown["lost"] = store.lost and shown["lost"]
        return list(found.values())
