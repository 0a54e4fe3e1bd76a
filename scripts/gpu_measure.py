"""Rates of the CUDA handlers on the GPU there is, as JSON lines; scripts/gpu_check.py runs it.

    python scripts/gpu_measure.py WHAT     one of: ceilings, moves, peer, decode, prefill

All GB/s are 10^9 bytes a second, medians; what is counted is said with each.
"""

from __future__ import annotations

import json
import mmap
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from gpu_driver import copy_ceilings, median_seconds

from aqua_jax.ops import moves
from aqua_jax.ops.attention import AttentionMetadata, paged_attention
from aqua_jax.ops.device_arena import DeviceArena, link

# An 8B-shaped model's attention.
HEADS, KV_HEADS, DIM, PAGE_TOKENS = 32, 8, 128, 16
PAGE_SIZES = [64 << 10, 256 << 10, 1 << 20, 2 << 20, 4 << 20]
# Bytes of one step's moves in each direction: so many that calling and looking, 0.2 ms or so, is
# little beside 5 ms over PCIe.
DISPATCH = 256 << 20


def wait_for(tickets: np.ndarray, ended: int) -> None:
    """Until so many moves have ended since the process began, these being the last of them; all
    must have succeeded."""
    while moves.finished() < ended:
        time.sleep(10e-6)
    statuses = moves.poll(tickets)[0]
    if (statuses != moves.Status.DONE).any():
        raise RuntimeError(f"moves failed: {statuses}")


