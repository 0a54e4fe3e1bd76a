"""Host memory that is pinned piece by piece, with the sources of the CUDA handlers on a CPU."""

from __future__ import annotations

import os
import subprocess
import sys

from aqua_jax.ops import pinning
from tests.ops import emulated_cuda

CASES = """
import ctypes, mmap, time
import numpy as np
import pytest, jax, jax.numpy as jnp
from tests.ops import emulated_cuda
emulated_cuda.pytest_configure()
from aqua_jax.errors import ArenaError
from aqua_jax.memory import growing
from aqua_jax.memory.arena import PAGE
from aqua_jax.memory.stores import HostStore
from aqua_jax.ops import moves, pinning

slot, pages = 3 * PAGE, 8
growing.GROWTH = 4 * PAGE
pins = pinning.pins()
store = HostStore(64 * slot, slot, 16, grows=True, pins=pins)
assert pinning.pinned_bytes() == 6 * PAGE, "whole slots and whole pages"
memory = (ctypes.c_uint8 * (store.capacity * slot)).from_address(store.base)
segment = moves.Segment(memory)
assert pinning.pinned_bytes() == 6 * PAGE, "a segment pins nothing that is pinned"
kv = jax.random.normal(jax.random.key(0), (pages, slot // 4), jnp.float32)
before = np.asarray(kv).copy()
run = jax.jit(moves.enqueue_moves, donate_argnums=0)
held, pool = [], moves.MovePool.of(kv)
deadline = time.monotonic() + 60
while len(held) < 20 and time.monotonic() < deadline:
    # What is handed out is pinned already, also while the tier grows.
    assert pinning.pinned_bytes() >= len(held) * slot
    taken = store.allocate(1) if store.free_slots else None
    if taken is None:
        time.sleep(0.001)
        continue
    held += taken
    page = len(held) % pages
    batch = moves.MoveBatch(4, pool)
    tickets = batch.copy_out([page], segment, [store.offset(held[-1])])
    kv = jax.block_until_ready(run(kv, batch.moves(), batch.head()))
    assert moves.drain(60)
    assert (moves.poll(tickets)[0] == moves.Status.DONE).all()
    start = held[-1].id * slot
    assert bytes(memory[start : start + slot]) == before[page].tobytes()
assert len(held) == 20 and pinning.pinned_bytes() >= 20 * slot
pool.close()
segment.retire()
assert pinning.pinned_bytes() >= 20 * slot, "a segment unpins nothing that it hasn't pinned"
store.close()
assert pinning.pinned_bytes() == 0
# Memory that can't be pinned ends the growth, or the start.
class Refusing:
    def __init__(self): self.left, self.out = 2, []
    def pin(self, address, nbytes):
        if self.left == 0: raise ArenaError("no more")
        self.left -= 1; self.out.append((address, nbytes))
    def unpin(self, address, nbytes): self.out.remove((address, nbytes))
refusing = Refusing()
store = HostStore(64 * slot, slot, 16, grows=True, pins=refusing)
while store.capacity == 64 and time.monotonic() < deadline:
    if store.free_slots: store.allocate(1)
    time.sleep(0.001)
assert store.capacity == 4, store.capacity
store.close()
assert refusing.out == []
refusing.left = 0
try:
    HostStore(64 * slot, slot, 16, grows=True, pins=refusing)
except Exception as error:
    assert "no more" in str(error)
else:
    raise AssertionError("a store that can't be pinned")
with pytest.raises(ArenaError, match="can't be unpinned"):
    pins.unpin(store._capacity + PAGE, PAGE)
print("all good")
"""


def test_pieces_are_pinned_before_they_are_used():
    emulated_cuda.build()
    done = subprocess.run(
        [sys.executable, "-c", CASES], cwd=emulated_cuda.ROOT, capture_output=True, text=True,
        timeout=300, env={**os.environ, "PYTHONPATH": str(emulated_cuda.ROOT)},
    )
    assert done.returncode == 0 and "all good" in done.stdout, done.stderr[-3000:]


def test_processors_need_nothing_pinned():
    assert pinning.pins() is None and pinning.pinned_bytes() == 0
