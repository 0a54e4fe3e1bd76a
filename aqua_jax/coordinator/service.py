"""What the coordinator does: it drives the ledger, tells clients, keeps time, zeroes memory.

One event loop, no locks. After every change the journals are written, then clients are told: a
grant that anybody knows of stands in a journal.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import secrets
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from aqua_jax.coordinator import messages_pb2 as messages
from aqua_jax.coordinator import translate
from aqua_jax.coordinator.door import Peer
from aqua_jax.coordinator.journal import Journal
from aqua_jax.coordinator.ledger import Ledger
from aqua_jax.coordinator.memories import Memories, Memory, zero
from aqua_jax.coordinator.records import MOST_RANGES, Kill, Lease, Refused, Returned, Revoke
from aqua_jax.coordinator.sockets import has_exited, started
from aqua_jax.errors import AquaError, CoordinatorError, LedgerError

_log = logging.getLogger(__name__)

ZERO_BYTES = 16 << 20  # between two looks at what else is to do
SCRUB_BYTES = 1 << 30  # that a lender of a device's memory is asked to zero at a time
FD_S = 2.0  # for descriptors to come through the door
CLEAN_S = 5.0  # most that a request waits for memory to be zeroed
# Messages to a client that reads nothing; one that reads is told of all its ranges at once.
MOST_UNSENT = 8 * MOST_RANGES
MOST_WAITING = 64  # requests of one client
_LATE_S = 0.2  # a timer as late as this means that we have been stopped


@dataclasses.dataclass
class Counters:
    """What has happened so far."""

    grants: int = 0
    granted_bytes: int = 0
    refused: int = 0
    revokes: int = 0
    returned_bytes: int = 0
    lost: int = 0
    exits: int = 0
    kills: int = 0
    errors: int = 0
    zeroed_bytes: int = 0


class Session:
    """A client's connection, and what is to be said to it."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.key = 0
        self.outbox: asyncio.Queue[messages.ToClient | None] = asyncio.Queue()
        self.waiting: set[asyncio.Task[None]] = set()
        self.lends: set[int] = set()  # arenas that it has spoken of
        self.ended = False

    def say(self, message: messages.ToClient) -> None:
        """Puts a message at the end of what is to be said."""
        if self.ended:
            return
        if self.outbox.qsize() >= MOST_UNSENT:
            self.end()
            return
        self.outbox.put_nowait(message)

    def end(self) -> None:
        """Nothing more is said, and the connection ends."""
        self.ended = True
        self.outbox.put_nowait(None)


