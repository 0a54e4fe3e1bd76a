"""The output file of a job: locked, append-only, synced, and readable after any interruption.

Results are written as they come (so that a killed process loses none of them) and synced to the
disk in groups, at most `SYNC_EVERY_S` apart, by a thread: the step loop never waits for the disk.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import queue
import re
import stat
import threading
import time
from pathlib import Path
from typing import Any

from aqua_jax.batch.lines import json_line
from aqua_jax.batch.requests import RequestId
from aqua_jax.errors import AquaError

SYNC_EVERY_S = 0.1
_QUEUE_LENGTH = 4096  # results waiting for the disk before the job waits too

_log = logging.getLogger(__name__)

# How a success starts, in both dialects: enough to know whose it is. Parsing whole records would
# read an output at 35 MB/s, this reads it at 300.
_SUCCESS = re.compile(
    rb'\{"id": (?:("(?:[^"\\]|\\.)*"|-?\d+), "token_ids": '
    rb'|"\w*", "custom_id": ("(?:[^"\\]|\\.)*"), "response": \{"status_code": 200,)'
)


class JournalError(AquaError):
    """The output file can't be used or written; says which file and why."""


def id_digest(key: RequestId) -> bytes:
    """16 bytes that stand for an id: ten million of them take 1 GB, whole ids might not fit."""
    return hashlib.blake2b(json.dumps(key).encode(), digest_size=16).digest()


@dataclasses.dataclass
class Answered:
    """What an output file already holds.

    Attributes:
      ids: digests of ids with a record.
      lines: input lines with a record but no id of their own.
      records: number of records.
      errors: how many of them are error records.
    """

    ids: set[bytes] = dataclasses.field(default_factory=set)
    lines: set[int] = dataclasses.field(default_factory=set)
    records: int = 0
    errors: int = 0


def _scan(path: Path, file: Any) -> tuple[Answered, int]:
    """Reads all complete records; returns them and the offset behind the last one.

    Raises:
      JournalError: the file holds something else, so that appending would spoil it.
    """
    answered = Answered()
    end = 0
    for number, data in enumerate(file, start=1):
        if not data.endswith(b"\n"):
            # Cut in the middle of a write, or no output of ours at all: look before cutting.
            if data[:5] != b'{"id"'[: len(data)]:
                raise _foreign(path, number)
            break
        try:
            success = _SUCCESS.match(data)
            if success and data.endswith(b"}\n"):
                answered.ids.add(id_digest(json.loads(success[1] or success[2])))
                answered.records += 1
            else:
                _note(json.loads(data), answered)
        except (ValueError, KeyError, TypeError, RecursionError):
            raise _foreign(path, number) from None
        end += len(data)
    return answered, end


def _note(record: dict[str, Any], answered: Answered) -> None:
    key = record["custom_id"] if "custom_id" in record else record["id"]
    error = record.get("error")
    if key is None:
        answered.lines.add(int(error["line"]))  # type: ignore[index]
    elif isinstance(key, (str, int)):
        answered.ids.add(id_digest(key))
    else:
        raise TypeError(key)
    answered.records += 1
    answered.errors += error is not None


def _foreign(path: Path, number: int) -> JournalError:
    return JournalError(
        f"{path}: line {number} is no result of a batch job; "
        "choose another --output, or move this file away"
    )


class Journal:
    """Appends records to an output file that nobody else may write meanwhile.

    Attributes:
      answered: what the file held when it was opened.
    """

    def __init__(self, path: str | os.PathLike[str]):
        """Opens or creates, locks, reads what is there, and cuts off a torn last line.

        Raises:
          JournalError: locked by another job, not writable, or not an output of a job.
        """
        self.path = Path(path)
        try:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise JournalError(f"{self.path}: cannot be written: {error.strerror}") from error
        try:
            if not stat.S_ISREG(os.fstat(self._fd).st_mode):
                raise JournalError(f"{self.path}: not a regular file, so a job can't be resumed")
            self._lock()
            self.answered = self._recover()
        except BaseException:
            os.close(self._fd)
            raise
        self._queue: queue.Queue[bytes | threading.Event | None] = queue.Queue(_QUEUE_LENGTH)
        self._failure: OSError | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="batch-journal", daemon=True)
        self._thread.start()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise JournalError(
                f"{self.path}: another job is writing this file; wait for it to end, "
                "or choose another --output"
            ) from None
        except OSError as error:
            raise JournalError(f"{self.path}: cannot be locked: {error.strerror}") from error

    def _recover(self) -> Answered:
        try:
            with open(self._fd, "rb", closefd=False) as file:
                answered, end = _scan(self.path, file)
            size = os.fstat(self._fd).st_size
            if end < size:
                _log.info("%s: cut off %d bytes of a torn last line", self.path, size - end)
                os.ftruncate(self._fd, end)
            os.fsync(self._fd)
            _sync_directory(self.path.absolute().parent)
        except OSError as error:
            raise JournalError(f"{self.path}: {error.strerror}") from error
        return answered

    def append(self, record: dict[str, Any]) -> None:
        """Adds a record; it is in the file in a moment and on the disk within `SYNC_EVERY_S`.

        Raises:
          JournalError: an earlier write failed.
        """
        self._check()
        self._queue.put(json_line(record).encode())

    def flush(self) -> None:
        """Waits until everything appended is on the disk.

        Raises:
          JournalError: a write failed.
        """
        done = threading.Event()
        self._queue.put(done)
        done.wait()
        self._check()

    def close(self) -> None:
        """Writes and syncs what is left, and lets go of the lock.

        Raises:
          JournalError: a write failed.
        """
        if self._closed:
            return
        self._closed = True
        self._queue.put(None)
        self._thread.join()
        os.close(self._fd)
        self._check()

    def _check(self) -> None:
        if self._failure is not None:
            raise JournalError(
                f"{self.path}: writing failed: {self._failure.strerror}; once there is room, "
                "the same command goes on from here"
            ) from self._failure

    def _work(self) -> None:
        dirty_since: float | None = None
        while True:
            item: bytes | threading.Event | None
            try:
                wait = None
                if dirty_since is not None:
                    wait = max(dirty_since + SYNC_EVERY_S - time.monotonic(), 0.0)
                item = self._queue.get(timeout=wait)
            except queue.Empty:
                self._sync()
                dirty_since = None
                continue
            if isinstance(item, bytes):
                self._write(item)
                dirty_since = time.monotonic() if dirty_since is None else dirty_since
                if time.monotonic() < dirty_since + SYNC_EVERY_S:
                    continue
            self._sync()
            dirty_since = None
            if isinstance(item, threading.Event):
                item.set()
            elif item is None:
                return

    def _write(self, data: bytes) -> None:
        """Writes all of `data`; after a failure nothing more, so that only the end is torn."""
        view = memoryview(data)
        while view and self._failure is None:
            try:
                view = view[os.write(self._fd, view) :]
            except OSError as error:
                self._failure = error

    def _sync(self) -> None:
        if self._failure is None:
            try:
                os.fsync(self._fd)
            except OSError as error:
                self._failure = error


def _sync_directory(path: Path) -> None:
    """Makes a newly created file's name durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
