"""Flax NNX models, usable on their own (`model(tokens) -> logits`) and by the engine.

Names are imported when first used, so that reading a `ModelConfig` (scheduler, simulator, loaders'
headers) doesn't start jax.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aqua_jax.models.config import ModelConfig, RopeScaling
    from aqua_jax.models.decoder import Decoder
    from aqua_jax.models.huggingface import config_from_hf

__all__ = ["Decoder", "ModelConfig", "RopeScaling", "config_from_hf"]

_HOMES = {
    "Decoder": "decoder",
    "ModelConfig": "config",
    "RopeScaling": "config",
    "config_from_hf": "huggingface",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