class Service:
    """A ledger with clients, memory and processes."""

    def __init__(
        self, *, term_s: float = 10.0, drain_s: float = 10.0, quota: int | None = None,
        quotas: dict[str, int] | None = None, forced: bool = False,
        report: Callable[[str], None] = lambda line: None,
    ) -> None:
        """
        Args:
          term_s: seconds after a client's last word until what it holds is quarantined.
          drain_s: most seconds that a consumer is given when memory is wanted back.
          quota: bytes that a consumer may hold; None: any number.
          quotas: the same for consumers of certain names.
          forced: kill who keeps wanted memory beyond all that.
          report: called with a line of text on changes worth telling.
        """
        limits = {} if quota is None else {"quota": quota}
        self.ledger = Ledger(
            time.monotonic, term_s=term_s, drain_s=drain_s, quotas=quotas, forced=forced,
            # No coordinator since the machine started has counted as far as there were nanoseconds.
            first=time.clock_gettime_ns(time.CLOCK_BOOTTIME), **limits,
        )
        self.counters = Counters()
        self.started = time.monotonic()
        self._report = report
        self._memories = Memories()
        self._sessions: dict[int, Session] = {}
        self._processes: dict[int, int] = {}  # pidfds, by key
        self._timer: asyncio.TimerHandle | None = None
        self._dirty = asyncio.Event()
        self._cleaned = asyncio.Event()
        self._worker = ThreadPoolExecutor(1, "aqua-zero")
        self._zeroing: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    # Life.

    def start(self) -> None:
        """Begins to keep time and to zero memory, on the running loop."""
        self._loop = asyncio.get_running_loop()
        self._zeroing = asyncio.create_task(self._zero_all())
        self._arm()

    async def stop(self) -> None:
        """Ends all sessions. What clients hold they go on holding."""
        if self._timer is not None:
            self._timer.cancel()
        for session in list(self._sessions.values()):
            session.end()
        if self._zeroing is not None:
            self._zeroing.cancel()
            await asyncio.gather(self._zeroing, return_exceptions=True)
        self._worker.shutdown()
        self._memories.keep(set())
        for key in list(self._processes):
            self._unwatch(key)

    def snapshot(self) -> messages.StatusReply:
        """Who lends, who holds; for any thread but the loop's, and waits for the loop.

        Raises:
          TimeoutError: the loop is busy.
        """
        async def look() -> messages.StatusReply:
            return translate.status(self.ledger, self.started)

        assert self._loop is not None
        return asyncio.run_coroutine_threadsafe(look(), self._loop).result(2.0)

    # Clients.

    def hello(self, session: Session, number: int, hello: messages.Hello) -> None:
        """The first message of a session.

        Raises:
          LedgerError: what it says can't be.
        """
        if session.ended:  # gone meanwhile, and with it the descriptor that says who it was
            return
        key = hello.key or secrets.randbits(63) | 1
        claims = translate.claims(hello.claims)
        known = key in self.ledger.clients
        self.ledger.join(
            key, name=hello.name, domain=hello.domain, identity=session.peer.identity
        )
        before = self._sessions.pop(key, None)
        if before is not None:
            before.key = 0  # what it still says counts no more
            before.end()
        try:
            self.ledger.keep_only(key, hello.arenas)
            self.ledger.claim(key, claims)
        except LedgerError:
            if not known:
                self.ledger.remove(key)
            raise
        session.key = key
        self._sessions[key] = session
        self._watch(key, os.dup(session.peer.pidfd))
        session.say(translate.welcome(number, key, self.ledger.term_s))
        self.flush()

    async def handle(self, session: Session, message: messages.FromClient) -> None:
        """Does what a message after the first asks, and answers it."""
        if session.key not in self.ledger.clients or session.ended:
            return
        self.ledger.renew(session.key)
        kind = message.WhichOneof("body")
        try:
            if kind == "borrow":
                if len(session.waiting) >= MOST_WAITING:
                    raise LedgerError("requests", MOST_WAITING + 1, f"{MOST_WAITING} at a time")
                task = asyncio.create_task(self._borrow(session, message.id, message.borrow))
                session.waiting.add(task)
                task.add_done_callback(session.waiting.discard)
                return
            if kind == "register":
                session.say(await self._register(session, message.id, message.register))
            elif kind == "leave":
                self._remove(session.key, "left")
                session.say(translate.done(message.id))
                session.end()
            else:
                session.say(self._simple(session.key, kind, message))
        except AquaError as error:
            self._refuse(session, message.id, error)
        self.flush()

    def _refuse(self, session: Session, number: int, error: AquaError) -> None:
        self.counters.errors += 1
        session.say(translate.error(number, error))

    def _simple(
        self, key: int, kind: str | None, message: messages.FromClient
    ) -> messages.ToClient:
        ledger, left, held = self.ledger, 0, 0
        if kind == "lend":
            span = message.lend.span
            ledger.lend(key, message.lend.arena, span.start, span.end)
        elif kind == "reclaim":
            asked = message.reclaim
            if asked.revoke:
                left = ledger.reclaim(key, asked.arena, asked.limit, asked.deadline_ms / 1000)
            else:
                ledger.resize(key, asked.arena, asked.limit)
            held = ledger.arenas[asked.arena].held
        elif kind == "unregister":
            gone = message.unregister
            ledger.unregister(key, gone.arena, abandon=gone.abandon)
        elif kind == "give_back":
            gone = message.give_back
            ledger.give_back(key, gone.generation, gone.start, gone.end)
        elif kind == "give_up":
            ledger.give_up(key, message.give_up.generation)
        elif kind == "free":
            ledger.free(key, message.free.lease)
        elif kind == "scrubbed":
            self._scrubbed(key, message.scrubbed.arena, message.scrubbed.number)
        elif kind != "renew":
            raise LedgerError("message", kind, "one that clients send, hello only once")
        return translate.done(message.id, left, held)

    def _scrubbed(self, key: int, arena: int, number: int) -> None:
        before = self.ledger.arenas[arena].scrubbing.total if arena in self.ledger.arenas else 0
        self.ledger.scrubbed_by(key, arena, number)
        self.counters.zeroed_bytes += before
        self._cleaned.set()

    async def _borrow(self, session: Session, number: int, asked: messages.Borrow) -> None:
        ledger, end = self.ledger, time.monotonic() + CLEAN_S
        try:
            while True:
                if session.key not in ledger.clients or session.ended:
                    return
                answer = ledger.borrow(session.key, **translate.wishes(asked))
                wait = isinstance(answer, Refused) and answer.cleaning
                if not wait or time.monotonic() >= end:
                    break
                self._cleaned.clear()
                try:
                    async with asyncio.timeout_at(asyncio.get_running_loop().time() + 1.0):
                        await self._cleaned.wait()
                except TimeoutError:
                    pass
            if isinstance(answer, Refused):
                self.counters.refused += 1
                session.say(translate.refused(number, answer))
            else:
                self._grant(session, number, answer)
        except AquaError as error:
            self._refuse(session, number, error)
        self.flush()

    def _grant(self, session: Session, number: int, lease: Lease) -> None:
        """Writes a grant down, hands over what it is in, tells its holder."""
        try:
            for arena in self.ledger.take_changed():
                self._memories.write(arena, self.ledger.entries(arena))
            for arena in dict.fromkeys(found.arena for found in lease.ranges):
                session.peer.give(b"A", arena, self._memories[arena].fd)
        except OSError as error:
            self.ledger.free(session.key, lease.id)
            raise CoordinatorError(f"the memory can't be handed over: {error}") from error
        self.counters.grants += 1
        self.counters.granted_bytes += lease.size
        session.say(translate.granted(number, lease, self.ledger))

    async def _register(
        self, session: Session, number: int, asked: messages.Register
    ) -> messages.ToClient:
        fds = await session.peer.taken(asked.tag, FD_S)
        try:
            terms = translate.terms(asked.terms)
            lent = [(span.start, span.end) for span in asked.lent]
            arena, total = asked.arena, sum(end - start for start, end in lent)
            if arena in self.ledger.arenas:
                self._memories.check(fds, terms, total, returning=True, arena=arena)
                self.ledger.resume(session.key, arena, lent)
                session.lends.add(arena)
                self.ledger.scrub_again(arena)
                return translate.registered(number, arena)
            identity = self._memories.check(fds, terms, total, returning=bool(arena))
            if arena:
                journal, entries = Journal.adopt(fds[1], terms.size)
                self.ledger.restore(session.key, arena, terms, lent, entries)
                fds.pop()
                absent = {entry.owner: entry.identity for entry in entries}
            else:
                arena = self.ledger.register(session.key, terms, lent).id
                journal, absent = self._journal(session, arena, terms.size), {}
            self._memories.add(arena, Memory(fds.pop(0), identity, journal))
            session.lends.add(arena)
            for owner, process in absent.items():
                self._watch_absent(owner, process)
            return translate.registered(number, arena)
        finally:
            for fd in fds:
                os.close(fd)

    def _journal(self, session: Session, arena: int, size: int) -> Journal:
        """A new arena's journal, its producer's as well; without one the arena isn't there.

        It goes out after the ledger has taken the arena in: under the number of an arena that was
        refused its producer would find it first when another gets that number, and bring the
        next coordinator a journal in which nobody has ever written.
        """
        journal = None
        try:
            journal = Journal.create(size)
            session.peer.give(b"J", arena, journal.fd)
            return journal
        except OSError as error:
            if journal is not None:
                journal.close()
            self.ledger.unregister(session.key, arena, abandon=True)
            raise CoordinatorError(f"the journal can't be handed over: {error}") from error

    def ended(self, session: Session) -> None:
        """A session's connection has ended; its process may live."""
        session.ended = True
        for task in list(session.waiting):
            task.cancel()
        key = session.key
        if self._sessions.get(key) is not session:
            return
        del self._sessions[key]
        if key in self.ledger.clients:
            idle = not any(r.owner == key for r in self.ledger.ranges.values())
            if idle and not any(a.producer == key for a in self.ledger.arenas.values()):
                self._remove(key, "hung up")
            else:
                self.ledger.disconnected(key)
        self.flush()

    # Processes.

    def _watch(self, key: int, pidfd: int) -> None:
        self._unwatch(key)
        self._processes[key] = pidfd
        asyncio.get_running_loop().add_reader(pidfd, self._exited, key)

    def _unwatch(self, key: int) -> None:
        pidfd = self._processes.pop(key, None)
        if pidfd is not None:
            asyncio.get_running_loop().remove_reader(pidfd)
            os.close(pidfd)

    def _watch_absent(self, key: int, identity: tuple[int, int]) -> None:
        """Watches a holder that an earlier coordinator knew."""
        if key in self._processes or key not in self.ledger.clients:
            return
        try:
            pidfd = os.pidfd_open(identity[0])
        except (OSError, OverflowError):
            self._remove(key, "exited meanwhile")
            return
        try:
            same = started(identity[0]) == identity[1] and not has_exited(pidfd)
        except OSError:
            same = False
        self._watch(key, pidfd)
        if not same:
            self._remove(key, "exited meanwhile")

    def _exited(self, key: int) -> None:
        self.counters.exits += 1
        session = self._sessions.get(key)
        self._remove(key, "exited")
        if session is not None:
            session.end()
        self.flush()

    def _remove(self, key: int, why: str) -> None:
        client = self.ledger.clients.get(key)
        if client is not None:
            held = sum(r.held.total for r in self.ledger.ranges.values() if r.owner == key)
            lent = sum(a.lent for a in self.ledger.arenas.values() if a.producer == key)
            self.ledger.remove(key)
            self._report(
                f"{client.name or 'client'} (pid {client.identity[0]}) {why}, held "
                f"{held >> 10} KiB, lent {lent >> 10} KiB"
            )
        self._sessions.pop(key, None)
        self._unwatch(key)

    # After every change.

    def flush(self) -> None:
        """Writes down what has changed, then tells whoever it concerns."""
        for arena in self.ledger.take_changed():
            if arena in self._memories:
                try:
                    self._memories.write(arena, self.ledger.entries(arena))
                except OSError as error:  # it says more than is true: that does no harm
                    self._report(f"the journal of arena {arena} can't be written: {error}")
        now = time.monotonic()
        for event in self.ledger.take_events():
            if isinstance(event, Kill):
                self._kill(event.client)
                continue
            if isinstance(event, Revoke):
                self.counters.revokes += bool(event.deadline is not None)
            elif isinstance(event, Returned):
                self.counters.returned_bytes += event.end - event.start
            else:
                self.counters.lost += 1
            session = self._sessions.get(event.client)
            if isinstance(event, Returned) and session and event.arena not in session.lends:
                # It has yet to say what it hasn't got back, and hears of this then. Told twice, it
                # could have lent it again in between, and would use what is lent.
                continue
            if session is not None:
                session.say(translate.event(event, now))
        for scrub in self.ledger.dirty_on_device(SCRUB_BYTES):
            session = self._sessions.get(scrub.client)
            if session is not None:
                session.say(translate.scrub(scrub))
        self._memories.keep(set(self.ledger.arenas))
        if any(arena.dirty.total for arena in self.ledger.arenas.values()):
            self._dirty.set()
        self._arm()

    def _kill(self, key: int) -> None:
        pidfd, pid = self._processes.get(key), self.ledger.clients[key].identity[0]
        if pidfd is None or pid == os.getpid():
            return
        self.counters.kills += 1
        self._report(f"kills pid {pid}, which keeps memory beyond term and drain limit")
        try:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        except OSError as error:
            self._report(f"cannot kill pid {pid}: {error}")

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        at = self.ledger.next_tick()
        loop = asyncio.get_running_loop()
        # asyncio's clock is time.monotonic, too.
        self._timer = None if at is None else loop.call_at(at, self._tick, at)

    def _tick(self, planned: float) -> None:
        late = time.monotonic() - planned
        if late > _LATE_S:
            # We were stopped: clients have spoken, and we haven't heard them yet.
            self.ledger.stalled(late)
        else:
            self.ledger.tick()
        self.flush()

    # Zeroing.

    async def _zero_all(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            taken = self.ledger.next_dirty(ZERO_BYTES)
            if taken is None:
                self._dirty.clear()
                self._cleaned.set()
                await self._dirty.wait()
                continue
            number, start, end = taken
            arena, memory = self.ledger.arenas[number], self._memories[number]
            try:
                await loop.run_in_executor(self._worker, zero, os.dup(memory.fd), start, end)
            except OSError as error:
                # Never free again, so never anybody's: its lender has spoilt it.
                self._report(f"arena {number} can't be zeroed: {error}")
                continue
            if self.ledger.arenas.get(number) is arena:
                self.ledger.scrubbed(number, start, end)
                self.counters.zeroed_bytes += end - start
                self.flush()
            self._cleaned.set()
