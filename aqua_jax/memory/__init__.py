"""Memory off the device: arenas, lending them to other processes, stores of pages over them.

`Aqua` keeps any JAX arrays there. Nothing else here imports jax: a lender starts in a tenth of a
second, and planning can be tested alone; so the names below are imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aqua_jax.memory.batch_lender import BatchLender
    from aqua_jax.memory.borrower import Borrower
    from aqua_jax.memory.informer import Informer, InformerConfig, Load
    from aqua_jax.memory.lender import Lender
    from aqua_jax.memory.policies import Dynamic, Policy, Static, TierView
    from aqua_jax.memory.tensor import Aqua, AquaTensor

_HOMES = {
    "Aqua": "tensor",
    "AquaTensor": "tensor",
    "BatchLender": "batch_lender",
    "Borrower": "borrower",
    "Dynamic": "policies",
    "Informer": "informer",
    "InformerConfig": "informer",
    "Lender": "lender",
    "Load": "informer",
    "Policy": "policies",
    "Static": "policies",
    "TierView": "policies",
}

__all__ = [
    "Aqua",
    "AquaTensor",
    "BatchLender",
    "Borrower",
    "Dynamic",
    "Informer",
    "InformerConfig",
    "Lender",
    "Load",
    "Policy",
    "Static",
    "TierView",
]


def __getattr__(name: str) -> Any:
    """Imports a public name from its home on first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'aqua_jax.memory' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(f"aqua_jax.memory.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
