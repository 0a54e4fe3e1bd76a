"""Finds and reads the tokenizer of a Hugging Face directory or a GGUF file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from aqua_jax.errors import ConfigError, ModelLoadError
from aqua_jax.loading import files, sentencepiece
from aqua_jax.loading.gguf_tokenizer import tokenizer_from_gguf
from aqua_jax.loading.tokenizer import (
    TOKENIZER_LIMIT,
    FastTokenizer,
    NoTokenizer,
    special_text,
)

_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "chat_template.jinja", "chat_template.json",
)
_SPECIAL_KEYS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")


def _chat_template(path: str, settings: Mapping[str, Any]) -> str | None:
    """chat_template.jinja, else tokenizer_config.json's entry (text, or the one named default)."""
    jinja = os.path.join(path, "chat_template.jinja")
    if os.path.lexists(jinja):
        return files.read_bytes(jinja, files.JSON_LIMIT).decode("utf-8", errors="replace")
    value = settings.get("chat_template")
    if value is None:
        value = files.read_optional_json(os.path.join(path, "chat_template.json")).get(
            "chat_template"
        )
    if isinstance(value, list):
        named = {
            entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)
        }
        value = named.get("default")
    return value if isinstance(value, str) else None


def _from_directory(path: str) -> FastTokenizer:
    settings = files.read_optional_json(os.path.join(path, "tokenizer_config.json"))
    fast = os.path.join(path, "tokenizer.json")
    if os.path.lexists(fast):
        import tokenizers

        content = files.read_bytes(fast, TOKENIZER_LIMIT)
        try:
            backend = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the binding raises bare Exception
            raise ModelLoadError(f"{fast}: {error}") from error
    else:
        backend = sentencepiece.read(os.path.join(path, "tokenizer.model"), settings)
    special = {
        key: text for key in _SPECIAL_KEYS if (text := special_text(settings.get(key))) is not None
    }
    for key, value in files.read_optional_json(
        os.path.join(path, "special_tokens_map.json")
    ).items():
        text = special_text(value)
        if key in _SPECIAL_KEYS and text is not None:
            special.setdefault(key, text)
    bos, eos = (
        backend.token_to_id(special[key]) if key in special else None
        for key in ("bos_token", "eos_token")
    )
    return FastTokenizer(
        backend,
        bos_token_id=bos,
        eos_token_ids=() if eos is None else (eos,),
        chat_template=_chat_template(path, settings),
        special=special,
    )


def load_tokenizer(
    path: str, *, missing_ok: bool = False, name: str | None = None
) -> FastTokenizer | NoTokenizer:
    """The tokenizer of a directory or a .gguf file.

    Args:
      path: a directory with tokenizer.json (or tokenizer.model), or a .gguf file.
      missing_ok: whether a directory or file without a tokenizer gives a `NoTokenizer`.
      name: of the model, for error messages.

    Raises:
      ConfigError: `path` doesn't exist.
      ModelLoadError: no tokenizer there (unless `missing_ok`), or a broken one.
    """
    if not os.path.exists(path):
        raise ConfigError("tokenizer", path, "an existing directory or .gguf file")
    if os.path.isfile(path):
        found = tokenizer_from_gguf(path)
        if found is not None:
            return found
    elif any(
        os.path.lexists(os.path.join(path, file)) for file in ("tokenizer.json", "tokenizer.model")
    ):
        return _from_directory(path)
    if missing_ok:
        return NoTokenizer(name or os.path.basename(os.path.abspath(path)))
    raise ModelLoadError(f"{path}: no tokenizer.json or tokenizer.model")


def tokenizer_files(path: str) -> dict[str, bytes]:
    """Contents by name of the files that give another directory the tokenizer of `path`.

    A directory's are copied as they are; a .gguf file's tokenizer and chat template are written as
    tokenizer.json and what belongs to it. Empty when there is no tokenizer.

    Raises:
      ConfigError: `path` doesn't exist.
      ModelLoadError: unreadable files, or a broken tokenizer.
    """
    tokenizer = load_tokenizer(path, missing_ok=True)
    if isinstance(tokenizer, NoTokenizer):
        return {}
    if os.path.isfile(path):
        return tokenizer.files()
    return {
        name: files.read_bytes(os.path.join(path, name), TOKENIZER_LIMIT)
        for name in _FILES if os.path.lexists(os.path.join(path, name))
    }
