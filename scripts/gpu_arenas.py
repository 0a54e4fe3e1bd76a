"""Memory lent between two processes on one GPU: exact there and back, and past the lender's death.

    python scripts/gpu_arenas.py         prints one JSON line; exits with 1 if a byte is wrong

The lender allocates an arena and sends its descriptor; the borrower moves pages of a pool there
with checksums, the lender compares them with what it sees, pages come back to other places; then
the lender is killed with moves under way, and everything must still come back as it was. With
AQUA_LEGACY_IPC=1 the memory is shared by CUDA's older IPC, and nobody is killed: such memory ends
with its lender.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys

import numpy as np

from aqua_jax.ops.device_arena import DeviceArena

PAGE, PAGES = 1 << 20, 128


def lend(connection: socket.socket) -> None:
    """The lender: an arena, then checksums of whatever pages it is asked for, until killed."""
    arena = DeviceArena.create(PAGE * PAGES)
    socket.send_fds(connection, [str(arena.nbytes).encode()], [arena.fd])
    while True:
        asked = connection.recv(64)
        if not asked:
            return
        connection.sendall(str(arena.checksum(int(asked) * PAGE, PAGE)).encode())


def borrow() -> dict:
    """The borrower, which starts the lender."""
    import jax
    import jax.numpy as jnp

    from aqua_jax.ops import moves

    ours, theirs = socket.socketpair()
    lender = subprocess.Popen(
        [sys.executable, __file__, "lend", str(theirs.fileno())], pass_fds=[theirs.fileno()]
    )
    theirs.close()
    try:
        size, descriptors, _, _ = socket.recv_fds(ours, 64, 1)
        if not descriptors:
            raise RuntimeError("the lender sent no descriptor")
        arena = DeviceArena.map(descriptors[0], int(size))
        os.close(descriptors[0])
        kv = jax.random.normal(jax.random.key(0), (PAGES, PAGE // 4), jnp.float32)
        before = np.asarray(kv).copy()
        run = jax.jit(moves.enqueue_moves, donate_argnums=0)
        rng = np.random.default_rng(0)
        wrong = {"checksums": 0, "pages": 0, "statuses": 0}
        with moves.Segment(arena.buffer()) as segment, moves.MovePool.of(kv) as pool:
            def move(batch: moves.MoveBatch, tickets: np.ndarray) -> np.ndarray:
                nonlocal kv
                kv = jax.block_until_ready(run(kv, batch.moves(), batch.head()))
                moves.drain(60)
                statuses, sums = moves.poll(tickets)
                wrong["statuses"] += int((statuses != moves.Status.DONE).sum())
                return sums

            slots = rng.permutation(PAGES)[:64]
            batch = moves.MoveBatch(PAGES, pool)
            sums = move(
                batch, batch.copy_out(np.arange(64), segment, slots * PAGE, checksum=True)
            )
            for slot, expected in zip(slots[:16], sums, strict=False):
                ours.sendall(str(slot).encode())
                wrong["checksums"] += int(ours.recv(64)) != int(expected)
            back = moves.MoveBatch(PAGES, pool)
            move(back, back.copy_in(np.arange(64, 128), segment, slots * PAGE, checksums=sums))
            wrong["pages"] += int((np.asarray(kv)[64:] != before[:64]).any(axis=1).sum())
            # A burst, in the middle of which the lender dies.
            survives = arena.way == "descriptors"
            moves.set_delay(1, 2000)
            burst, tickets = [], []
            for i in range(8):
                batch = moves.MoveBatch(16, pool)
                pages = np.arange(8 * i, 8 * i + 8)
                tickets.append(batch.copy_out(pages, segment, pages * PAGE, checksum=True))
                burst.append(batch)
            for i, batch in enumerate(burst):
                kv = run(kv, batch.moves(), batch.head())
                if i == 3 and survives:
                    lender.send_signal(signal.SIGKILL)
                    lender.wait(30)
            jax.block_until_ready(kv)
            drained = moves.drain(60)
            moves.set_delay(0, 0)
            statuses, sums = moves.poll(np.concatenate(tickets))
            wrong["statuses"] += int((statuses != moves.Status.DONE).sum()) + int(not drained)
            after = moves.MoveBatch(PAGES, pool)
            move(after, after.copy_in(
                np.arange(64, 128), segment, np.arange(64) * PAGE, checksums=sums
            ))
            wrong["pages"] += int((np.asarray(kv)[64:] != before[:64]).any(axis=1).sum())
        arena.close()
        return {"pages": 64 * 4, "page_bytes": PAGE, "wrong": wrong, "shared_by": arena.way,
                "lender": "killed with moves under way" if survives else "alive"}
    finally:
        lender.kill()
        lender.wait(30)


def main() -> None:
    """As lender if told so, else as borrower."""
    if sys.argv[1:2] == ["lend"]:
        lend(socket.socket(fileno=int(sys.argv[2])))
        return
    result = borrow()
    print(json.dumps(result))
    if any(result["wrong"].values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
