"""aqua_jax: large language model inference on JAX/XLA.

The public names, imported on first use, so that `import aqua_jax` and the command line's help
don't pay for jax (0.8 s).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aqua_jax.config import EngineConfig, SamplingParams
    from aqua_jax.engine.async_engine import AsyncEngine
    from aqua_jax.engine.engine import Engine
    from aqua_jax.engine.outputs import (
        CompletionOutput,
        Logprob,
        RequestMetrics,
        RequestOutput,
    )
    from aqua_jax.errors import AquaError
    from aqua_jax.llm import LLM

__version__ = "0.1.0"

_HOMES = {
    "AquaError": "aqua_jax.errors",
    "AsyncEngine": "aqua_jax.engine.async_engine",
    "CompletionOutput": "aqua_jax.engine.outputs",
    "Engine": "aqua_jax.engine.engine",
    "EngineConfig": "aqua_jax.config",
    "LLM": "aqua_jax.llm",
    "Logprob": "aqua_jax.engine.outputs",
    "RequestMetrics": "aqua_jax.engine.outputs",
    "RequestOutput": "aqua_jax.engine.outputs",
    "SamplingParams": "aqua_jax.config",
}

__all__ = [
    "LLM",
    "AquaError",
    "AsyncEngine",
    "CompletionOutput",
    "Engine",
    "EngineConfig",
    "Logprob",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
    "__version__",
]


def __getattr__(name: str) -> Any:
    """Imports a public name from its home on first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'aqua_jax' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
