"""Counters of one engine: what it did, where the host's time went, what it fell back to."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass
class EngineMetrics:
    """Totals since the engine started. Times in seconds."""

    requests_added: int = 0
    requests_finished: int = 0
    requests_aborted: int = 0
    requests_failed: int = 0
    steps: int = 0
    prompt_tokens: int = 0  # computed in prompt chunks (recomputation included)
    output_tokens: int = 0  # accepted
    discarded_tokens: int = 0  # sampled past a stop the host had not seen yet
    cached_tokens: int = 0  # prompt tokens found in the prefix cache
    preemptions: int = 0
    recomputed_tokens: int = 0  # tokens whose KV was dropped by preemption
    pool_resets: int = 0  # the device failed and every live request was recomputed
    host_s: float = 0.0  # planning, batch building, dispatch, outputs
    wait_s: float = 0.0  # the host waited for the device: the more, the less the host matters

    def as_dict(self) -> dict[str, Any]:
        """All counters by name, and the host's share of the time in steps."""
        result = dataclasses.asdict(self)
        total = self.host_s + self.wait_s
        result["host_share"] = self.host_s / total if total else 0.0
        return result
