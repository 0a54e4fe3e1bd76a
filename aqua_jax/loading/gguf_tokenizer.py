"""Tokenizers from GGUF metadata: byte-level BPE (`gpt2`) and sentencepiece BPE (`llama`).

The file has the vocabulary, merges or scores, and the name of the pre-tokenizer; the regular
expressions behind the names are those of llama.cpp (src/llama-vocab.cpp), which took them from the
models' own tokenizer.json files.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

import numpy as np

from aqua_jax.errors import ModelLoadError
from aqua_jax.loading import gguf_format
from aqua_jax.loading.gguf_config import eos_ids, token_id
from aqua_jax.loading.tokenizer import FastTokenizer

if TYPE_CHECKING:
    import tokenizers

_LOG = logging.getLogger(__name__)
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # tokenizer.ggml.token_type
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3 = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# What tokenizer.ggml.pre may say: a pattern of its own, digits one by one and then GPT-2's
# pattern, or GPT-2's alone.
_PATTERNS = {
    "llama-bpe": _LLAMA3, "llama3": _LLAMA3, "llama-v3": _LLAMA3, "smaug-bpe": _LLAMA3,
    "dbrx": _LLAMA3, "qwen2": _QWEN2, "deepseek-r1-qwen": _QWEN2, "tekken": _TEKKEN,
}
_DIGITS_THEN_GPT2 = ("smollm", "starcoder", "refact", "command-r", "codeshell")
_GPT2 = ("default", "gpt-2", "gpt2", "phi-2", "jais", "olmo", "mpt", "roberta-bpe")
# A word that is a token as a whole is taken as it is, even if no merges lead there.
_WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "tekken")
_NORMALISED = ("qwen2", "deepseek-r1-qwen")  # Unicode NFC first
_BOS_BY_DEFAULT = ("llama-bpe", "llama3", "llama-v3", "tekken")


class _Metadata:
    """Typed access to `tokenizer.ggml.*`."""

    def __init__(self, path: str, metadata: dict[str, Any]):
        self.path, self.metadata = path, metadata

    def fail(self, key: str, why: str) -> ModelLoadError:
        return ModelLoadError(f"{self.path}: tokenizer.ggml.{key}: {why}")

    def get(self, key: str) -> Any:
        return self.metadata.get(f"tokenizer.ggml.{key}")

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key)
        return value if isinstance(value, bool) else default

    def strings(self, key: str) -> list[str]:
        value = self.get(key)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.fail(key, "allowed: an array of strings")
        return value

    def numbers(self, key: str, length: int) -> list[Any] | None:
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, np.ndarray) or value.shape != (length,):
            raise self.fail(key, f"allowed: an array of {length} numbers, one a token")
        return value.tolist()


def _pre_tokenizer(keys: _Metadata) -> Any:
    from tokenizers import Regex, pre_tokenizers

    name = keys.get("pre")
    if name is None:
        _LOG.warning("%s: no tokenizer.ggml.pre; splitting words as GPT-2 does", keys.path)
        name = "default"
    byte_level = pre_tokenizers.ByteLevel
    if name in _PATTERNS:
        split = pre_tokenizers.Split(Regex(_PATTERNS[name]), "isolated")
        return pre_tokenizers.Sequence([split, byte_level(False, use_regex=False)])
    if name in _DIGITS_THEN_GPT2:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(True), byte_level(False)])
    if name in _GPT2:
        return byte_level(False)
    known = ", ".join([*_PATTERNS, *_DIGITS_THEN_GPT2, *_GPT2])
    raise keys.fail("pre", f"got {name!r}; allowed: {known}")


def _byte_level(keys: _Metadata, vocab: dict[str, int]) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers

    merges = []
    for merge in keys.strings("merges"):
        left, _, right = merge.partition(" ")
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise keys.fail("merges", f"{merge!r} does not join two tokens into a third")
        merges.append((left, right))
    pre = keys.get("pre")
    backend = Tokenizer(models.BPE(vocab, merges, ignore_merges=pre in _WHOLE_WORDS))
    if pre in _NORMALISED:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = _pre_tokenizer(keys)
    backend.decoder = decoders.ByteLevel()
    return backend


def _merges_by_score(vocab: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Every way to join two tokens into a third, best score of the result first.

    Sentencepiece's BPE takes the adjacent pair whose joined piece scores best; `tokenizers` wants
    that order spelled out. As transformers' `SentencePieceExtractor`.
    """
    found: list[tuple[float, int, int, str, str]] = []
    for token, index in vocab.items():
        for cut in range(1, len(token)):
            left, right = vocab.get(token[:cut]), vocab.get(token[cut:])
            if left is not None and right is not None:
                found.append((-scores[index], left, right, token[:cut], token[cut:]))
    found.sort()
    return [(left, right) for _, _, _, left, right in found]


