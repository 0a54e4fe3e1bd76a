"""Who holds what of an arena, written where the coordinator's death doesn't reach.

A journal is a file without a name (memfd). The coordinator makes one for each arena and gives it to
the arena's producer, which keeps it and hands it to the next coordinator. So it lives as long as
the memory it is about, and nothing of it is left behind.

Two halves are written in turn, each with a number and a checksum: a coordinator killed in the
middle of one leaves the other. Consumers never see a journal.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import struct
import zlib
from collections.abc import Sequence

from aqua_jax.coordinator.records import PAGE, Entry
from aqua_jax.errors import LedgerError

_HEAD = struct.Struct("<8sQQI")  # magic, number, bytes, checksum
_ENTRY = struct.Struct("<QQQqqqqqdHI")
_SPAN = struct.Struct("<qq")
_MAGIC = b"aquajrn1"
_NAME = 256  # bytes of a name that are kept


def room_for(arena_bytes: int) -> int:
    """Bytes of a half that is enough whatever happens to an arena; most are never touched."""
    pages = arena_bytes // PAGE
    return _HEAD.size + pages * (_ENTRY.size + _NAME + _SPAN.size) + PAGE


def _pack(entry: Entry) -> bytes:
    name = entry.owner_name.encode()[:_NAME]
    pid, start = entry.identity
    head = _ENTRY.pack(
        entry.generation, entry.lease, entry.owner, pid, start, entry.offset, entry.size,
        entry.priority, entry.since, len(name), len(entry.held),
    )
    # In one call: a range may be in very many pieces, and everybody waits for this.
    held = list(itertools.chain.from_iterable(entry.held))
    return b"".join([head, name, struct.pack(f"<{len(held)}q", *held)])


def _unpack(body: bytes) -> list[Entry]:
    entries, at = [], 0
    while at < len(body):
        (generation, lease, owner, pid, start, offset, size, priority, since, name, count) = (
            _ENTRY.unpack_from(body, at)
        )
        at += _ENTRY.size
        text = body[at : at + name].decode(errors="ignore")
        at += name
        end = at + count * _SPAN.size
        if end > len(body):
            raise struct.error("cut off")
        held = tuple(_SPAN.iter_unpack(body[at:end]))
        at = end
        entries.append(Entry(
            generation, lease, owner, text if text.isprintable() else "", (pid, start), offset,
            size, held, priority, since,
        ))
    return entries


class Journal:
    """The journal of one arena."""

    def __init__(self, fd: int, arena_bytes: int) -> None:
        """Use `create` or `adopt`; `fd` is owned."""
        self.fd = fd
        self._half = room_for(arena_bytes)
        self._number = 0

    @classmethod
    def create(cls, arena_bytes: int) -> Journal:
        """An empty one for an arena of so many bytes.

        Raises:
          OSError: no memory for it.
        """
        fd = os.memfd_create("aqua-journal", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        journal = cls(fd, arena_bytes)
        try:
            os.ftruncate(fd, 2 * room_for(arena_bytes))
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            journal.write([])
        except OSError:
            journal.close()
            raise
        return journal

    @classmethod
    def adopt(cls, fd: int, arena_bytes: int) -> tuple[Journal, list[Entry]]:
        """A journal that a producer has brought back, and what stands in it.

        Raises:
          LedgerError: it can't be read, or is another arena's. `fd` stays open.
        """
        journal = cls(fd, arena_bytes)
        try:
            halves = [journal._read(index) for index in (0, 1)]
            entries: list[Entry] = []
            journal._number, body = max((half for half in halves if half), key=lambda half: half[0])
            entries = _unpack(body)
        except (OSError, ValueError, struct.error) as error:
            raise LedgerError(
                "journal", str(error), "one that a coordinator has written"
            ) from error
        return journal, entries

    def _read(self, index: int) -> tuple[int, bytes] | None:
        head = os.pread(self.fd, _HEAD.size, index * self._half)
        if len(head) < _HEAD.size:
            return None
        magic, number, length, checksum = _HEAD.unpack(head)
        if magic != _MAGIC or length > self._half - _HEAD.size:
            return None
        body = os.pread(self.fd, length, index * self._half + _HEAD.size)
        if len(body) != length or zlib.crc32(body, number & 0xFFFFFFFF) != checksum:
            return None
        return number, body

    def write(self, entries: Sequence[Entry]) -> None:
        """Replaces what stands in it; a reader finds all of it or what was there before.

        Raises:
          OSError: no memory for it. What was there before still is.
        """
        number = self._number + 1
        body = b"".join(map(_pack, entries))
        checksum = zlib.crc32(body, number & 0xFFFFFFFF)
        head = _HEAD.pack(_MAGIC, number, len(body), checksum)
        if os.pwrite(self.fd, head + body, (number % 2) * self._half) < len(head) + len(body):
            raise OSError(errno.ENOSPC, "no memory for all of the journal")
        self._number = number  # only now: the next try must not be where the last good one is

    def close(self) -> None:
        """Closes this process's descriptor."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
