"""What one load is run under: policies, slice lengths, and the two runs they are measured by.

The *floor* is the same arrivals with one token each and a pool that holds everything: no scheduler
can bring first tokens earlier. The *ideal* is a pool that holds everything and as many sequences at
a time as the constrained run had in the mean: its throughput is what is left when paging, switching
and recomputing cost nothing. No jax.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

from aqua_jax.bench.traces import TraceRequest
from aqua_jax.config import SWAPPING, EngineConfig

FLOOR, IDEAL = "floor", "ideal"
# Of a run that recomputes what gives way: it has no use for memory to keep pages in.
_NO_STORES = {"peer": "", "peer_kv_memory": None, "host_kv_memory": None}


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to run a load.

    Attributes:
      name: in reports and pictures.
      changes: fields of `EngineConfig` that differ.
      output: tokens of every answer; None: as the load says.
    """

    name: str
    changes: Mapping[str, Any]
    output: int | None = None

    def config(self, base: EngineConfig) -> EngineConfig:
        """The engine's configuration."""
        return dataclasses.replace(base, **self.changes)


def of_policies(policies: Sequence[str], slices: Sequence[int] = ()) -> list[Variant]:
    """A variant for each policy, and `fair` with each length of slices as "fair/5"."""
    found = []
    for policy in policies:
        changes: dict[str, Any] = {"policy": policy}
        if policy not in SWAPPING:
            changes |= _NO_STORES
        if policy != "fair":
            changes["user_weights"] = {}
        found.append(Variant(policy, changes))
    return found + [
        Variant(f"fair/{steps}", {"policy": "fair", "slice_steps": steps}) for steps in slices
    ]


def own_timeline(config: EngineConfig, *parts: str) -> EngineConfig:
    """The configuration with a timeline of its own, if there is one: out.json becomes
    out.fair-5.1.json, so that engines of one bench don't replace each other's."""
    if not config.trace_events:
        return config
    root, extension = os.path.splitext(config.trace_events)
    name = ".".join([root, *(part.replace("/", "-") for part in parts)]) + extension
    return dataclasses.replace(config, trace_events=name)


def unlimited_tokens(
    requests: Sequence[TraceRequest], config: EngineConfig, output: int | None = None
) -> int:
    """Tokens of a KV pool that never runs out under this load: in whole pages, for everything at
    once or for as many of the longest as run at a time, whichever is less."""
    pages = [
        -(-(one.prompt + (output or one.output)) // config.page_tokens) + 1 for one in requests
    ]
    return min(sum(pages), max(pages) * config.max_num_seqs) * config.page_tokens


def _unlimited(
    requests: Sequence[TraceRequest], config: EngineConfig, output: int | None
) -> dict[str, Any]:
    """Changes that take away the pressure: a pool for everything, so that nobody gives way."""
    return {
        "policy": "fcfs", **_NO_STORES, "user_weights": {},
        "kv_cache_tokens": unlimited_tokens(requests, config, output),
    }


def floor(requests: Sequence[TraceRequest], config: EngineConfig) -> Variant:
    """One token each, with room for all."""
    return Variant(FLOOR, _unlimited(requests, config, 1), output=1)


def ideal(requests: Sequence[TraceRequest], config: EngineConfig, resident: int) -> Variant:
    """Room for all, `resident` of them at a time."""
    changes = _unlimited(requests, config, None)
    return Variant(IDEAL, changes | {"max_num_seqs": max(1, resident)})
