"""The simulator beside the engine, on a load that it wasn't fitted on.

Reads a machine that `aqua-jax profile --engine` fitted on this computer, runs the same model under
fcfs and fair in turn, simulates the same requests, and prints for each figure the ratio fair/fcfs,
measured (median and range over the repeats) and predicted (the same over simulated repeats, whose
steps vary as the profile's did). The prediction holds if its median is off by no more than 15%, or
lies within the range that was observed.

    aqua-jax profile --engine --model=M --policy=fair --kv_cache_tokens=4096 \\
      --host_kv_memory=1GiB --output=profile.json
    python scripts/simulator_check.py --profile=profile.json --model=M [--dummy] [--repeats=5]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import statistics
import sys
from typing import Any

from aqua_jax.bench.open_loop import SystemClock, serve
from aqua_jax.bench.service import run_metrics
from aqua_jax.bench.traces import TraceRequest, prompt_ids
from aqua_jax.bench.workloads import warm_up
from aqua_jax.config import EngineConfig
from aqua_jax.engine.engine import Engine
from aqua_jax.simulation.cost import StepCost, Varied
from aqua_jax.simulation.loads import lognormal_lengths, timed
from aqua_jax.simulation.machines import System, build_system
from aqua_jax.simulation.profile import recorded_ratios
from aqua_jax.simulation.report import figures, simulate
from aqua_jax.simulation.setups import Limits, Setup

FIGURES = ("ttft_p50_s", "ttft_p99_s", "tbt_max_ms", "output_tok_s")
ALLOWED = 0.15
SIMULATED = 15  # repeats; they take a fraction of a second each


def make_load(arguments: argparse.Namespace) -> list[TraceRequest]:
    """Lognormal lengths, bunched arrivals: unlike any load of the profile."""
    draw = random.Random(arguments.seed)
    count = arguments.requests
    prompts = lognormal_lengths(count, arguments.prompt, 0.6, 3 * arguments.prompt, draw)
    outputs = lognormal_lengths(count, arguments.output, 0.6, 3 * arguments.output, draw)
    lengths = list(zip(prompts, outputs, strict=True))
    return timed(lengths, "gamma", arguments.rate, 0.5, 1, arguments.seed)


def measure(engine: Engine, requests: list[TraceRequest], seed: int) -> dict[str, float]:
    """One run of the real engine."""
    vocab = engine.model_config.vocab_size
    prompts = [prompt_ids(one, index, seed, vocab) for index, one in enumerate(requests)]
    run = serve(engine, requests, prompts, SystemClock())
    return run_metrics(run, ttft_slo_s=1.0, tbt_slo_s=0.1)


def predict(
    system: System, policy: str, steps: int | None, limits: Limits, requests: list[TraceRequest],
    cost: StepCost,
) -> dict[str, float]:
    """The same run, simulated."""
    setup = Setup(policy, policy, steps if policy == "fair" else None)
    return figures(simulate(setup, dataclasses.replace(system, cost=cost), limits, requests))


def main() -> int:
    """Prints a table; 0 if every prediction holds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dummy", action="store_true", help="random weights from config.json")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--pool", type=int, default=4096, help="tokens of the KV pool")
    parser.add_argument("--store", type=int, default=1 << 30, help="bytes of the host store")
    parser.add_argument("--slice-steps", type=int, default=None)
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--prompt", type=int, default=160)
    parser.add_argument("--output", type=int, default=120)
    parser.add_argument("--rate", type=float, default=8.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=7)
    arguments = parser.parse_args()

    requests = make_load(arguments)
    base = build_system(arguments.profile, None)
    if not base.links:
        parser.error(f"{arguments.profile} knows no store: make it with --policy=fair")
    with open(arguments.profile, encoding="utf-8") as file:
        ratios = recorded_ratios(json.load(file), base.cost)
    system = dataclasses.replace(base, num_pages=arguments.pool // base.page_tokens)
    engines: dict[str, Engine] = {}
    measured: dict[str, list[dict[str, float]]] = {"fcfs": [], "fair": []}
    for policy in measured:
        values: dict[str, Any] = {
            "model": arguments.model, "dtype": arguments.dtype, "policy": policy,
            "load_format": "dummy" if arguments.dummy else "auto",
            "kv_cache_tokens": arguments.pool, "page_tokens": base.page_tokens,
        }
        if policy == "fair":
            values |= {"host_kv_memory": arguments.store, "slice_steps": arguments.slice_steps}
        engines[policy] = Engine(EngineConfig(**values))
        warm_up(engines[policy], engines[policy].model_config.vocab_size, 160)
    for repeat in range(arguments.repeats):
        for policy, engine in engines.items():
            measured[policy].append(measure(engine, requests, 900 + repeat))
            print(f"repeat {repeat + 1}, {policy}: {_short(measured[policy][-1])}", file=sys.stderr)
    some = engines["fair"]
    limits = Limits(some.config.max_num_seqs, some.config.step_tokens, some.max_model_len)
    for engine in engines.values():
        engine.close()
    predicted = {
        policy: [
            predict(
                system, policy, arguments.slice_steps, limits, requests,
                Varied(base.cost, ratios, repeat),
            ) for repeat in range(SIMULATED)
        ] for policy in measured
    }
    return report(measured, predicted)


def _short(figures: dict[str, float]) -> str:
    return ", ".join(f"{name} {figures[name]:.4g}" for name in FIGURES)


def _ratios(runs: dict[str, list[dict[str, float]]], name: str) -> tuple[float, float, float]:
    """fair/fcfs of a figure: median, least, most."""
    pairs = zip(runs["fair"], runs["fcfs"], strict=True)
    ratios = sorted(fair[name] / fcfs[name] for fair, fcfs in pairs)
    return statistics.median(ratios), ratios[0], ratios[-1]


def report(
    measured: dict[str, list[dict[str, float]]], predicted: dict[str, list[dict[str, float]]]
) -> int:
    """Prints figures and ratios; 0 if every ratio holds."""
    failed = 0
    shown: dict[str, Any] = {}
    for name in FIGURES:
        real, guess = _ratios(measured, name), _ratios(predicted, name)
        off = guess[0] / real[0] - 1
        good = abs(off) <= ALLOWED or real[1] <= guess[0] <= real[2]
        failed += not good
        shown[name] = {
            "measured": _medians(measured, name), "predicted": _medians(predicted, name),
            "ratio_measured": real, "ratio_predicted": guess, "off": off, "holds": good,
        }
        print(
            f"{name:14} fair/fcfs measured {_words(real)}, predicted {_words(guess)} "
            f"({off:+.0%}){'' if good else '  OFF'}"
        )
    print(json.dumps(shown))
    return 1 if failed else 0


def _medians(runs: dict[str, list[dict[str, float]]], name: str) -> dict[str, float]:
    return {policy: statistics.median(one[name] for one in some) for policy, some in runs.items()}


def _words(ratio: tuple[float, float, float]) -> str:
    return "{:.3f} [{:.3f} - {:.3f}]".format(*ratio)


if __name__ == "__main__":
    sys.exit(main())
