"""Copies between addresses of this process, other Python threads running meanwhile."""

from __future__ import annotations

import ctypes
import functools
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

# One call. ctypes lets go of the GIL for its length; pieces keep a Ctrl-C, and a thread that wants
# to stop, waiting for some milliseconds at most.
PIECE = 8 << 20
# From here on copies go past the caches, which libc's do from 190 MB in one call on a machine with
# a large cache: 12 GB/s there against 7 for all pieces below that.
STREAM = 256 << 10


class Span(NamedTuple):
    """`size` bytes at `address`, which are those from `offset` on of some content."""

    offset: int
    address: int
    size: int


@functools.cache
def _stream() -> Callable[[int, int, int], object]:
    """Our library's copy; libc's without it. (`ops.library` would do, but needs jax.)"""
    folder = os.environ.get("AQUA_LIBRARY_PATH")
    base = pathlib.Path(folder) if folder else pathlib.Path(__file__).parent.parent / "_lib"
    try:
        function = ctypes.CDLL(str(base / "libaqua_cpu.so")).aqua_stream_copy
    except (OSError, AttributeError):
        return ctypes.memmove
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint64]
    function.restype = None
    return function


def copy(destination: int, source: int, size: int) -> None:
    """Copies `size` bytes; the ranges don't overlap, and both stay valid until it returns."""
    function = ctypes.memmove if size < STREAM else _stream()
    for at in range(0, size, PIECE):
        function(destination + at, source + at, min(PIECE, size - at))


def gather(destination: int, offset: int, size: int, spans: Sequence[Span]) -> None:
    """Copies into `destination` what `spans` (sorted, apart) have of [offset, offset + size)."""
    for span, low, high in _within(offset, size, spans):
        copy(destination + low - offset, span.address + low - span.offset, high - low)


def scatter(source: int, offset: int, size: int, spans: Sequence[Span]) -> None:
    """Copies from `source`, [offset, offset + size) of a content, to `spans` (sorted, apart)."""
    for span, low, high in _within(offset, size, spans):
        copy(span.address + low - span.offset, source + low - offset, high - low)


def common(offset: int, size: int, spans: Sequence[Span]) -> int:
    """Bytes that `spans` have of [offset, offset + size)."""
    return sum(high - low for _, low, high in _within(offset, size, spans))


def _within(
    offset: int, size: int, spans: Sequence[Span]
) -> list[tuple[Span, int, int]]:
    """The spans that meet [offset, offset + size), each with the ends of what they share."""
    end = offset + size
    found = []
    low, high = 0, len(spans)
    while low < high:  # the first span that ends after offset
        middle = (low + high) // 2
        if spans[middle].offset + spans[middle].size <= offset:
            low = middle + 1
        else:
            high = middle
    for at in range(low, len(spans)):
        span = spans[at]
        if span.offset >= end:
            break
        if span.size:
            found.append(
                (span, max(offset, span.offset), min(end, span.offset + span.size))
            )
    return found