def _sentencepiece(
    keys: _Metadata, vocab: dict[str, int], kinds: list[int] | None
) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = keys.numbers("scores", len(vocab))
    if scores is None:
        raise keys.fail("scores", "missing")
    unknown = token_id(keys.metadata, "unknown")
    if unknown is None and kinds and _UNKNOWN in kinds:
        unknown = kinds.index(_UNKNOWN)
    by_id: dict[int | None, str] = {index: token for token, index in vocab.items()}
    plain = {
        token: index for token, index in vocab.items()
        if kinds is None or kinds[index] not in (_CONTROL, _USER_DEFINED, _UNKNOWN)
    }
    backend = Tokenizer(
        models.BPE(
            vocab, _merges_by_score(plain, scores), unk_token=by_id.get(unknown),
            fuse_unk=True, byte_fallback="<0x00>" in vocab,
        )
    )
    prefix = keys.flag("add_space_prefix", True)
    steps = [normalizers.Prepend("▁")] if prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    undo = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(undo + ([decoders.Strip(" ", 1, 0)] if prefix else []))
    return backend


def _vocabulary(keys: _Metadata) -> dict[str, int]:
    tokens = keys.strings("tokens")
    vocab: dict[str, int] = {}
    for index, token in enumerate(tokens):
        # Broken converters pad with equal names; a vocabulary needs them distinct.
        vocab[token if token not in vocab else f"{token}\ufffd{index}"] = index
    return vocab


def _add_special(backend: tokenizers.Tokenizer, names: list[str], kinds: list[int] | None) -> None:
    from tokenizers import AddedToken

    for index, kind in enumerate(kinds or ()):
        if kind in (_CONTROL, _UNKNOWN) and names[index]:
            backend.add_special_tokens([AddedToken(names[index], special=True, normalized=False)])
        elif kind == _USER_DEFINED and names[index]:
            backend.add_tokens([AddedToken(names[index], special=False, normalized=False)])


def surround(backend: tokenizers.Tokenizer, bos: str | None, eos: str | None) -> None:
    """Makes `backend` put these tokens of its vocabulary before and after every text."""
    from tokenizers import processors

    template = [f"{bos}:0"] if bos is not None else []
    template += ["$A:0"] + ([f"{eos}:0"] if eos is not None else [])
    used = {token for token in (bos, eos) if token is not None}
    if used:
        backend.post_processor = processors.TemplateProcessing(
            single=template,
            special_tokens=[(token, backend.token_to_id(token)) for token in sorted(used)],
        )


def _surrounding(keys: _Metadata, names: list[str], which: str, default: bool) -> str | None:
    """The bos or eos token that the file wants added to texts, or None."""
    index = token_id(keys.metadata, which)
    if not keys.flag(f"add_{which}_token", default) or index is None:
        return None
    return names[index] if 0 <= index < len(names) else None


def build(path: str, metadata: dict[str, Any]) -> FastTokenizer | None:
    """A tokenizer from a file's metadata; None when it has none.

    Raises:
      ModelLoadError: inconsistent arrays, or a kind or pre-tokenizer that is not supported.
    """
    keys = _Metadata(path, metadata)
    model = keys.get("model")
    if model is None or model == "no_vocab":
        return None
    vocab = _vocabulary(keys)
    if not vocab:
        raise keys.fail("tokens", "empty")
    names = list(vocab)
    kinds = keys.numbers("token_type", len(names))
    try:
        if model == "gpt2":
            backend = _byte_level(keys, vocab)
        elif model == "llama":
            backend = _sentencepiece(keys, vocab, kinds)
        else:
            raise keys.fail("model", f"got {model!r}; allowed: gpt2, llama")
        _add_special(backend, names, kinds)
        default_bos = model == "llama" or keys.get("pre") in _BOS_BY_DEFAULT
        bos = _surrounding(keys, names, "bos", default_bos)
        surround(backend, bos, _surrounding(keys, names, "eos", False))
    except ModelLoadError:
        raise
    except Exception as error:  # the binding raises bare Exception
        raise keys.fail("tokens", f"cannot be built: {error}") from error
    special = {}
    for key, entry in (("bos", "bos_token"), ("eos", "eos_token"), ("unknown", "unk_token")):
        index = token_id(metadata, key)
        if index is not None and 0 <= index < len(names):
            special[entry] = names[index]
    template = metadata.get("tokenizer.chat_template")
    return FastTokenizer(
        backend,
        bos_token_id=token_id(metadata, "bos"),
        eos_token_ids=eos_ids(metadata),
        chat_template=template if isinstance(template, str) else None,
        special=special,
    )


def tokenizer_from_gguf(path: str) -> FastTokenizer | None:
    """The tokenizer in a .gguf file; None when it has none.

    Raises:
      ModelLoadError: a broken header or tokenizer.
    """
    fd, header = gguf_format.open_header(path)
    os.close(fd)
    return build(path, header.metadata)
