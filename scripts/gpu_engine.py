"""The engine against what the device can do, as JSON lines; scripts/gpu_check.py runs it.

    python scripts/gpu_engine.py WHAT [--platform=cuda|cpu] [--limit_s=120]

WHAT is one of
    steps     decode steps and a prompt of an 8B-shaped model against the roofline, and what paging
              at full rate beside them costs
    decode    of these the decode steps alone
    startup   a 1B-shaped engine made twice, with an empty and a full cache of programs; on a GPU
              with a pool that gets all that is free, which is then used

On a CPU everything runs at tiny sizes: a test of this script, not a measurement. Weights are
random. All GB/s are 10^9 bytes a second. A part that fails says so in a row of its own, and the
exit status is 1.
"""

from __future__ import annotations

import argparse
import atexit
import dataclasses
import functools
import gc
import json
import mmap
import pathlib
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aqua_jax import Engine, EngineConfig, SamplingParams
from aqua_jax.ops import moves
from aqua_jax.ops.device_arena import DeviceArena

MODELS = pathlib.Path(__file__).resolve().parent / "models"


@dataclasses.dataclass(frozen=True)
class Size:
    """How large everything is. `large`: the 8B-shaped model; `small`: the 1B-shaped one."""

    large: str
    small: str
    batches: tuple[int, ...]
    context: int  # tokens of each sequence when steps are timed
    prompt: int  # tokens of the prompt that is timed
    steps: int  # timed
    paged: int  # bytes of one hand-over in each direction
    read: int  # bytes to read for the device's rate
    matrix: int  # of the product that says the matrix rate
    dtype: str


SIZES = {
    "cuda": Size("llama-8b", "llama-1b", (1, 64), 2048, 2048, 48, 256 << 20, 4 << 30, 8192,
                 "bfloat16"),
    "cpu": Size("tiny", "tiny", (1, 4), 48, 64, 6, 64 << 10, 16 << 20, 256, "float32"),
}
TINY = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 512,
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False, "eos_token_id": 2,
}


class Out:
    """Prints rows, and remembers whether a part failed."""

    def __init__(self, limit_s: float) -> None:
        self._end = time.monotonic() + limit_s
        self.failed = False

    @property
    def left_s(self) -> float:
        """Seconds until no part begins any more."""
        return self._end - time.monotonic()

    def row(self, **values: Any) -> None:
        """One JSON line."""
        print(json.dumps(values), flush=True)

    def part(self, name: str, run: Callable[[], None]) -> None:
        """Runs a part if there is time; its failure is a row, and others go on."""
        if self.left_s < 0:
            self.row(part=name, not_run="out of time")
            return
        try:
            run()
        except Exception as error:
            self.failed = True
            traceback.print_exc()
            self.row(part=name, failed=f"{type(error).__name__}: {error}"[:300])


@functools.cache
def tiny_directory() -> str:
    """A directory with the configuration `TINY`, for as long as the process lives."""
    folder = tempfile.TemporaryDirectory(prefix="aqua-tiny-")
    atexit.register(folder.cleanup)
    pathlib.Path(folder.name, "config.json").write_text(json.dumps(TINY))
    return folder.name


def model_directory(name: str) -> str:
    """The directory of a configuration."""
    return tiny_directory() if name == "tiny" else str(MODELS / name)


def config(platform: str, model: str, **fields: Any) -> EngineConfig:
    """An engine's configuration with random weights; on a CPU with few programs to compile."""
    few = {"max_step_tokens": 64, "max_num_seqs": 8} if platform == "cpu" else {}
    return EngineConfig(**{
        "model": model_directory(model), "load_format": "dummy", "platform": platform,
        "dtype": SIZES[platform].dtype, "prefix_caching": False, **few, **fields,
    })


def prompt(seed: int, tokens: int, vocab: int) -> list[int]:
    """Random ids."""
    return np.random.default_rng(seed).integers(3, vocab, tokens).tolist()


