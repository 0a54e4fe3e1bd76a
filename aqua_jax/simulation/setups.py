"""What is compared: a policy, its slices, the stores it may use, under one name.

A name is `POLICY[@STORE[+STORE]][/STEPS]`: `fcfs`, `fair@peer/10`. Without @ a policy uses every
store of the machine; `@none` takes them away, so that whoever gives way is recomputed. `vllm`,
`vtc` and `fcfs` have none unless told.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Mapping, Sequence

from aqua_jax.errors import ConfigError
from aqua_jax.paging.pages import FarthestNextUse, LeastRecentlyUsed, PagePool
from aqua_jax.paging.prefix import PrefixCache
from aqua_jax.paging.residency import Residency
from aqua_jax.scheduling.cost import CostConfig, Costs
from aqua_jax.scheduling.fair import Fair, FairConfig
from aqua_jax.scheduling.limits import SchedulerConfig
from aqua_jax.scheduling.policies import POLICIES, Policy
from aqua_jax.scheduling.scheduler import Scheduler
from aqua_jax.scheduling.slices import SliceConfig
from aqua_jax.simulation.aqua_reference import SLICE_STEPS, AquaReference
from aqua_jax.simulation.links import CopyQueue
from aqua_jax.simulation.machines import System
from aqua_jax.simulation.simulator import SchedulerLike
from aqua_jax.simulation.stores import SlotStore
from aqua_jax.simulation.vtc import VirtualTokenCounter

NAMES = (*POLICIES, "vllm", "vtc", "aqua_reference")
SLICED = ("fair", "aqua_reference")
WEIGHING = ("fair", "vtc")  # users
_RECOMPUTING = ("fcfs", "vllm", "vtc")
_UNGUARDED = ("vllm", "vtc")  # what they model has no thrash guard
_MAX_MOVES = 1024  # of a step, as the engine has them


@dataclasses.dataclass(frozen=True)
class Setup:
    """One contestant.

    Attributes:
      name: as it was written.
      policy: of `NAMES`.
      slice_steps: decode steps of a slice; None: the policy's default; 0: none.
      stores: names; None: the policy's default.
    """

    name: str
    policy: str
    slice_steps: int | None = None
    stores: tuple[str, ...] | None = None


def parse_setup(text: str) -> Setup:
    """Reads a name.

    Raises:
      ConfigError: it is none.
    """
    rest, slash, steps = text.partition("/")
    policy, at, stores = rest.partition("@")
    if policy not in NAMES:
        raise ConfigError("policies", text, "POLICY[@STORE][/STEPS], POLICY of " + ", ".join(NAMES))
    if slash and (policy not in SLICED or not steps.isdecimal()):
        raise ConfigError("policies", text, f"/STEPS, an integer, after {', '.join(SLICED)} only")
    wanted = () if stores == "none" else tuple(stores.split("+"))
    if len(set(wanted)) < len(wanted):
        raise ConfigError("policies", text, "each store once")
    return Setup(text, policy, int(steps) if slash else None, wanted if at else None)


def expand(names: Sequence[str], slices: Sequence[int]) -> list[Setup]:
    """Setups of these names; those with slices and no number of steps once for each of `slices`.

    Raises:
      ConfigError: a name is none, or there twice, or `slices` are given and none is of use.
    """
    found: list[Setup] = []
    used = False
    for name in names:
        one = parse_setup(name.strip())
        if slices and one.policy in SLICED and one.slice_steps is None:
            found += [parse_setup(f"{one.name}/{steps}") for steps in slices]
            used = True
        else:
            found.append(one)
    if len({one.name for one in found}) < len(found):
        raise ConfigError("policies", ",".join(names), "each once")
    if slices and not used:
        wanted = " or ".join(SLICED)
        raise ConfigError("slices", list(slices), f"only beside {wanted} without a number of steps")
    return found


@dataclasses.dataclass(frozen=True)
class Limits:
    """Of every contestant alike.

    Attributes:
      max_num_seqs, max_step_tokens, max_model_len: of `SchedulerConfig`.
      tbt_slo_s: of `SliceConfig`.
      prefix_caching: full pages are found by their content, as in the engine.
      user_weights: of `FairConfig`, and vtc's; the other policies don't weigh users.
    """

    max_num_seqs: int = 256
    max_step_tokens: int = 2048
    max_model_len: int = 4096
    tbt_slo_s: float = 0.0
    prefix_caching: bool = True
    user_weights: Mapping[str, float] = dataclasses.field(default_factory=dict)


def build(setup: Setup, system: System, limits: Limits) -> tuple[SchedulerLike, CopyQueue]:
    """A fresh scheduler and the copy queue that carries its moves.

    Raises:
      ConfigError: the machine has no such store, or a limit is out of range.
    """
    stores = setup.stores
    if stores is None and setup.policy in _RECOMPUTING:
        stores = ()
    system = system if stores is None else system.with_links(stores)
    evictable = FarthestNextUse() if system.links else LeastRecentlyUsed()  # as the engine
    pool = PagePool(system.num_pages, system.page_tokens, evictable)
    limited = min(limits.max_model_len, system.num_pages * system.page_tokens)
    queue = CopyQueue(system.links, system.page_tokens)
    if setup.policy == "aqua_reference":
        config = SchedulerConfig(limits.max_num_seqs, limits.max_step_tokens, limited)
        steps = SLICE_STEPS if setup.slice_steps is None else setup.slice_steps or sys.maxsize
        return AquaReference(config, pool, make_stores(system), steps), queue
    config = SchedulerConfig(
        limits.max_num_seqs, limits.max_step_tokens, limited, max_moves=_MAX_MOVES
    )
    if setup.policy in _UNGUARDED:
        config = dataclasses.replace(config, switch_share=1.0)
    if setup.policy == "vllm":
        config = dataclasses.replace(config, growth_tokens=0)
    stores_here = make_stores(system)
    residency = Residency(pool, stores_here) if stores_here else None
    page_s = system.page_bytes / system.links[0].bytes_per_s if system.links else 0.0
    costs = Costs(
        system.page_tokens, CostConfig(interference=system.interference, page_s=page_s)
    )
    policy = make_policy(setup, limits)
    prefix = PrefixCache(pool) if limits.prefix_caching else None
    return Scheduler(config, policy, pool, prefix, residency, costs), queue


def make_stores(system: System) -> list[SlotStore]:
    """The tiers of a machine, fastest first."""
    return [
        SlotStore(link.store, max(1, link.store_bytes // system.page_bytes), system.page_bytes)
        for link in system.links
    ]


def make_policy(setup: Setup, limits: Limits) -> Policy:
    """The policy of a setup."""
    makers: dict[str, Callable[[], Policy]] = {
        **POLICIES, "vllm": POLICIES["fcfs"],
        "vtc": lambda: VirtualTokenCounter(limits.user_weights),
    }
    if setup.policy != "fair":
        return makers[setup.policy]()
    steps: float | None = setup.slice_steps
    slices = SliceConfig(
        slice_steps="auto" if steps is None else steps or math.inf, tbt_slo_s=limits.tbt_slo_s
    )
    return Fair(FairConfig(slices=slices, user_weights=limits.user_weights))
