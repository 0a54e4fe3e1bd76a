"""The queue of `aqua_jax.ops.moves` in NumPy: the same records, at once and in order. For tests."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from aqua_jax.ops.moves import FLAG_CHECKSUM, FLAG_IN, Status

_PRIME = np.uint64(0x9E3779B97F4A7C15)
_MASK = (1 << 64) - 1


def checksum(runs: list[np.ndarray]) -> int:
    """The checksum of ffi/cpu/moves_copy.h over u8 arrays, one per run."""
    shifts = np.arange(8, dtype=np.uint64) * np.uint64(8)
    lanes = _PRIME << shifts
    lanes[1:] |= _PRIME >> (np.uint64(64) - shifts[1:])
    for run in runs:
        padded = np.zeros(-(-len(run) // 64) * 64, np.uint8)
        padded[: len(run)] = run
        for words in padded.view("<u8").reshape(-1, 8):
            mixed = lanes ^ words
            lanes = ((mixed << np.uint64(27)) | (mixed >> np.uint64(37))) * _PRIME
    h = sum(len(run) for run in runs)
    for lane in lanes.tolist():
        h = ((h ^ lane) * int(_PRIME)) & _MASK
        h ^= h >> 32
    return h


def apply(
    pool: np.ndarray, records: np.ndarray, segments: Mapping[tuple[int, int], np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Carries out records on a pool of bytes.

    Args:
      pool: u8[P, page_bytes], changed in place.
      records: MOVE[n].
      segments: (id, generation) -> u8[bytes] of live segments, changed in place.

    Returns:
      i32[n] statuses and u64[n] checksums, as `poll` has them.
    """
    statuses = np.zeros(len(records), np.int32)
    sums = np.zeros(len(records), np.uint64)
    for i, record in enumerate(records):
        flags, number, first, second = (int(record[x]) for x in ("flags", "page", "begin", "bytes"))
        count, step, offset = (int(record[x]) for x in ("runs", "stride", "offset"))
        step = step if count > 1 else 0
        end = first + (count - 1) * step + second
        if not (0 <= number < len(pool) and first >= 0 and second > 0 and count > 0
                and (count == 1 or step >= second) and end <= pool.shape[1]):
            statuses[i] = Status.OUT_OF_BOUNDS
            continue
        memory = segments.get((int(record["segment"]), int(record["generation"])))
        if memory is None:
            statuses[i] = Status.SEGMENT_STALE
            continue
        if offset + end > len(memory):
            statuses[i] = Status.OUT_OF_BOUNDS
            continue
        page, slot = pool[number], memory[offset:]
        source, target = (slot, page) if flags & FLAG_IN else (page, slot)
        starts = range(first, first + count * step, step) if step else [first]
        runs = [source[at : at + second].copy() for at in starts]
        for at, run in zip(starts, runs, strict=True):
            target[at : at + second] = run
        statuses[i] = Status.DONE
        if flags & FLAG_CHECKSUM:
            sums[i] = checksum(runs)
            if flags & FLAG_IN and sums[i] != record["checksum"]:
                statuses[i] = Status.MISMATCH
    return statuses, sums
