"""Bursts under pressure on the device there is, as JSON lines; scripts/gpu_check.py runs it.

    python scripts/gpu_bursts.py WHAT [--platform=cuda|cpu] [--limit_s=120]

WHAT is one of
    bursts        the pool cut to a half and to a tenth: fcfs, fair with pages in host memory, fair
                  with pages in a peer's (on one GPU an arena of its own, a stand-in)
    killed        fair with a lender that is killed in mid-burst: every answer as without it; with
                  a GPU, one that lends host memory and one that lends a GPU's
    lent          memory lent through a coordinator (with a GPU, a GPU's): every answer as without,
                  and afterwards all of it is back, and zeroed
    transformers  the same prompts through transformers with continuous batching, and through us
    tensor        one model over two devices (on a CPU: two of jax's): the answers of one, pages of
                  both shards swapped out and in; then with a lender for each shard, on the other
                  one's GPU, of which one is killed in mid-burst, and with lenders of a coordinator
    soak          engines made, loaded, aborted and closed again and again until --limit_s is over;
                  device memory, pinned memory and descriptors must be what they were

On a CPU everything runs at tiny sizes: a test of this script, not a measurement.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import inspect
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import gpu_engine
import jax
from gpu_engine import SIZES, Out, config, model_directory, prompt

from aqua_jax import Engine, EngineConfig, SamplingParams
from aqua_jax.bench import serving
from aqua_jax.bench.arrivals import synthetic
from aqua_jax.bench.variants import Variant
from aqua_jax.bench.workloads import Sizes
from aqua_jax.engine.platform import device_memory
from aqua_jax.ops import pinning

PAGE_TOKENS = 16


@dataclasses.dataclass(frozen=True)
class Burst:
    """How large the bursts are."""

    requests: int
    prompt: int
    output: int
    lent: int  # bytes of a lender
    step_tokens: int

    @property
    def tokens(self) -> int:
        """Tokens of a pool that holds all of it."""
        return self.requests * (-(-(self.prompt + self.output) // PAGE_TOKENS) + 1) * PAGE_TOKENS


BURSTS = {"cuda": Burst(64, 256, 1024, 8 << 30, 1024), "cpu": Burst(6, 32, 32, 16 << 20, 32)}
METRICS = ("ttft_p99_s", "ttft_p50_s", "output_tok_s", "tbt_p99_ms")
BLOCK = 256  # tokens of a page in transformers
# The pool holds one part in so many; answers are so many times shorter, for in a tenth few run.
SHARES = ((2, 1), (10, 4))


@contextlib.contextmanager
def running(*command: str, until: str) -> Iterator[subprocess.Popen]:
    """A command of ours that has said `until`; killed at the end."""
    process = subprocess.Popen(
        [sys.executable, "-m", "aqua_jax.cli.main", *command], stderr=subprocess.PIPE, text=True,
    )
    assert process.stderr is not None
    try:
        said = ""
        while until not in said:
            said = process.stderr.readline()
            if not said:
                raise RuntimeError(f"{' '.join(command)} did not start")
        yield process
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


@contextlib.contextmanager
def lender(nbytes: int, device: str = "") -> Iterator[tuple[str, subprocess.Popen]]:
    """A process that lends memory, the host's or a GPU's, and its socket; killed at the end."""
    with tempfile.TemporaryDirectory() as folder:
        address = os.path.join(folder, "lender")
        with running(
            "lend", f"--bytes={nbytes}", f"--listen={address}", f"--device={device}", until=address
        ) as process:
            yield address, process


# Room for lenders on GPUs that jax uses as well, and for stages beside this one.
SHARED = {"device_memory_fraction": 0.25}


def lent_places(platform: str) -> list[str]:
    """Whose memory a lender's is: the host's, and with a GPU the second one's, or our own."""
    if platform == "cpu":
        return [""]
    return ["", "cuda:1" if len(jax.local_devices()) > 1 else "cuda:0"]


