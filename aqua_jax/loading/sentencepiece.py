"""Sentencepiece's tokenizer.model, for directories without a tokenizer.json (Llama 1 and 2).

Only what a BPE vocabulary needs is read from the protocol buffer (sentencepiece_model.proto):
pieces with score and type, the kind of model, and whether a space is put first. That is a page of
code, where the sentencepiece package and transformers' converter are two dependencies.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from aqua_jax.errors import ModelLoadError
from aqua_jax.loading import files
from aqua_jax.loading.tokenizer import TOKENIZER_LIMIT, special_text

if TYPE_CHECKING:
    import tokenizers

_BPE = 2  # TrainerSpec.ModelType
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3  # fields of ModelProto
_TRAINER_MODEL_TYPE, _NORMALIZER_DUMMY_PREFIX = 3, 3


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a number of more than 64 bits")


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, value) over one message: int, f32 or bytes by wire type."""
    at = 0
    value: Any
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == 0:
            value, at = _varint(data, at)
        elif kind == 2:
            size, at = _varint(data, at)
            value, at = data[at : at + size], at + size
        elif kind == 5:
            value, at = struct.unpack_from("<f", data, at)[0], at + 4
        elif kind == 1:
            value, at = data[at : at + 8], at + 8
        else:
            raise ValueError(f"wire type {kind}")
        if at > len(data):
            raise ValueError("the file ends inside a field")
        yield tag >> 3, value


def _bytes(value: Any) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a number where text or a message belongs")
    return value


def metadata(content: bytes, path: str) -> dict[str, Any]:
    """The model as GGUF metadata (`tokenizer.ggml.*`), for `gguf_tokenizer.build`.

    Args:
      content: of the tokenizer.model file.
      path: named in errors.

    Raises:
      ModelLoadError: not a sentencepiece model, or not a BPE one.
    """
    pieces: list[str] = []
    scores: list[float] = []
    kinds: list[int] = []
    model_type, dummy_prefix = 1, 1  # the format's defaults: unigram, with a space first
    try:
        for field, value in _fields(content):
            if field == _PIECES:
                piece = dict(_fields(_bytes(value)))
                pieces.append(_bytes(piece.get(1, b"")).decode("utf-8"))
                scores.append(float(piece.get(2, 0.0)))
                kind = piece.get(3, 1)
                if kind not in range(1, 7):
                    raise ValueError(f"piece type {kind!r}")
                kinds.append(kind)
            elif field == _TRAINER:
                model_type = dict(_fields(_bytes(value))).get(_TRAINER_MODEL_TYPE, model_type)
            elif field == _NORMALIZER:
                inner = dict(_fields(_bytes(value)))
                dummy_prefix = inner.get(_NORMALIZER_DUMMY_PREFIX, dummy_prefix)
    except (ValueError, IndexError, struct.error, TypeError, OverflowError) as error:
        raise ModelLoadError(f"{path}: not a sentencepiece model: {error}") from error
    if not pieces:
        raise ModelLoadError(f"{path}: not a sentencepiece model: it has no pieces")
    if model_type != _BPE:
        raise ModelLoadError(
            f"{path}: sentencepiece model type {model_type}; allowed: {_BPE} (BPE). Save the "
            "tokenizer as tokenizer.json (transformers: AutoTokenizer...save_pretrained)"
        )
    values = {
        "model": "llama", "tokens": pieces, "scores": np.array(scores, np.float32),
        "token_type": np.array(kinds, np.int32), "add_space_prefix": bool(dummy_prefix),
        "add_bos_token": False,
    }  # fmt: skip
    return {f"tokenizer.ggml.{key}": value for key, value in values.items()}


def read(path: str, settings: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """The tokenizer in a tokenizer.model file.

    Args:
      path: of the file.
      settings: tokenizer_config.json, for added tokens and whether bos and eos are put around a
        text (by default bos, as Llama's tokenizer class has it).

    Raises:
      ModelLoadError: not a sentencepiece BPE model.
    """
    from tokenizers import AddedToken

    from aqua_jax.loading import gguf_tokenizer

    content = files.read_bytes(path, TOKENIZER_LIMIT)
    built = gguf_tokenizer.build(path, metadata(content, path))
    assert built is not None  # the metadata names a model
    backend = built.backend
    added = settings.get("added_tokens_decoder")
    numbered = [
        (int(key), entry) for key, entry in (added if isinstance(added, Mapping) else {}).items()
        if str(key).isdecimal() and isinstance(entry, Mapping) and special_text(entry)
    ]
    for _, entry in sorted(numbered, key=lambda item: item[0]):
        special = bool(entry.get("special"))
        backend.add_tokens([AddedToken(entry["content"], special=special, normalized=False)])
    around: dict[str, str | None] = {}
    for key, usual, default in (("bos", "<s>", True), ("eos", "</s>", False)):
        token = special_text(settings.get(f"{key}_token")) or usual
        wanted = settings.get(f"add_{key}_token", default)
        around[key] = token if wanted and backend.token_to_id(token) is not None else None
    gguf_tokenizer.surround(backend, around["bos"], around["eos"])
    return backend
