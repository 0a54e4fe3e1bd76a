"""Checkpoints, tokenizers and chat templates: from files on disk to flat JAX parameters.

`load` reads a model, `save` writes one; `load_tokenizer` reads a tokenizer alone. Importing this
package costs no jax, torch or transformers: they are imported by the functions that need them.
"""

from __future__ import annotations

from aqua_jax.loading.find_tokenizer import load_tokenizer
from aqua_jax.loading.load import LoadedModel, load
from aqua_jax.loading.resolve import ModelFiles, resolve
from aqua_jax.loading.save import save
from aqua_jax.loading.tokenizer import NoTokenizer, Tokenizer

__all__ = [
    "LoadedModel", "ModelFiles", "NoTokenizer", "Tokenizer", "load", "load_tokenizer", "resolve",
    "save",
]
