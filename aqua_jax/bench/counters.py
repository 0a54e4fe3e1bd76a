"""An engine's counters over one run: what rose, and what follows from it. No jax."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# What is reported of `Engine.stats()` as it is.
PLAIN = (
    "steps", "preemptions", "switches", "recomputed_tokens", "discarded_tokens", "host_s",
    "wait_s", "compiles_after_warmup", "pool_resets",
)
# Of its "paging"; names that it doesn't have are left out.
PAGING = (
    "bytes_out", "bytes_in", "wait_s", "tokens_out", "tokens_in", "tokens_revived", "tokens_held",
    "failed", "refused", "departures", "returns",
)


def stores(stats: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Tiers below the pool: {"capacity", "in_use", ...} in pages, by name."""
    paging = stats.get("paging") or {}
    return {one["name"]: one for one in paging.get("stores", ())}


def difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, float]:
    """What counters rose by; those of paging under their own names, its wait as paging_wait_s."""
    rose = {
        name: after[name] - before.get(name, 0) for name in PLAIN if name in after
    }
    was, now = before.get("paging") or {}, after.get("paging") or {}
    for name in PAGING:
        if name in now:
            rose["paging_wait_s" if name == "wait_s" else name] = now[name] - was.get(name, 0)
    return rose


def figures(rose: Mapping[str, float], total_s: float) -> dict[str, float]:
    """A run's counters for the report.

    Args:
      rose: of `difference`.
      total_s: how long the run took.

    Returns:
      The plain counters (the host's times as shares of the run). Where there are stores:
      paged_out_mib, paged_in_mib; paged_share: tokens copied over those that copying everything
      at each departure and return would have; out_kib_per_switch; paging_wait_s: the time steps
      waited for pages, and its share; revived_tokens: found in the pool on return; failed moves.
    """
    shown = {
        name: rose[name] for name in PLAIN if name in rose and name not in ("host_s", "wait_s")
    }
    if "host_s" in rose:
        shown["host_share"] = rose["host_s"] / max(total_s, 1e-9)
    if "bytes_out" not in rose:
        return shown
    shown["paged_out_mib"] = rose["bytes_out"] / 2**20
    shown["paged_in_mib"] = rose["bytes_in"] / 2**20
    if rose.get("tokens_held"):
        copied = rose["tokens_out"] + rose["tokens_in"]
        shown["paged_share"] = copied / rose["tokens_held"]
    if rose.get("departures"):
        shown["out_kib_per_switch"] = rose["bytes_out"] / 2**10 / rose["departures"]
        shown["out_tokens_per_switch"] = rose.get("tokens_out", 0) / rose["departures"]
    if "paging_wait_s" in rose:
        shown["paging_wait_s"] = rose["paging_wait_s"]
        shown["paging_wait_share"] = rose["paging_wait_s"] / max(total_s, 1e-9)
    for name, source in (("revived_tokens", "tokens_revived"), ("failed_moves", "failed")):
        if source in rose:
            shown[name] = rose[source]
    return shown
