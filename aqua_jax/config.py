"""Configuration as frozen dataclasses, validated in one place.

Command line flags map one to one onto `EngineConfig`; request fields onto `SamplingParams`,
whose names are vLLM's.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from aqua_jax.errors import ConfigError, FieldError, RequestError

DType = Literal["auto", "bfloat16", "float32"]
# Policies under which whoever gives way keeps its pages elsewhere, where there is room.
SWAPPING = ("fair", "fcfs_swap", "priority")
LOGPROBS_LIMIT = 20  # most alternatives per token; the width of the packed logprob read


def _require(ok: bool, kind: type[FieldError], field: str, value: Any, allowed: str) -> None:
    if not ok:
        raise kind(field, value, allowed)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How one request's tokens are chosen. Names and meanings are vLLM's.

    Raises:
      RequestError: a field is out of range or of the wrong type.
    """

    n: int = 1  # samples per prompt, sharing the prompt's pages
    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # 0 or -1: all tokens
    top_p: float = 1.0
    min_p: float = 0.0  # least probability relative to the likeliest token's
    seed: int | None = None  # None: drawn from the engine's seed and the request's number
    max_tokens: int | None = 16  # None: up to the model length
    min_tokens: int = 0  # no end of sequence or stop before so many tokens
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    logprobs: int | None = None  # alternatives per output token; 0: the chosen one only
    prompt_logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    detokenize: bool = True
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        if self.stop is None:
            object.__setattr__(self, "stop", ())
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name in ("stop", "stop_token_ids"):
            value = getattr(self, name)
            _require(
                isinstance(value, (list, tuple)), RequestError, name, value, "a list of values"
            )
            object.__setattr__(self, name, tuple(value))
        self._check_integers()
        self._check_numbers()
        for text in self.stop:
            _require(
                isinstance(text, str) and text != "", RequestError, "stop", text,
                "non-empty strings",
            )
        for token in self.stop_token_ids:
            _require(
                _is_int(token) and token >= 0, RequestError, "stop_token_ids", token,
                "token ids, integers >= 0",
            )
        for name in (
            "ignore_eos", "include_stop_str_in_output", "detokenize", "skip_special_tokens",
        ):
            value = getattr(self, name)
            _require(isinstance(value, bool), RequestError, name, value, "true or false")
        _require(
            self.detokenize or not self.stop, RequestError, "stop", self.stop,
            "empty when detokenize is false: stop strings are matched on text",
        )

    def _check_integers(self) -> None:
        ranges: dict[str, tuple[int, float, bool]] = {
            "n": (1, 1024, False),
            "top_k": (-1, 2**31 - 1, False),
            "seed": (-(2**63), 2**64 - 1, True),
            "max_tokens": (1, 2**31 - 1, True),
            "min_tokens": (0, 2**31 - 1, False),
            "logprobs": (0, LOGPROBS_LIMIT, True),
            "prompt_logprobs": (0, LOGPROBS_LIMIT, True),
        }
        for name, (low, high, optional) in ranges.items():
            value = getattr(self, name)
            if value is None and optional:
                continue
            top = "" if high == math.inf else f" and <= {high}"
            _require(
                _is_int(value) and low <= value <= high, RequestError, name, value,
                f"an integer >= {low}{top}" + (" or null" if optional else ""),
            )
        _require(
            self.max_tokens is None or self.min_tokens <= self.max_tokens, RequestError,
            "min_tokens", self.min_tokens, f"at most max_tokens ({self.max_tokens})",
        )

    def _check_numbers(self) -> None:
        checks: dict[str, tuple[float, float, str]] = {
            "temperature": (0.0, 100.0, "a number from 0 to 100"),
            "top_p": (1e-9, 1.0, "a number above 0 and at most 1"),
            "min_p": (0.0, 1.0, "a number from 0 to 1"),
            "presence_penalty": (-2.0, 2.0, "a number from -2 to 2"),
            "frequency_penalty": (-2.0, 2.0, "a number from -2 to 2"),
            "repetition_penalty": (1e-3, 1e3, "a number from 0.001 to 1000"),
        }
        for name, (low, high, allowed) in checks.items():
            value = getattr(self, name)
            _require(
                _is_number(value) and low <= value <= high, RequestError, name, value, allowed
            )

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken every time."""
        return self.temperature < 1e-5

    @property
    def penalised(self) -> bool:
        """Whether past tokens change the logits."""
        return bool(
            self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0
        )


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Everything an engine is built from; `aqua-jax` flags map one to one onto it.

    Raises:
      ConfigError: a field is out of range or of the wrong type.
    """

    model: str  # directory, .gguf file, or "demo"
    tokenizer: str | None = None  # directory or .gguf; None: the model's own
    load_format: Literal["auto", "safetensors", "gguf", "orbax", "dummy"] = "auto"
    dtype: DType = "auto"  # of weights and matmul inputs
    kv_dtype: DType = "auto"  # of the KV pool; auto: as dtype
    # Bytes of KV pool. None: 256 MiB on CPUs; on a GPU what is left of device_memory_fraction
    # beside the weights and the measured peak of a step.
    kv_cache_memory: int | None = None
    kv_cache_tokens: int | None = None  # tokens of KV pool; overrides kv_cache_memory
    page_tokens: int = 16
    max_model_len: int | None = None  # tokens; None: the model's, cut to what the pool holds
    max_num_seqs: int = 64  # sequences in one step
    # Prompt chunks and decodes of one step together; None: 1024, or 256 when deterministic
    # (there every step runs the one compiled size).
    max_step_tokens: int | None = None
    max_chunk_tokens: int | None = None  # longest prompt chunk of one sequence; None: the step's
    prefix_caching: bool = True
    # Who runs next. Under fcfs whoever gives way is recomputed; under the others its pages go to
    # the lender's memory, then to our own, as far as there is room.
    policy: Literal["fair", "fcfs", "fcfs_swap", "priority"] = "fair"
    slice_steps: int | None = None  # fair: decode steps of a turn; None: by what a switch costs
    tbt_slo_ms: float = 0.0  # fair: longest gap between tokens aimed at; 0: as short as it goes
    # The thrash guard: of all time, what may go into copying and recomputing for those who give
    # way; slices get longer, and batches smaller, where it would be more. 1: no bound.
    switch_share: float = 0.15
    # fair: shares of users in the machine, by what requests call `user`; others weigh 1. A dict has
    # no hash; without it configurations keep theirs.
    user_weights: Mapping[str, float] = dataclasses.field(default_factory=dict, hash=False)
    # Bytes of own memory for pages that gave way; 0: none; None: four times the pool, but at most a
    # quarter of what is available.
    host_kv_memory: int | None = None
    # Socket of a lender or a coordinator, or cuda:N for a GPU that nobody uses: this memory is used
    # first; "": none. Several, with commas between: one for each device of tensor_parallel, which
    # keeps its part of every page there. Of one coordinator's lenders GPUs get the nearest each.
    peer: str = ""
    peer_kv_memory: int | None = None  # bytes to borrow there at most; None: all that is lent
    verify_pages: bool = False  # checksums on every page that comes back
    platform: Literal["auto", "cpu", "cuda"] = "auto"  # auto: the best that jax finds
    # Share of a GPU's memory that XLA's allocator may take, for weights, KV pool and a step's
    # temporaries; the rest is for arenas and other processes. None: what XLA_CLIENT_MEM_FRACTION
    # says, or 0.9. No meaning on CPUs.
    device_memory_fraction: float | None = None
    # Whether KV memory that isn't needed is lent to other processes, through a coordinator; how
    # much is decided from the load, and taken back as the load grows.
    lend: Literal["off", "auto"] = "off"
    coordinator: str = ""  # its socket (`aqua-jax coordinator`); with lend
    # Bytes of the KV memory that may be lent at most; None: three quarters. Every request must fit
    # into the rest. On a GPU: bytes outside XLA's share, beside the KV memory in it; None: all that
    # is free there, less a margin.
    lend_kv_memory: int | None = None
    lend_reserve: float = 0.1  # share of the KV memory kept beside what requests may come to need
    lend_hold_s: float = 10.0  # seconds before less need is believed: memory isn't lent sooner
    lend_deadline_s: float = 2.0  # seconds that borrowers have to give memory back
    lend_bandwidth: int = 1 << 30  # bytes/s that a borrower may copy; 0: as much as it can
    # Devices that share the model: each has its part of heads, hidden units and vocabulary, and
    # its heads of every page.
    tensor_parallel: int = 1
    attention: Literal["auto", "ffi", "reference"] = "auto"
    matmul: Literal["auto", "ffi", "xla"] = "auto"
    deterministic: bool = False  # tokens independent of neighbours, chunking, preemption
    warmup: Literal["none", "minimal", "full"] = "minimal"
    compile_cache_dir: str | None = None  # None: the user's cache directory; "": no cache
    trace_events: str = ""  # file for a timeline of the engine, for ui.perfetto.dev; "": none
    seed: int = 0

    def __post_init__(self) -> None:
        def check(ok: bool, field: str, allowed: str) -> None:
            _require(ok, ConfigError, field, getattr(self, field), allowed)

        check(isinstance(self.model, str) and self.model != "", "model", "a path or 'demo'")
        choices: dict[str, tuple[str, ...]] = {
            "load_format": ("auto", "safetensors", "gguf", "orbax", "dummy"),
            "dtype": ("auto", "bfloat16", "float32"),
            "kv_dtype": ("auto", "bfloat16", "float32"),
            "policy": ("fair", "fcfs", "fcfs_swap", "priority"),
            "platform": ("auto", "cpu", "cuda"),
            "attention": ("auto", "ffi", "reference"),
            "matmul": ("auto", "ffi", "xla"),
            "warmup": ("none", "minimal", "full"),
            "lend": ("off", "auto"),
        }
        for field, values in choices.items():
            check(getattr(self, field) in values, field, "one of " + ", ".join(values))
        for field in ("page_tokens", "max_num_seqs", "tensor_parallel"):
            value = getattr(self, field)
            check(_is_int(value) and value > 0, field, "an integer > 0")
        optional = (
            "kv_cache_memory", "kv_cache_tokens", "max_model_len", "max_step_tokens",
            "max_chunk_tokens", "slice_steps", "peer_kv_memory", "lend_kv_memory",
        )
        for field in optional:
            value = getattr(self, field)
            check(value is None or (_is_int(value) and value > 0), field, "an integer > 0 or null")
        check(
            self.page_tokens & (self.page_tokens - 1) == 0 and self.page_tokens <= 1024,
            "page_tokens", "a power of two from 1 to 1024",
        )
        check(
            self.step_tokens >= self.max_num_seqs, "max_step_tokens",
            f"at least max_num_seqs ({self.max_num_seqs}), so that every decode fits a step",
        )
        check(_is_int(self.seed), "seed", "an integer")
        fraction = self.device_memory_fraction
        check(
            fraction is None or (_is_number(fraction) and 0.05 <= fraction <= 0.98),
            "device_memory_fraction", "a number from 0.05 to 0.98, or null",
        )
        check(
            _is_number(self.tbt_slo_ms) and self.tbt_slo_ms >= 0, "tbt_slo_ms",
            "milliseconds, a number >= 0",
        )
        check(
            _is_number(self.switch_share) and 0 < self.switch_share <= 1, "switch_share",
            "a number above 0 and at most 1, which bounds nothing",
        )
        weights = self.user_weights
        check(
            isinstance(weights, Mapping) and all(
                isinstance(user, str) and user != "" and _is_number(weight) and weight > 0
                for user, weight in weights.items()
            ), "user_weights", "users' names, not empty, with finite numbers > 0",
        )
        check(
            not weights or self.policy == "fair", "user_weights",
            f"empty with policy {self.policy}, which doesn't weigh users; weights with fair",
        )
        for field in ("prefix_caching", "deterministic", "verify_pages"):
            check(isinstance(getattr(self, field), bool), field, "true or false")
        check(isinstance(self.trace_events, str), "trace_events", "a file's path, or empty")
        host = self.host_kv_memory
        check(
            host is None or (_is_int(host) and host >= 0), "host_kv_memory",
            "bytes, an integer >= 0, or null",
        )
        check(
            not host or self.swaps, "host_kv_memory",
            f"0 or null with policy {self.policy}, which recomputes; bytes with "
            + ", ".join(SWAPPING),
        )
        check(
            isinstance(self.peer, str), "peer",
            "a socket of a lender or a coordinator, cuda:N, or empty",
        )
        one = "one socket or cuda:N" if self.tensor_parallel == 1 else (
            f"one socket or cuda:N for all devices, or {self.tensor_parallel} with commas between, "
            f"one for each device of tensor_parallel={self.tensor_parallel}"
        )
        check(
            not self.peer
            or (len(self.peers) in (1, self.tensor_parallel) and all(self.peers)), "peer", one,
        )
        check(
            not self.peer or self.swaps, "peer",
            f"empty with policy {self.policy}, which recomputes; a lender's socket with "
            + ", ".join(SWAPPING),
        )
        check(
            self.peer_kv_memory is None or self.peer != "", "peer_kv_memory",
            "null without a peer to borrow of",
        )
        self._check_lending()

    def _check_lending(self) -> None:
        def check(ok: bool, field: str, allowed: str) -> None:
            _require(ok, ConfigError, field, getattr(self, field), allowed)

        lends = self.lend != "off"
        check(isinstance(self.coordinator, str), "coordinator", "a coordinator's socket, or empty")
        check(
            bool(self.coordinator) == lends, "coordinator",
            "the socket of a coordinator (aqua-jax coordinator) with lend" if lends
            else "empty without lend",
        )
        check(lends or self.lend_kv_memory is None, "lend_kv_memory", "null without lend")
        for field, high in (("lend_reserve", 1.0), ("lend_hold_s", 1e6), ("lend_deadline_s", 1e6)):
            value = getattr(self, field)
            check(_is_number(value) and 0 <= value <= high, field, f"a number from 0 to {high:g}")
        cap = self.lend_bandwidth
        check(_is_int(cap) and cap >= 0, "lend_bandwidth", "bytes a second, an integer >= 0")

    @property
    def peers(self) -> tuple[str, ...]:
        """The entries of `peer`: none, one, or one for each device."""
        return tuple(self.peer.split(",")) if self.peer else ()

    @property
    def swaps(self) -> bool:
        """Whether pages of whoever gives way are kept in memory off the device."""
        return self.policy in SWAPPING

    @property
    def step_tokens(self) -> int:
        """Most tokens in one step, defaults resolved."""
        if self.max_step_tokens is not None:
            return self.max_step_tokens
        return max(256 if self.deterministic else 1024, self.max_num_seqs)