def move_rates(where: str, memory: object, nbytes: int) -> list[dict]:
    """Moves of scattered pages between a pool and `memory`.

    `gb_s` and `ms` are from the call until all are done, `copying_gb_s` is over the time in which
    copies were under way. Within a GPU the call takes longer than the copies.
    """
    results = []
    for page in PAGE_SIZES:
        pages, count = nbytes // page, DISPATCH // page
        kv = jax.random.normal(jax.random.key(0), (pages, page // 4), jnp.float32)
        run = jax.jit(moves.enqueue_moves, donate_argnums=0)
        order = np.random.default_rng(0).permutation(pages)
        slots = np.random.default_rng(1).permutation(pages)
        with moves.Segment(memory) as segment, moves.MovePool.of(kv) as pool:

            def once(ways: tuple[str, ...], checksum: bool) -> tuple[float, float]:
                nonlocal kv
                batch = moves.MoveBatch(2 * count, pool)  # noqa: B023
                tickets = []
                if "out" in ways:
                    tickets.append(batch.copy_out(
                        order[:count], segment, slots[:count] * page, checksum=checksum))  # noqa: B023
                if "in" in ways:
                    tickets.append(batch.copy_in(
                        order[count : 2 * count], segment,  # noqa: B023
                        slots[count : 2 * count] * page))  # noqa: B023
                words, head = jax.device_put((batch.moves(), batch.head()))
                jax.block_until_ready((words, head, kv))
                every, ended = np.concatenate(tickets), moves.finished()
                busy, start = moves.counters().busy_ns, time.perf_counter()
                kv = run(kv, words, head)  # noqa: B023
                wait_for(every, ended + len(every))
                seconds = time.perf_counter() - start
                # Each direction's busy time counts: half of it where both run at once.
                return seconds, (moves.counters().busy_ns - busy) / 1e9 / len(ways)

            for ways, checksum in (
                (("out",), False), (("in",), False), (("out", "in"), False), (("out",), True),
            ):
                once(ways, checksum)
                seconds, copying = np.median([once(ways, checksum) for _ in range(9)], axis=0)
                results.append({
                    "where": where, "page_bytes": page, "pages": count * len(ways),
                    "way": "+".join(ways) + (" with checksum" if checksum else ""),
                    "gb_s": count * page * len(ways) / seconds / 1e9,
                    "copying_gb_s": count * page * len(ways) / copying / 1e9,
                    "ms": seconds * 1e3,
                })
        kv.delete()
    return results


def host_and_arena_moves() -> list[dict]:
    """To pinned host memory, and to an arena on the same GPU."""
    nbytes = 512 << 20
    memory = mmap.mmap(-1, nbytes)
    np.frombuffer(memory, np.uint8)[:] = 1
    results = move_rates("host", memory, nbytes)
    with DeviceArena.create(nbytes) as arena:
        results += move_rates("arena on the same GPU", arena.buffer(), nbytes)
    return results


def peer_moves() -> list[dict]:
    """To an arena on the second GPU, through its mapping for the first."""
    nbytes = 512 << 20
    found = link(0, 1)
    results = [{"where": "link 0 -> 1", **vars(found)}]
    if found.reaches:
        with DeviceArena.create(nbytes, device=1) as arena:
            with DeviceArena.map(arena.fd, arena.nbytes, device=0) as mapped:
                results += move_rates("arena on the peer", mapped.buffer(), nbytes)
    return results


def metadata(counts: list[int], length: int) -> AttentionMetadata:
    """Sequences of `length` tokens after a step of `counts`, with pages in random places."""
    seqs, pages = len(counts), -(-length // PAGE_TOKENS)
    starts = np.concatenate([[0], np.cumsum(counts)])
    positions = np.concatenate([np.arange(length - c, length) for c in counts])
    table = np.random.default_rng(0).permutation(seqs * pages).reshape(seqs, pages)
    arrays = (positions, starts, np.full(seqs, length), table, [seqs])
    return AttentionMetadata(*(jnp.array(x, jnp.int32) for x in arrays))


def attention_seconds(counts: list[int], length: int, layers: int) -> float:
    """One layer's attention: a program that goes over all layers of a pool, divided by them."""
    meta, tokens = metadata(counts, length), sum(counts)
    pages = meta.page_table.size
    kv = jnp.zeros((pages, layers, 2, PAGE_TOKENS, KV_HEADS, DIM), jnp.bfloat16)
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (tokens, HEADS, DIM), jnp.bfloat16)
    k, v = (jax.random.normal(x, (tokens, KV_HEADS, DIM), jnp.bfloat16) for x in keys[1:])

    def step(kv: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, meta: AttentionMetadata):
        out = q
        for layer in range(layers):
            # Each layer's queries depend on the last one's result, as in a model.
            kv, out = paged_attention(
                kv, out, k, v, meta, layer=layer, scale=DIM**-0.5, implementation="ffi"
            )
        return kv, out

    run = jax.jit(step, donate_argnums=0)

    def once() -> None:
        nonlocal kv
        kv, out = run(kv, q, k, v, meta)
        jax.block_until_ready((kv, out))

    seconds = median_seconds(once, 9) / layers
    kv.delete()
    return seconds


def read_rate() -> float:
    """GB/s of reading 4 GiB once (a sum), as XLA does it."""
    x = jnp.ones((1 << 30,), jnp.float32)
    total = jax.jit(jnp.sum)
    seconds = median_seconds(lambda: jax.block_until_ready(total(x)), 9)
    nbytes = x.nbytes
    x.delete()
    return nbytes / seconds / 1e9


def decode_rates() -> list[dict]:
    """Decode attention by batch and context: GB/s of keys and values read."""
    read = read_rate()
    results: list[dict] = [{"what": "reading memory (a sum)", "gb_s": read}]
    stats = jax.local_devices()[0].memory_stats() or {}
    room = int((stats.get("bytes_limit", 4 << 30) - stats.get("bytes_in_use", 0)) * 0.7)
    for batch, length in ((1, 2048), (1, 32768), (8, 2048), (64, 2048), (64, 8192), (256, 1024)):
        layer_bytes = batch * length * KV_HEADS * DIM * 2 * 2
        layers = min(32, room // layer_bytes)
        if layers < 2:
            results.append({"batch": batch, "context": length, "not run": "too little memory"})
            continue
        seconds = attention_seconds([1] * batch, length, layers)
        results.append({
            "batch": batch, "context": length, "us": seconds * 1e6, "layers": layers,
            "gb_s": layer_bytes / seconds / 1e9, "of_reading": layer_bytes / seconds / 1e9 / read,
        })
    return results


def prefill_rates() -> list[dict]:
    """Prompt attention against the rate of a large bf16 product."""
    n = 8192
    a, b = (jax.random.normal(jax.random.key(i), (n, n), jnp.bfloat16) for i in range(2))
    product = jax.jit(lambda a, b: a @ b)
    seconds = median_seconds(lambda: jax.block_until_ready(product(a, b)), 9)
    matrix = 2 * n**3 / seconds / 1e12
    results: list[dict] = [{"what": f"bf16 product of {n} x {n}", "tflop_s": matrix}]
    for counts, length in (([2048], 2048), ([512], 8192), ([8192], 8192), ([512] * 8, 512)):
        seconds = attention_seconds(counts, length, 8)
        pairs = sum(c * (length - c) + c * (c + 1) // 2 for c in counts)
        rate = 4 * pairs * HEADS * DIM / seconds / 1e12
        results.append({
            "tokens": counts[0], "sequences": len(counts), "context": length,
            "us": seconds * 1e6, "tflop_s": rate, "of_product": rate / matrix,
        })
    return results


def main() -> None:
    """Runs one measurement and prints its rows."""
    what = sys.argv[1] if len(sys.argv) == 2 else ""
    runs = {
        "ceilings": lambda: [copy_ceilings()], "moves": host_and_arena_moves, "peer": peer_moves,
        "decode": decode_rates, "prefill": prefill_rates,
    }
    if what not in runs:
        raise SystemExit(f"usage: gpu_measure.py {'|'.join(runs)}")
    for row in runs[what]():
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
