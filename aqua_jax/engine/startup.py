"""From a configuration to a running engine's parts: weights, KV pool, programs, scheduler.

What is sized here is sized once; every impossible combination is refused here with the field, the
value and what is allowed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterable
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from aqua_jax import loading
from aqua_jax.config import EngineConfig
from aqua_jax.engine import memory_plan, platform
from aqua_jax.engine.buckets import BucketTable
from aqua_jax.engine.lendable_pool import LendablePool
from aqua_jax.engine.lending import EngineLender
from aqua_jax.engine.pager import Pager
from aqua_jax.engine.programs import Programs, StepSpec
from aqua_jax.engine.request import Request, Sample
from aqua_jax.engine.runner import Runner
from aqua_jax.engine.tiers import Tiers, open_tiers
from aqua_jax.engine.trace_events import TraceEvents
from aqua_jax.errors import ConfigError
from aqua_jax.memory import arena
from aqua_jax.models.config import ModelConfig
from aqua_jax.models.parameters import abstract_decoder
from aqua_jax.ops import library
from aqua_jax.ops import linear as linear_op
from aqua_jax.ops.attention import no_kernel_for
from aqua_jax.ops.spaces import Space, Spaces
from aqua_jax.paging.moves import Store
from aqua_jax.paging.pages import FarthestNextUse, LeastRecentlyUsed, PagePool
from aqua_jax.paging.prefix import PrefixCache
from aqua_jax.paging.residency import Residency
from aqua_jax.parallel.shards import HEADS, PARTS, Shards, ask_for_cpu_devices
from aqua_jax.scheduling.cost import CostConfig, Costs
from aqua_jax.scheduling.fair import Fair, FairConfig
from aqua_jax.scheduling.policies import POLICIES, Policy
from aqua_jax.scheduling.scheduler import Scheduler, SchedulerConfig
from aqua_jax.scheduling.sequence import Sequence
from aqua_jax.scheduling.slices import SliceConfig

# Page moves that one step has room for: 56 bytes each in the step's vector, so that thousands more
# are handed over at once than would fit into the time of the step.
_MAX_MOVES = 1024
# Bytes a second that a page copy is taken to reach until one was timed: one core's memcpy, a slow
# link. A price that knew neither dropped what a run computed first instead of copying it.
_COPY_RATE = 4e9
_DEFAULT_POOL = 256 << 20  # bytes, where nothing says how much there is
_DTYPES = {"bfloat16": jnp.bfloat16, "float32": jnp.float32}


@dataclasses.dataclass(frozen=True)
class Parts:
    """What an engine is made of."""

    model_config: ModelConfig
    model_name: str
    tokenizer: Any | None
    eos_token_ids: tuple[int, ...]
    max_model_len: int
    pool: PagePool
    scheduler: Scheduler
    runner: Runner
    pager: Pager | None  # None: pages never move
    lender: EngineLender | None  # None: pages are never lent
    trace: TraceEvents | None
    memory: memory_plan.MemoryPlan
    implementations: dict[str, str]  # op -> implementation in use
    timings: dict[str, float]  # seconds by phase


def build(
    config: EngineConfig, lookup: Callable[[Sequence], tuple[Request, Sample]],
    live: Callable[[], Iterable[tuple[Request, Sample]]],
    progress: Callable[[int, int], None] | None = None,
) -> Parts:
    """Load, size and compile everything an engine needs.

    What it borrows of others is given back if it fails.

    Args:
      config: the engine's configuration.
      lookup: the request and sample of a sequence, for the runner.
      live: all samples of live requests, for what may be lent.
      progress: called with (done, total) programs while compiling.

    Raises:
      ConfigError: the configuration does not fit the model or the pool, or a lender.
      ModelLoadError: the model cannot be read.
    """
    with contextlib.ExitStack() as opened:
        parts = _build(config, lookup, live, progress, opened)
        opened.pop_all()
    return parts


def _build(
    config: EngineConfig, lookup: Callable[[Sequence], tuple[Request, Sample]],
    live: Callable[[], Iterable[tuple[Request, Sample]]],
    progress: Callable[[int, int], None] | None, opened: contextlib.ExitStack,
) -> Parts:
    timings: dict[str, float] = {}
    started = time.monotonic()
    ask_for_cpu_devices(config.tensor_parallel)
    platform.start(config)
    enable_compile_cache(config.compile_cache_dir)
    pack = _packs_weights(config)
    loaded = loading.load(
        config.model, load_format=config.load_format, dtype=config.dtype,
        tokenizer=config.tokenizer, transform=_pack_kernel if pack else None, seed=config.seed,
        tensor_parallel=config.tensor_parallel,
    )
    model, params, shards = loaded.config, dict(loaded.params), loaded.shards
    part = model if shards is None else shards.part  # what a device computes
    if pack and model.tied_embeddings:
        _pack_embedding(params, shards)
    timings["load_s"] = time.monotonic() - started

    dtype = jnp.dtype(loaded.dtype)
    kv_dtype = dtype if config.kv_dtype == "auto" else jnp.dtype(_DTYPES[config.kv_dtype])
    page_bytes = page_size(config, model, kv_dtype.itemsize)
    attention = _attention(config, part, kv_dtype)
    graphdef, _ = abstract_decoder(part, dtype)
    devices = jax.local_devices()[:1] if shards is None else shards.devices
    device = devices[0]  # the others have as much of everything
    memory = platform.device_memory(device)
    lies = None if shards is None else shards.sharding(HEADS)

    def shape(pages: int) -> tuple[int, ...]:
        heads = kv_heads(config, model)
        return (pages, model.num_layers, 2, config.page_tokens, heads, model.head_dim)

    def spec_for(pages: int, moves: bool) -> StepSpec:
        return _spec(config, model, pages, attention, pack, moves=moves)

    def probe(pages: int) -> Programs:
        kv = jax.ShapeDtypeStruct(shape(pages), kv_dtype, sharding=lies)
        found = Programs(graphdef, params, kv, spec_for(pages, config.swaps), shards=shards)
        found.warm_up("largest")
        return found

    sized = None
    if _fills_the_device(config, memory):
        guess = memory_plan.guessed_peak(model, config.step_tokens, config.max_num_seqs)
        sized = memory_plan.size_pool(memory, page_bytes // len(devices), guess, probe)
    num_pages = sized.pages if sized else pool_pages(config, model, kv_dtype.itemsize, memory)
    lent = None
    if config.lend != "off":
        lent = LendablePool(config, num_pages, page_bytes, attention)
        opened.callback(lent.close)
    own_pages = num_pages if lent is None else lent.split.reserve  # those of the array
    # Before the programs are compiled: a lender that can't be reached is known at once.
    tiers = open_tiers(
        config, attention, num_pages, page_bytes, None if lent is None else lent.client
    )
    opened.callback(tiers.close)
    spec = spec_for(own_pages, tiers.usable)

    # Before the pool takes its place: on a GPU the compiler needs memory to try products out.
    form = jax.ShapeDtypeStruct(shape(own_pages), kv_dtype, sharding=lies)
    spaces = None if lent is None else _spaces(lent.space, form, shards)
    if sized and sized.programs.spec == spec and spaces is None:
        programs = sized.programs
    else:
        programs = Programs(graphdef, params, form, spec, spaces, shards)
    warmup_started = time.monotonic()
    programs.warm_up(config.warmup, progress)
    timings["warmup_s"] = time.monotonic() - warmup_started

    def make_kv() -> jax.Array:
        return jnp.zeros(form.shape, kv_dtype, device=lies)

    kv = make_kv()
    weights = memory_plan.bytes_on(params.values(), device)
    plan = memory_plan.MemoryPlan(
        library.platform(), device.device_kind, weights, num_pages * page_bytes // len(devices),
        memory_plan.peak_bytes(programs), max(0, memory.in_use - weights),
        memory_plan.margin_of(memory), memory,
        tuple(memory_plan.Share.of(device, params.values(), kv) for device in devices),
    )
    logging.info("%s", plan.table())
    max_model_len = spec.history_width
    evictable = FarthestNextUse() if tiers.usable else LeastRecentlyUsed()
    pool: PagePool
    lender = None
    if lent is None:
        pool = PagePool(num_pages, config.page_tokens, evictable)
    else:
        pool = lent.pages(config.page_tokens, evictable)
        lender = lent.lender(pool, live)
    scheduler = _scheduler(config, pool, max_model_len, tiers, spec.max_moves)
    trace = None
    if config.trace_events:
        stores = () if scheduler.residency is None else scheduler.residency.tiers
        trace = TraceEvents(config.trace_events, scheduler.pool, stores)
        opened.callback(trace.close)
    pager = None
    if scheduler.residency is not None:
        pager = Pager(
            scheduler.residency, tiers.stores, kv, borrowing=tiers.borrowing,
            verify=config.verify_pages, observe=scheduler.costs.observe_moves,
            ended=None if trace is None else trace.move_finished,
            delayed=scheduler.costs.delay_moves, spaces=spaces, devices=len(devices),
        )
        opened.callback(pager.close)
    runner = Runner(programs, params, make_kv, kv, spec, lookup, pager, spaces)
    timings["ready_s"] = time.monotonic() - started
    logging.info(
        "%s: %.1fM parameters %s, %d pages of %d tokens, ready in %.1f s",
        loaded.name, sum(p.size for p in params.values()) / 1e6, dtype.name, num_pages,
        config.page_tokens, timings["ready_s"],
    )
    tokenizer = None if isinstance(loaded.tokenizer, loading.NoTokenizer) else loaded.tokenizer
    implementations = {
        **library.implementations(), "attention": attention, "linear": "ffi" if pack else "xla",
        "moves": tiers.moves, "platform": plan.platform,
    }
    return Parts(
        model, loaded.name, tokenizer, tuple(loaded.eos_token_ids), max_model_len, scheduler.pool,
        scheduler, runner, pager, lender, trace, plan, implementations, timings,
    )


def _spaces(space: Space, kv: jax.ShapeDtypeStruct, shards: Shards | None) -> Spaces:
    """The pages behind the pool's, as each device sees its part of them."""
    if shards is None:
        return Spaces.behind(kv, space)
    part = jax.ShapeDtypeStruct((*kv.shape[:4], shards.part.num_kv_heads, kv.shape[5]), kv.dtype)
    found = Spaces.on_devices(part, shards.size, space)
    return jax.device_put(found, shards.sharding(PARTS))


