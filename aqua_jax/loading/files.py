"""Reading files that may be broken or hostile: bounded, with typed errors."""

from __future__ import annotations

import json
import os
import stat
from typing import Any

import numpy as np

from aqua_jax.errors import ModelLoadError

JSON_LIMIT = 64 << 20  # bytes of a config or index; the largest index seen (405B) is under 0.2 MB


def open_regular(path: str) -> tuple[int, int]:
    """Opens a regular file for reading; returns (descriptor, size in bytes).

    Opened non-blocking, so that a FIFO under a model file's name is an error instead of a hang.

    Raises:
      ModelLoadError: missing, unreadable or not a regular file.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{path}: cannot be opened: {error}") from error
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        os.close(fd)
        raise ModelLoadError(f"{path}: not a regular file")
    return fd, status.st_size


def read_into(fd: int, path: str, offset: int, out: np.ndarray) -> None:
    """Fills the C-contiguous array `out` with the file's bytes from `offset`.

    Plain reads rather than a mapping: page-cache pages then never count in the resident set, and a
    file truncated while we read is an error instead of SIGBUS.

    Raises:
      ModelLoadError: the file ends early or the device fails.
    """
    view = out.reshape(-1).view(np.uint8).data
    done = 0
    while done < len(view):
        try:
            count = os.preadv(fd, [view[done:]], offset + done)
        except OSError as error:
            raise ModelLoadError(f"{path}: reading at byte {offset + done}: {error}") from error
        if count == 0:
            raise ModelLoadError(
                f"{path}: truncated: {len(view)} bytes expected at {offset}, {done} are there"
            )
        done += count


def read_bytes(path: str, limit: int) -> bytes:
    """Whole content of a regular file of at most `limit` bytes.

    Raises:
      ModelLoadError: missing, not regular, too large or unreadable.
    """
    fd, size = open_regular(path)
    try:
        if size > limit:
            raise ModelLoadError(f"{path}: {size} bytes; such a file has at most {limit}")
        content = np.empty(size, np.uint8)
        read_into(fd, path, 0, content)
    finally:
        os.close(fd)
    return content.tobytes()


def parse_json_object(content: bytes, what: str) -> dict[str, Any]:
    """A JSON object from bytes; `what` names it in errors.

    Raises:
      ModelLoadError: not UTF-8, not JSON, nested too deeply, or not an object.
    """
    try:
        value = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelLoadError(f"{what}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"{what}: a JSON object is expected, got {type(value).__name__}")
    return value


def read_json(path: str, limit: int = JSON_LIMIT) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
      ModelLoadError: the file cannot be read or is not a JSON object.
    """
    return parse_json_object(read_bytes(path, limit), path)


def read_optional_json(path: str, limit: int = JSON_LIMIT) -> dict[str, Any]:
    """As `read_json`, but a missing file is an empty object."""
    return read_json(path, limit) if os.path.lexists(path) else {}
