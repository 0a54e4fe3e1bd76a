"""The four workloads: one stream, one long prompt, an offline batch, a burst over a small pool.

Prompts are random token ids without shared prefixes (no prefix cache can help), decoding is
greedy, ends of sequence are ignored. Seeds are those of the comparisons with other engines, so that
everybody computes on the same ids. No jax here: an engine is passed in.
"""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from aqua_jax.bench.latency import request_metrics
from aqua_jax.config import SamplingParams
from aqua_jax.engine.outputs import RequestOutput

Prompts = list[list[int]]

_LARGEST_ID = 32000  # prompts are drawn below this (or the model's vocabulary, if smaller)
_FIRST_ID = 3  # ids below are special in most vocabularies
BURST_RESIDENT = 8  # whole sequences that the burst's KV pool holds


class EngineLike(Protocol):
    """What a workload needs of an engine."""

    def add_request(self, request_id: str, prompt: Any, params: SamplingParams) -> None:
        """Accepts a request."""

    def step(self) -> list[RequestOutput]:
        """Runs one step."""
        ...

    def has_unfinished(self) -> bool:
        """Whether another step may bring outputs."""
        ...

    def stats(self) -> dict[str, Any]:
        """Counters."""
        ...


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How large a workload is.

    Attributes:
      requests: at once.
      prompt: tokens of each prompt.
      output: tokens generated for each.
    """

    requests: int
    prompt: int
    output: int

    @property
    def sequence(self) -> int:
        """Tokens of one whole sequence."""
        return self.prompt + self.output


DEFAULTS = {
    "single": Sizes(1, 128, 128),
    "prefill": Sizes(1, 1024, 1),
    "batch": Sizes(64, 128, 128),
    "burst": Sizes(64, 256, 256),
}
WORKLOADS = tuple(DEFAULTS)


def random_prompts(count: int, length: int, seed: int, vocab: int) -> Prompts:
    """`count` prompts of `length` ids each; no two share a beginning worth caching."""
    return [random_prompt(length, seed * 100003 + index, vocab) for index in range(count)]


def random_prompt(length: int, seed: int, vocab: int) -> list[int]:
    """One prompt of `length` ids below `vocab`."""
    draw = random.Random(seed)
    top = min(vocab, _LARGEST_ID)
    return [draw.randrange(min(_FIRST_ID, top - 1), top) for _ in range(length)]


def run_all(engine: EngineLike, prompts: Prompts, output: int) -> tuple[float, list[list[float]]]:
    """Sends all prompts at once and waits for all tokens.

    Args:
      engine: idle.
      prompts: token ids.
      output: tokens to generate for each.

    Returns:
      (when they were sent, for each prompt when each of its tokens arrived), seconds.

    Raises:
      RuntimeError: a request ended with another number of tokens.
    """
    params = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True)
    arrivals: dict[str, list[float]] = {f"bench-{index}": [] for index in range(len(prompts))}
    start = time.perf_counter()
    for name, prompt in zip(arrivals, prompts, strict=True):
        engine.add_request(name, prompt, params)
    while engine.has_unfinished():
        outputs = engine.step()
        now = time.perf_counter()
        for one in outputs:
            times = arrivals[one.request_id]
            times += [now] * (len(one.outputs[0].token_ids) - len(times))
            if one.finished and len(times) != output:
                raise RuntimeError(f"{one.request_id}: {len(times)} tokens, {one.error}")
    return start, list(arrivals.values())


def _elapsed(engine: EngineLike, prompts: Prompts, output: int) -> float:
    """Seconds until the last token has arrived."""
    start, arrivals = run_all(engine, prompts, output)
    return max(times[-1] for times in arrivals) - start


def warm_up(engine: EngineLike, vocab: int, longest: int) -> None:
    """Brings caches and clocks up: a few short requests that nothing measured resembles.

    Args:
      engine: idle.
      vocab: ids are below.
      longest: tokens a whole sequence may have.
    """
    length = max(1, min(128, longest - 16))
    run_all(engine, [random_prompt(length, 1, vocab)], min(16, longest - length))
    run_all(engine, random_prompts(4, length, 2, vocab), min(8, longest - length))


def single(engine: EngineLike, sizes: Sizes, repeat: int, vocab: int) -> dict[str, float]:
    """One stream. decode_tok_s leaves the prompt's time out: that of the same ids reversed."""
    prompt = random_prompt(sizes.prompt, 100 + repeat, vocab)
    first = _elapsed(engine, [prompt[::-1]], 1)
    whole = _elapsed(engine, [prompt], sizes.output)
    return {
        "tok_s": sizes.output / whole,
        "decode_tok_s": max(sizes.output - 1, 1) / max(whole - first, 1e-9),
        "total_s": whole,
    }


def prefill(engine: EngineLike, sizes: Sizes, repeat: int, vocab: int) -> dict[str, float]:
    """One long prompt up to its first token."""
    prompt = random_prompt(sizes.prompt, 200 + repeat, vocab)
    start, arrivals = run_all(engine, [prompt], sizes.output)
    elapsed = arrivals[0][0] - start
    return {"ttft_s": elapsed, "prompt_tok_s": sizes.prompt / elapsed}


def batch(engine: EngineLike, sizes: Sizes, repeat: int, vocab: int) -> dict[str, float]:
    """Many requests at once, prompts included: output tokens a second."""
    prompts = random_prompts(sizes.requests, sizes.prompt, 300 + repeat, vocab)
    elapsed = _elapsed(engine, prompts, sizes.output)
    return {"output_tok_s": sizes.requests * sizes.output / elapsed, "total_s": elapsed}


def burst(engine: EngineLike, sizes: Sizes, repeat: int, vocab: int) -> dict[str, float]:
    """Many requests at once over a pool that holds few of them: what each of them feels."""
    prompts = random_prompts(sizes.requests, sizes.prompt, 400 + repeat, vocab)
    before = engine.stats()["preemptions"]
    start, arrivals = run_all(engine, prompts, sizes.output)
    preemptions = engine.stats()["preemptions"] - before
    return {**request_metrics(start, arrivals), "preemptions": preemptions}


RUNNERS: dict[str, Callable[[EngineLike, Sizes, int, int], dict[str, float]]] = {
    "single": single, "prefill": prefill, "batch": batch, "burst": burst,
}


def sizes_of(
    workload: str, requests: int | None, prompt: int | None, output: int | None
) -> Sizes:
    """A workload's default sizes, changed where a number is given.

    A single stream and a prefill are always one request; a prefill ends at its first token.
    """
    base = DEFAULTS[workload]
    return Sizes(
        base.requests if requests is None or base.requests == 1 else requests,
        base.prompt if prompt is None else prompt,
        base.output if output is None or workload == "prefill" else output,
    )


def pool_tokens(sizes: Sequence[Sizes], page_tokens: int) -> int:
    """Tokens of a KV pool in which every one of these workloads fits whole."""
    def pages(one: Sizes) -> int:
        return one.requests * (-(-one.sequence // page_tokens) + 1)

    return max(pages(one) for one in sizes) * page_tokens


def burst_pool_tokens(sizes: Sizes, page_tokens: int) -> int:
    """Tokens of a KV pool that holds `BURST_RESIDENT` whole sequences."""
    return BURST_RESIDENT * -(-sizes.sequence // page_tokens) * page_tokens