def _spec(
    config: EngineConfig, model: ModelConfig, pages: int, attention: Literal["ffi", "reference"],
    pack: bool, *, moves: bool,
) -> StepSpec:
    """What shapes the programs, for a pool of so many pages."""
    max_model_len = model_length(config, model, pages * config.page_tokens)
    return StepSpec(
        sequences=config.max_num_seqs,
        table_width=-(-max_model_len // config.page_tokens),
        buckets=BucketTable.build(
            config.step_tokens, config.max_num_seqs, deterministic=config.deterministic,
            skips_padding=pack and attention == "ffi",
        ),
        history_width=max_model_len,
        deterministic=config.deterministic,
        counts_rows=pack or not config.deterministic,
        attention=attention,
        head_dim=model.head_dim,
        max_moves=min(_MAX_MOVES, 2 * pages) if moves else 0,
    )


def _scheduler(
    config: EngineConfig, pool: PagePool, max_model_len: int, tiers: Tiers, max_moves: int
) -> Scheduler:
    limits = SchedulerConfig(
        max_num_seqs=config.max_num_seqs, max_step_tokens=config.step_tokens,
        max_chunk_tokens=config.max_chunk_tokens, max_model_len=max_model_len,
        switch_share=config.switch_share,
    )
    prefix = PrefixCache(pool) if config.prefix_caching else None
    if not tiers.usable:
        return Scheduler(limits, _policy(config), pool, prefix)
    return Scheduler(
        dataclasses.replace(limits, max_moves=max_moves), _policy(config), pool, prefix,
        Residency(pool, cast(tuple[Store, ...], tiers.stores), verify=config.verify_pages),
        Costs(config.page_tokens, CostConfig(page_s=tiers.slot_bytes / _COPY_RATE)),
    )


def enable_compile_cache(directory: str | None) -> None:
    """Keep compiled programs on disk between runs.

    Args:
      directory: where; None: the user's cache directory, if it can be written; "": nowhere.

    Raises:
      ConfigError: the directory can't be made.
    """
    if directory == "":
        return
    path = directory
    if path is None:
        root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        path = os.path.join(root, "aqua_jax", "programs")
    try:
        if "://" not in path:  # jax takes storage elsewhere as well
            os.makedirs(path, exist_ok=True)
    except OSError as error:
        reason = error.strerror or str(error)
        if directory is not None:
            raise ConfigError(
                "compile_cache_dir", directory, f"a directory that can be made, or empty ({reason})"
            ) from None
        logging.info("compiled programs are not kept: %s: %s", path, reason)
        return
    jax.config.update("jax_compilation_cache_dir", path)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def kv_heads(config: EngineConfig, model: ModelConfig) -> int:
    """Heads of a page on all devices together: with fewer than devices, some have the same."""
    return max(model.num_kv_heads, config.tensor_parallel)


def page_size(config: EngineConfig, model: ModelConfig, itemsize: int) -> int:
    """Bytes of a page: keys and values of its tokens in all layers, on all devices together."""
    width = kv_heads(config, model) * model.head_dim
    return model.num_layers * 2 * width * itemsize * config.page_tokens


def _fills_the_device(config: EngineConfig, memory: platform.DeviceMemory) -> bool:
    """Whether the pool gets what is left of the device's memory."""
    given = config.kv_cache_memory is not None or config.kv_cache_tokens is not None
    return memory.available is not None and not given


def pool_pages(
    config: EngineConfig, model: ModelConfig, itemsize: int, memory: platform.DeviceMemory
) -> int:
    """Pages of a KV pool whose size was given, or is the default where nothing limits it.

    Raises:
      ConfigError: not even one page, or more than the device's, or else this machine's, memory.
    """
    page_bytes = page_size(config, model, itemsize)
    if config.kv_cache_tokens is not None:
        field, value = "kv_cache_tokens", config.kv_cache_tokens
        pages = value // config.page_tokens
        unit = f"{config.page_tokens} tokens"
    else:
        field, value = "kv_cache_memory", config.kv_cache_memory or _DEFAULT_POOL
        pages = value // page_bytes
        unit = f"{page_bytes} bytes"
    if pages < 1:
        raise ConfigError(field, value, f"at least one page: {unit} for this model")
    available = _available_memory()
    if memory.available is not None:
        available = memory.available * config.tensor_parallel
    if available is not None and pages * page_bytes > available:
        raise ConfigError(
            field, value, f"what fits into the {available} bytes of memory that are available "
            f"(a page of {config.page_tokens} tokens is {page_bytes} bytes)",
        )
    return pages


def _available_memory() -> int | None:
    """Bytes of host memory free for use, where the platform's devices use it and Linux tells."""
    return arena.available_memory() if jax.default_backend() == "cpu" else None


def model_length(config: EngineConfig, model: ModelConfig, pool_tokens: int) -> int:
    """Longest sequence in tokens: the model's context, the pool's size, or what was asked for.

    Raises:
      ConfigError: max_model_len is longer than the model or the pool allows.
    """
    scaling, trained = model.rope_scaling, model.max_position
    if scaling.kind in ("linear", "dynamic"):
        trained = int(trained * scaling.factor)
    elif scaling.kind == "yarn" and scaling.original_max_position:
        trained = max(trained, int(scaling.original_max_position * scaling.factor))
    if config.max_model_len is None:
        length = min(trained, pool_tokens)
        if length < trained:
            logging.info(
                "max_model_len is %d: the KV pool holds no more (the model allows %d)",
                length, trained,
            )
        return length
    if config.max_model_len > trained:
        raise ConfigError(
            "max_model_len", config.max_model_len, f"at most {trained}, the model's context"
        )
    if config.max_model_len > pool_tokens:
        raise ConfigError(
            "max_model_len", config.max_model_len,
            f"at most {pool_tokens}, the tokens the KV pool holds (see kv_cache_memory), without "
            "what may be lent (lend_kv_memory)",
        )
    return config.max_model_len


def _policy(config: EngineConfig) -> Policy:
    if config.policy != "fair":
        return POLICIES[config.policy]()
    slices = SliceConfig(
        slice_steps=config.slice_steps or "auto", tbt_slo_s=config.tbt_slo_ms / 1e3
    )
    return Fair(FairConfig(slices=slices, user_weights=config.user_weights))


def _attention(
    config: EngineConfig, model: ModelConfig, kv_dtype: Any
) -> Literal["ffi", "reference"]:
    """The implementation to use: heads that no kernel takes fall back, unless `ffi` is a must."""
    chosen = _choose("attention", config.attention, "aqua_attention", "reference")
    if chosen == "ffi" and (why := no_kernel_for(
        kv_dtype, model.num_heads, model.num_kv_heads, model.head_dim, config.page_tokens
    )):
        if config.attention == "ffi":
            raise ConfigError("attention", "ffi", f"reference or auto: {why}")
        logging.warning("attention falls back to the jnp reference, which is slow: %s", why)
        chosen = "reference"
    return "ffi" if chosen == "ffi" else "reference"


def _packs_weights(config: EngineConfig) -> bool:
    return _choose("matmul", config.matmul, "aqua_linear", "xla") == "ffi"


def _choose(field: str, wanted: str, target: str, fallback: str) -> str:
    """ "ffi" or the fallback; asking for "ffi" where it cannot run is an error."""
    usable = library.use(target)
    if wanted == "ffi" and not usable:
        why = library.reason() or f"the platform {library.platform()} has no {target}"
        raise ConfigError(field, "ffi", f"{fallback} or auto: {why}")
    return "ffi" if usable and wanted != fallback else fallback


def _pack(kernel: np.ndarray) -> np.ndarray:
    return linear_op.pack(kernel, kernel.dtype)


def _pack_kernel(name: str, array: np.ndarray) -> np.ndarray:
    return _pack(array) if name.endswith(".kernel") else array


def _pack_embedding(params: dict[str, jax.Array], shards: Shards | None) -> None:
    """Packs the transpose of a tied embedding, or of each device's part of it."""
    embedding = params["embed.embedding"]
    if shards is None:
        packed = jax.device_put(_pack(np.asarray(embedding).T))
    else:
        packed = shards.join([
            shards.place(_pack(np.asarray(part).T), rank)
            for rank, part in enumerate(shards.parts(embedding))
        ])
    params["embed.embedding"] = packed