def until_decoding(engine: Engine, names: list[str]) -> None:
    """Steps until each of these requests has a token."""
    waiting = set(names)
    while waiting:
        waiting -= {one.request_id for one in engine.step() if one.outputs[0].token_ids}


def abort(engine: Engine, names: list[str]) -> None:
    """Ends requests and what is under way."""
    for name in names:
        engine.abort(name)
    while engine.has_unfinished():
        engine.step()


def median_s(run: Callable[[], Any], repeat: int = 7) -> float:
    """Seconds of a run, the median after one that doesn't count."""
    run()
    times = []
    for _ in range(repeat):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def read_rate(nbytes: int) -> float:
    """Bytes a second of a sum over so many bytes, as XLA does it."""
    array = jnp.ones((nbytes // 4,), jnp.float32)
    total = jax.jit(jnp.sum)
    seconds = median_s(lambda: jax.block_until_ready(total(array)))
    array.delete()
    return nbytes / seconds


def matrix_rate(n: int, dtype: str) -> float:
    """Floating-point operations a second of an n x n product."""
    a, b = (jax.random.normal(jax.random.key(i), (n, n), jnp.dtype(dtype)) for i in range(2))
    product = jax.jit(lambda a, b: a @ b)
    return 2 * n**3 / median_s(lambda: jax.block_until_ready(product(a, b)))


class Steps:
    """Timed steps of one engine."""

    def __init__(self, platform: str, out: Out) -> None:
        self._out, self._size, self._platform = out, SIZES[platform], platform
        size = self._size
        # Six times the timed steps and their warm-up; the first of a batch begins long before
        # the last, as many steps as there are prompts.
        self._answer = 6 * (size.steps + 4) + 3 * size.batches[-1] + 16
        # Before the weights take their place.
        self._read = read_rate(size.read)
        self._matrix = matrix_rate(size.matrix, size.dtype)
        out.row(what="read rate (a sum)", gb_s=self._read / 1e9)
        out.row(what=f"product of {size.matrix} x {size.matrix}, {size.dtype}",
                tflop_s=self._matrix / 1e12)
        most, room = size.batches[-1], self._answer
        started = time.perf_counter()
        self._engine = Engine(config(
            platform, size.large, max_num_seqs=most, max_step_tokens=max(size.prompt, most),
            max_model_len=size.context + room + 64, policy="fair", slice_steps=100_000,
            kv_cache_tokens=most * (size.context + room + 64) + 4 * self._paged_tokens(),
            # Only what is used is compiled, when it is first used; `startup` times the rest.
            host_kv_memory=64 << 20, warmup="none",
        ))
        stats = self._engine.stats()
        out.row(what="engine ready", seconds=time.perf_counter() - started, **stats["startup"],
                memory_mib={
                    name: round(n / 2**20) for name, n in stats["memory"].items()
                    if isinstance(n, int)
                },
                implementations=stats["implementations"])
        self._engine._runner.programs.moves()
        model = self._engine.model_config
        itemsize = 2 if size.dtype == "bfloat16" else 4
        self._token_bytes = model.num_layers * 2 * model.kv_size * itemsize
        # A step gathers a few rows of the embedding, and reads all else.
        embedding = 0 if model.tied_embeddings else model.vocab_size * model.hidden_size * itemsize
        self._read_weights = stats["memory"]["weights"] - embedding
        head = model.vocab_size * model.hidden_size * itemsize
        self._layer_weights = (self._read_weights - head) / itemsize

    def _paged_tokens(self) -> int:
        raw = TINY if self._size.large == "tiny" else json.loads(
            (MODELS / self._size.large / "config.json").read_text()
        )
        itemsize = 2 if self._size.dtype == "bfloat16" else 4
        each = raw["num_hidden_layers"] * 2 * raw["num_key_value_heads"] * raw["head_dim"]
        return self._size.paged // (each * itemsize)

    def _fill(self, batch: int) -> list[str]:
        names = [f"{batch}-{index}" for index in range(batch)]
        vocab = self._engine.model_config.vocab_size
        for index, name in enumerate(names):
            self._engine.add_request(
                name, prompt(index, self._size.context, vocab),
                SamplingParams(temperature=0.0, max_tokens=self._answer, ignore_eos=True),
            )
        until_decoding(self._engine, names)
        return names

    def _time(self, before: Callable[[], None] = lambda: None) -> float:
        """Seconds a step, over `steps` of them; `before` each."""
        for _ in range(4):
            self._engine.step()
        started = time.perf_counter()
        for _ in range(self._size.steps):
            before()
            self._engine.step()
        return (time.perf_counter() - started) / self._size.steps

    def decode(self, batch: int) -> None:
        """Steps of `batch` decodes against reading weights, keys and values once."""
        names = self._fill(batch)
        try:
            seconds = statistics.median(self._time() for _ in range(3))
        finally:
            abort(self._engine, names)
        tokens = self._size.context + 2 * self._size.steps
        nbytes = self._read_weights + batch * tokens * self._token_bytes
        floor = nbytes / self._read
        self._out.row(
            what="decode step", batch=batch, context=self._size.context, ms=seconds * 1e3,
            roofline_ms=floor * 1e3, of_roofline=floor / seconds, tok_s=batch / seconds,
        )

    def prefill(self) -> None:
        """One prompt, from its request to its first token."""
        engine, tokens = self._engine, self._size.prompt
        tokens = min(tokens, engine.max_model_len - 2)
        vocab = engine.model_config.vocab_size
        times = []
        for number in range(6):
            started = time.perf_counter()
            engine.add_request(f"prompt-{number}", prompt(number, tokens, vocab),
                               SamplingParams(temperature=0.0, max_tokens=1))
            while engine.has_unfinished():
                engine.step()
            times.append(time.perf_counter() - started)
        seconds = statistics.median(times[1:])
        model = engine.model_config
        pairs = model.num_layers * tokens * (tokens + 1) // 2
        work = 2 * self._layer_weights * tokens + 4 * pairs * model.num_heads * model.head_dim
        self._out.row(
            what="prefill", tokens=tokens, ms=seconds * 1e3, tflop_s=work / seconds / 1e12,
            of_product=work / seconds / self._matrix,
        )

    def overlap(self, where: str, memory: Any) -> None:
        """Steps while pages go out to `memory` and others come in, as fast as they can."""
        engine, batch = self._engine, self._size.batches[-1]
        names = self._fill(batch)
        runner = engine._runner
        pool = moves.MovePool.of(runner._kv)
        count = min(self._size.paged // pool.page_bytes, 500)
        handles = engine._pool.allocate(2 * count)
        assert handles is not None, "the pool has room for them by its size"
        ids = [handle.id for handle in handles]
        moved, under_way = 0, np.zeros(0, np.uint64)
        try:
            with moves.Segment(memory) as segment, pool:

                def hand_over() -> None:
                    nonlocal moved, under_way
                    statuses = moves.poll(under_way)[0]
                    if (statuses == moves.Status.PENDING).sum() > count:
                        return
                    done = under_way[statuses != moves.Status.PENDING]
                    moved += len(done)
                    step = moves.MoveBatch(2 * count, pool)
                    at = np.arange(count) * pool.page_bytes
                    fresh = [
                        step.copy_out(ids[:count], segment, at),
                        step.copy_in(ids[count:], segment, at + count * pool.page_bytes),
                    ]
                    left = under_way[statuses == moves.Status.PENDING]
                    under_way = np.concatenate([left, *fresh])
                    runner._dispatch_moves([step.packed()])

                alone, beside, rates = [], [], []
                for _ in range(3):
                    alone.append(self._time())
                    before, started = moved, time.perf_counter()
                    beside.append(self._time(hand_over))
                    rates.append((moved - before) * pool.page_bytes
                                 / (time.perf_counter() - started))
                    moves.drain(60)
        finally:
            for handle in handles:
                engine._pool.release(handle)
            abort(engine, names)
        ratio = statistics.median(b / a for a, b in zip(alone, beside, strict=True))
        rate = statistics.median(rates)
        self._out.row(
            what="decode beside paging", where=where, batch=batch, slowdown=ratio - 1,
            paged_gb_s=rate / 1e9, of_read_rate=rate / self._read,
            step_ms=statistics.median(alone) * 1e3,
        )

    def close(self) -> None:
        """Lets go of everything."""
        self._engine.close()


def memories(platform: str, nbytes: int) -> Iterator[tuple[str, Any]]:
    """What pages are moved to, by name."""
    yield "host", mmap.mmap(-1, nbytes)
    if platform == "cuda":
        with DeviceArena.create(nbytes) as arena:
            yield "arena on the same GPU (stand-in for a peer)", arena.buffer()


def decode(platform: str, out: Out) -> Steps:
    """Decode steps alone; the engine, still open."""
    timed = Steps(platform, out)
    for batch in SIZES[platform].batches:
        out.part(f"decode step, batch {batch}", lambda batch=batch: timed.decode(batch))
    return timed


def steps(platform: str, out: Out) -> None:
    """Decode, prefill, overlap."""
    timed = decode(platform, out)
    out.part("prefill", timed.prefill)

    def overlaps() -> None:
        for where, memory in memories(platform, 2 * SIZES[platform].paged):
            out.part(f"overlap, {where}", lambda w=where, m=memory: timed.overlap(w, m))

    out.part("overlap", overlaps)
    timed.close()


def startup(platform: str, out: Out) -> None:
    """An engine made twice with one cache of programs, at first empty.

    On a GPU its pool gets what weights and the measured peak leave (a CPU has no such limit), and
    prompts that fill whole steps are run in it.
    """
    pool = {} if platform == "cuda" else {"kv_cache_tokens": 4096}
    with tempfile.TemporaryDirectory() as cache:
        for name in ("empty", "full"):
            started = time.perf_counter()
            engine = Engine(config(
                platform, SIZES[platform].small, compile_cache_dir=cache, max_model_len=512, **pool,
            ))
            stats = engine.stats()
            out.row(
                what="start", cache=name, seconds=time.perf_counter() - started,
                load_s=stats["startup"]["load_s"], compile_s=stats["startup"]["warmup_s"],
                programs=stats["compiles"],
            )
            for number in range(16):
                engine.add_request(str(number), prompt(number, 400, engine.model_config.vocab_size),
                                   SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True))
            while engine.has_unfinished():
                engine.step()
            used = jax.local_devices()[0].memory_stats() or {}
            out.row(
                what="memory plan", cache=name,
                **{f"{key}_mib": round(n / 2**20) for key, n in stats["memory"].items()
                   if isinstance(n, int)},
                **{f"{key}_mib": round(used[key] / 2**20)
                   for key in ("bytes_limit", "bytes_in_use", "peak_bytes_in_use", "pool_bytes")
                   if key in used},
            )
            if engine.stats()["pool_resets"]:
                raise RuntimeError("a step failed in a pool of the planned size")
            engine.close()
            del engine
            gc.collect()


RUNS: dict[str, Callable[[str, Out], Any]] = {
    "steps": steps, "decode": lambda platform, out: decode(platform, out).close(),
    "startup": startup,
}


def main(runs: dict[str, Callable[[str, Out], Any]]) -> int:
    """Runs one of them and prints its rows; the exit status."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=list(runs))
    parser.add_argument("--platform", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--limit_s", type=float, default=120, help="begin no part after that")
    args = parser.parse_args()
    out = Out(args.limit_s)
    out.part(args.what, lambda: runs[args.what](args.platform, out))
    return 1 if out.failed else 0


if __name__ == "__main__":
    raise SystemExit(main(RUNS))
