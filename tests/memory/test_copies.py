"""Copies between addresses: exact, whoever makes them, and without the GIL."""

from __future__ import annotations

import ctypes
import threading

import numpy as np
import pytest

from aqua_jax.memory import copies
from aqua_jax.memory.copies import Span
from tests.scale import scaled


def test_gather_and_scatter_agree_with_slices():
    random = np.random.default_rng(1)
    for _ in range(scaled(200)):
        size = int(random.integers(1, 200))
        cuts = sorted(int(x) for x in random.integers(0, size + 1, 2 * int(random.integers(0, 5))))
        memory = random.integers(0, 256, size, np.uint8)
        content = random.integers(0, 256, size, np.uint8)
        pairs = list(zip(cuts[::2], cuts[1::2], strict=True))
        spans = [Span(a, memory.ctypes.data + a, b - a) for a, b in pairs]
        low, high = sorted(int(x) for x in random.integers(0, size + 1, 2))
        window = content[low:high].copy()
        expected = window.copy()
        for a, b in pairs:
            a, b = max(a, low), min(b, high)
            if a < b:
                expected[a - low : b - low] = memory[a:b]
        copies.gather(window.ctypes.data, low, high - low, spans)
        assert (window == expected).all()
        after = memory.copy()
        for a, b in pairs:
            a, b = max(a, low), min(b, high)
            if a < b:
                after[a:b] = content[a:b]
        source = content[low:high].copy()
        copies.scatter(source.ctypes.data, low, high - low, spans)
        assert (memory == after).all()


@pytest.mark.parametrize("native", [True, False])
def test_copies_are_exact_whoever_makes_them(monkeypatch, native, tmp_path):
    copies._stream.cache_clear()
    if not native:
        monkeypatch.setenv("AQUA_LIBRARY_PATH", str(tmp_path))
    random = np.random.default_rng(2)
    memory = random.integers(0, 256, 3 * copies.PIECE, np.uint8)
    for size in (0, 1, copies.STREAM - 1, copies.STREAM, copies.PIECE, 2 * copies.PIECE + 77):
        start, to = int(random.integers(0, 99)), int(random.integers(0, 99))
        target = np.zeros(size + 200, np.uint8)
        copies.copy(target.ctypes.data + to, memory.ctypes.data + start, size)
        assert (target[to : to + size] == memory[start : start + size]).all()
        assert not target[:to].any() and not target[to + size :].any()
    assert (copies._stream() is ctypes.memmove) != native
    copies._stream.cache_clear()


def test_copies_let_other_threads_run():
    """A second Python thread counts on while one copies: the GIL isn't held."""
    size = 32 << 20
    source, target = np.ones(size, np.uint8), np.zeros(size, np.uint8)
    count, stop = [0], threading.Event()

    def counting():
        while not stop.is_set():
            count[0] += 1

    thread = threading.Thread(target=counting)
    thread.start()
    before = count[0]
    for _ in range(3):
        copies.copy(target.ctypes.data, source.ctypes.data, size)
    during = count[0] - before
    stop.set()
    thread.join()
    assert target[0] == target[-1] == 1 and during > 1000