def small(platform: str, tokens: int, **fields: Any) -> EngineConfig:
    """A 1B-shaped engine with a pool of so many tokens."""
    burst = BURSTS[platform]
    longest = -(-(burst.prompt + burst.output) // PAGE_TOKENS) * PAGE_TOKENS + PAGE_TOKENS
    return config(platform, SIZES[platform].small, **{
        "kv_cache_tokens": max(tokens // PAGE_TOKENS * PAGE_TOKENS, longest),
        "max_model_len": longest, "max_num_seqs": burst.requests,
        "max_step_tokens": burst.step_tokens, **fields,
    })


def bursts(platform: str, out: Out) -> None:
    """The comparison, for each size of the pool."""
    burst = BURSTS[platform]
    with contextlib.ExitStack() as opened:
        if platform == "cuda":
            gpus = len(jax.local_devices())
            peer = "cuda:1" if gpus > 1 else "cuda:0"
            where = "peer" if gpus > 1 else "arena on the same GPU (stand-in for a peer)"
            fields = {"peer": peer, "peer_kv_memory": burst.lent, "host_kv_memory": 0}
        else:
            where = "lender's memory (stand-in for a peer)"
            fields = {"peer": opened.enter_context(lender(burst.lent))[0], "host_kv_memory": 0}
        variants = [
            Variant("fcfs", {"policy": "fcfs"}),
            Variant("fair, host", {"policy": "fair", "host_kv_memory": burst.lent}),
            Variant(f"fair, {where}", {"policy": "fair", **fields}),
        ]

        def compare(share: int, shorter: int) -> None:
            part = dataclasses.replace(burst, output=burst.output // shorter)
            sizes = Sizes(part.requests, part.prompt, part.output)
            load = serving.Load(synthetic(sizes, [0.0] * part.requests, 1), None, 1.0, 0.1)
            base = small(platform, part.tokens // share)
            report, _ = serving.compare(base, variants, load, 1, Engine)
            found = serving.medians(report)
            for name, one in found.items():
                out.row(
                    what=f"burst, pool for 1/{share}", policy=name, requests=burst.requests,
                    prompt=part.prompt, output=part.output,
                    **{key: one[key] for key in METRICS},
                    ttft_p99_better=found["fcfs"]["ttft_p99_s"] / one["ttft_p99_s"],
                    tok_s_of_fcfs=one["output_tok_s"] / found["fcfs"]["output_tok_s"],
                )

        for share in SHARES:
            out.part(f"burst, pool for 1/{share[0]}", lambda share=share: compare(*share))


def answers(
    engine: Engine, prompts: list[list[int]], tokens: int, kill: Any = None
) -> tuple[list[tuple[int, ...]], float]:
    """What greedy decoding says to each, and seconds; `kill()` once a third of it is there."""
    started = time.perf_counter()
    for number, ids in enumerate(prompts):
        engine.add_request(str(number), ids,
                           SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True))
    found: dict[str, tuple[int, ...]] = {}
    while engine.has_unfinished():
        for one in engine.step():
            found[one.request_id] = tuple(one.outputs[0].token_ids)
        if kill is not None and sum(map(len, found.values())) > tokens * len(prompts) // 3:
            kill()
            kill = None
    return [found[str(number)] for number in range(len(prompts))], time.perf_counter() - started


def make_prompts(platform: str, vocab: int) -> list[list[int]]:
    """The burst's."""
    burst = BURSTS[platform]
    return [prompt(number, burst.prompt, vocab) for number in range(burst.requests)]


def killed(platform: str, out: Out) -> None:
    """With the lender killed, against a pool for everything. Deterministic, so equal to the bit."""
    expected = unpressed(platform)
    for device in lent_places(platform):

        def one(device: str = device) -> None:
            with lender(short(platform).lent, device) as (address, process):
                pressed(
                    platform, out, expected, f"lender of {device or 'host memory'} killed in "
                    "mid-burst", lambda: (process.send_signal(signal.SIGKILL), process.wait(30)),
                    peer=address,
                )

        out.part(f"lender of {device or 'host memory'} killed", one)


def same(platform: str) -> dict[str, Any]:
    """What makes answers equal to the bit."""
    exact = {"deterministic": True, **SHARED}
    return {**exact, "dtype": "float32"} if platform == "cpu" else exact


def short(platform: str) -> Burst:
    """The burst with short answers, which need less memory."""
    burst = BURSTS[platform]
    return dataclasses.replace(burst, output=min(128, burst.output), lent=min(2 << 30, burst.lent))


def unpressed(platform: str, **fields: Any) -> list[tuple[int, ...]]:
    """The answers of an engine whose pool holds everything."""
    burst = short(platform)
    engine = Engine(small(platform, burst.tokens, policy="fcfs", **same(platform), **fields))
    prompts = make_prompts(platform, engine.model_config.vocab_size)
    found, _ = answers(engine, prompts, burst.output)
    engine.close()
    return found


def pressed(
    platform: str, out: Out, expected: list[tuple[int, ...]], what: str, kill: Any = None,
    **fields: Any,
) -> None:
    """The same requests in a quarter of the pool, and lenders' memory alone beside it."""
    burst = short(platform)
    engine = Engine(small(
        platform, burst.tokens // 4, policy="fair", slice_steps=8, host_kv_memory=0,
        peer_kv_memory=burst.lent, **same(platform), **fields,
    ))
    prompts = make_prompts(platform, engine.model_config.vocab_size)
    found, seconds = answers(engine, prompts, burst.output, kill)
    stats = engine.stats()
    engine.close()
    wrong = sum(a != b for a, b in zip(expected, found, strict=True))
    peers = [one for one in stats["paging"]["stores"] if one["name"] == "peer"]
    out.row(what=what, requests=len(prompts), wrong_answers=wrong, seconds=seconds,
            swapped_out_bytes=stats["paging"]["bytes_out"],
            recomputed_tokens=stats["recomputed_tokens"],
            memory=sorted({f"{lender['kind']} by {lender['shared_by']}"
                           for peer in peers for lender in peer["lenders"] if lender["kind"]}))
    if wrong:
        raise RuntimeError(f"{wrong} answers differ")
    if not stats["paging"]["bytes_out"]:
        raise RuntimeError("nothing was lent, so nothing was tested")


def lent(platform: str, out: Out) -> None:
    """Lender, coordinator, engine: three processes."""
    from aqua_jax.memory.link import status

    expected = unpressed(platform)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as opened:
        socket = os.path.join(folder, "coordinator")
        opened.enter_context(running("coordinator", f"--socket={socket}", until=socket))
        device = lent_places(platform)[-1]
        nbytes = short(platform).lent
        opened.enter_context(running(
            "lend", f"--bytes={nbytes}", f"--socket={socket}", f"--device={device}", until=socket
        ))
        where = f"{device or 'host memory'} through a coordinator"
        pressed(platform, out, expected, where, peer=socket)
        end = time.monotonic() + 30
        while sum(row.free for row in status(socket).arenas) < nbytes:
            if time.monotonic() > end:
                raise RuntimeError(f"not all is back and zeroed: {status(socket).arenas}")
            time.sleep(0.01)
        rows = status(socket).arenas
        out.row(what=where, segments=len(rows), kinds=sorted({row.kind for row in rows}),
                back_and_zeroed=sum(row.free for row in rows))


def own_peers(platform: str, out: Out) -> None:
    """Two shards, a lender for each on the other one's GPU; the second one dies."""
    places = ("", "") if platform == "cpu" else ("cuda:1", "cuda:0")
    expected = unpressed(platform, tensor_parallel=2)
    with contextlib.ExitStack() as opened:
        lenders = [
            opened.enter_context(lender(short(platform).lent // 2, place)) for place in places
        ]
        peers = ",".join(address for address, _ in lenders)
        doomed = lenders[1][1]
        pressed(platform, out, expected, "two shards, a lender each",
                tensor_parallel=2, peer=peers)
        pressed(platform, out, expected, "two shards, a lender each, one killed in mid-burst",
                lambda: (doomed.send_signal(signal.SIGKILL), doomed.wait(30)),
                tensor_parallel=2, peer=peers)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as opened:
        socket = os.path.join(folder, "coordinator")
        opened.enter_context(running("coordinator", f"--socket={socket}", until=socket))
        for place in places:
            opened.enter_context(running(
                "lend", f"--bytes={short(platform).lent // 2}", f"--socket={socket}",
                f"--device={place}", until=socket,
            ))
        pressed(platform, out, expected, "two shards, each with the nearest of a coordinator's",
                tensor_parallel=2, peer=socket)


def tensor(platform: str, out: Out) -> None:
    """Two shards under pressure against one device without."""
    burst = short(platform)
    found = {}
    for shards in (1, 2):
        engine = Engine(small(
            platform, burst.tokens // (4 if shards == 2 else 1), dtype="float32",
            policy="fair", slice_steps=8, host_kv_memory=burst.lent, tensor_parallel=shards,
            **SHARED,
        ))
        prompts = make_prompts(platform, engine.model_config.vocab_size)
        found[shards], seconds = answers(engine, prompts, burst.output)
        stats = engine.stats()
        engine.close()
        out.row(what="tensor parallel", shards=shards, seconds=seconds,
                tok_s=burst.output * len(prompts) / seconds,
                swapped_out_bytes=(stats["paging"] or {}).get("bytes_out", 0))
    equal = sum(a == b for a, b in zip(found[1], found[2], strict=True))
    out.row(what="tensor parallel", equal_answers=equal, of=len(found[1]))
    if equal < 0.9 * len(found[1]):  # sums in another order may tip a draw between equals
        raise RuntimeError("two shards answer something else than one device")
    out.part("two shards, a lender each", lambda: own_peers(platform, out))


def transformers(platform: str, out: Out) -> None:
    """Tokens a second of both: the same prompts, lengths and shape, random weights."""
    import torch
    import transformers as library

    burst = BURSTS[platform]
    tokens = min(256, burst.output)
    directory = model_directory(SIZES[platform].small)
    kind = getattr(torch, SIZES[platform].dtype)
    shape = library.AutoConfig.from_pretrained(directory)
    shape._attn_implementation = "paged|sdpa"
    # Before jax has taken its share of the GPU.
    with torch.device(platform):
        model = library.AutoModelForCausalLM.from_config(shape, dtype=kind).eval()
    prompts = make_prompts(platform, shape.vocab_size)
    # Room for all at once, as for us; by default it would take nearly all memory there is.
    room = {
        "num_blocks": burst.requests * (-(-(burst.prompt + tokens) // BLOCK) + 1),
        "max_batch_tokens": burst.step_tokens,
    }
    more: dict[str, Any] = {}
    if hasattr(library, "ContinuousBatchingConfig"):
        kind_of = library.ContinuousBatchingConfig
        # `block_size` up to transformers 5.17 at least, `page_size` later.
        page = "page_size" if "page_size" in inspect.signature(kind_of).parameters else "block_size"
        more["continuous_batching_config"] = kind_of(**{page: BLOCK}, **room)
        room = {}
    settings = library.GenerationConfig(
        max_new_tokens=tokens, do_sample=False, eos_token_id=-1, pad_token_id=0, **room
    )
    times = []
    for _ in range(2):  # the first one warms up
        started = time.perf_counter()
        made = model.generate_batch(inputs=prompts, generation_config=settings, **more)
        times.append(time.perf_counter() - started)
    count = sum(len(one.generated_tokens) for one in made.values())
    out.row(what="transformers, continuous batching", requests=len(prompts), prompt=burst.prompt,
            output=tokens, tokens=count, seconds=times[-1], tok_s=count / times[-1])
    del model, made
    gc.collect()
    if platform == "cuda":
        torch.cuda.empty_cache()
    engine = Engine(small(platform, burst.tokens, policy="fcfs"))
    answers(engine, prompts, tokens)
    _, seconds = answers(engine, prompts, tokens)
    engine.close()
    out.row(what="aqua_jax", requests=len(prompts), prompt=burst.prompt, output=tokens,
            tokens=tokens * len(prompts), seconds=seconds, tok_s=tokens * len(prompts) / seconds)


def held(platform: str) -> dict[str, int]:
    """What must not grow."""
    gc.collect()
    jax.clear_caches()
    device = jax.local_devices()[0]
    memory = device_memory(device)
    return {
        "device_bytes": memory.in_use if platform == "cuda" else sum(
            one.nbytes for one in jax.live_arrays()),
        "outside_xla_bytes": 0 if memory.free is None or memory.total is None
        else memory.total - memory.free - memory.held,
        "pinned_bytes": pinning.pinned_bytes(), "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
    }


# Contexts and libraries take some on their first use, not again and again.
SLACK = {"device_bytes": 1 << 20, "outside_xla_bytes": 64 << 20, "pinned_bytes": 0,
         "descriptors": 4, "threads": 4}


def soak(platform: str, out: Out) -> None:
    """Engines under random load and paging, one after another."""
    generator, burst = random.Random(0), BURSTS[platform]
    first: dict[str, int] = {}
    rounds = requests = 0
    with lender(burst.lent) as (address, _):
        lent = {"peer": address, "peer_kv_memory": burst.lent // 2}
        while rounds < 3 or out.left_s > 0:
            engine = Engine(small(
                platform, burst.tokens // 4, policy="fair", slice_steps=4,
                host_kv_memory=burst.lent, **(lent if rounds % 2 else {}),
            ))
            vocab = engine.model_config.vocab_size
            until = time.monotonic() + (20 if platform == "cuda" else 2)
            alive: list[str] = []
            while time.monotonic() < until:
                while len(alive) < burst.requests:
                    requests += 1
                    alive.append(str(requests))
                    engine.add_request(
                        alive[-1], prompt(requests, burst.prompt, vocab),
                        SamplingParams(max_tokens=generator.randint(1, burst.output)),
                    )
                for one in engine.step():
                    if one.finished:
                        alive.remove(one.request_id)
                if generator.random() < 0.02:
                    engine.abort(generator.choice(alive))
            for name in alive:
                engine.abort(name)
            while engine.has_unfinished():
                engine.step()
            left = engine.stats()["pages"]["in_use"]
            engine.close()
            del engine
            rounds += 1
            now = held(platform)
            # The second of each kind is what later ones are compared with.
            if rounds == 2:
                first = now
            out.row(what="soak", round=rounds, requests=requests, pages_left=left, **now)
            if left:
                raise RuntimeError(f"{left} pages in use when nothing runs")
    grown = {
        name: now[name] - first[name] for name in first if now[name] > first[name] + SLACK[name]
    }
    out.row(what="soak", rounds=rounds, requests=requests, grown=grown)
    if grown:
        raise RuntimeError(f"a leak: {grown}")


if __name__ == "__main__":
    raise SystemExit(gpu_engine.main({
        "bursts": bursts, "killed": killed, "transformers": transformers, "tensor": tensor,
        "soak": soak, "lent": lent,
    }))
