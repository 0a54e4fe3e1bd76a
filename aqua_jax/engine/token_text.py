"""Token ids to settled text, one at a time: what `tokenizer.decode` says of all of them, in pieces.

Byte-level BPE splits characters between tokens: bytes are held until they are a character.
Sentencepiece's byte fallback is decided by the whole run of byte tokens (valid UTF-8 as a whole, or
one U+FFFD for each byte), so a run is held until it ends. The space that sentencepiece puts before
the first word is stripped as the tokenizer strips it.
"""

from __future__ import annotations

import codecs
import dataclasses
import functools
import re
import weakref
from collections.abc import Sequence
from typing import Any, Protocol

REPLACEMENT = "\ufffd"

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_PROBED_IDS = 512  # ids looked at to see whether a tokenizer's tokens stand for fixed bytes


class TextDecoder(Protocol):
    """Token ids in, settled text out."""

    def push(self, token_id: int) -> str:
        """Text that became certain with this token: often its own, sometimes none."""
        ...

    def flush(self) -> str:
        """What is left, no token following."""
        ...


@dataclasses.dataclass(frozen=True)
class _Piece:
    """What one token adds."""

    data: bytes
    fallback: bool  # one byte of sentencepiece's byte fallback
    skipped: bool  # special, not shown


_NOTHING = _Piece(b"", False, True)


class PieceTable:
    """The pieces of one tokenizer's tokens, looked up once each."""

    def __init__(self, tokenizer: Any, skip_special: bool):
        # The tokenizer owns its tables (see `_tables`); holding it here would keep it alive.
        self._tokenizer = weakref.ref(tokenizer)
        self._skip_special = skip_special
        self._pieces: dict[int, _Piece] = {}

    def __getitem__(self, token_id: int) -> _Piece:
        piece = self._pieces.get(token_id)
        if piece is None:
            piece = self._pieces[token_id] = self._look_up(token_id)
        return piece

    def _look_up(self, token_id: int) -> _Piece:
        tokenizer = self._tokenizer()
        if tokenizer is None:
            raise ReferenceError("the tokenizer is gone")
        if tokenizer.is_special(token_id):
            if self._skip_special:
                return _NOTHING
            return _Piece(tokenizer.token_text(token_id).encode(), False, False)
        data = tokenizer.token_bytes(token_id)
        if data is None:  # outside the vocabulary
            return _NOTHING
        text = tokenizer.token_text(token_id)
        return _Piece(data, len(data) == 1 and bool(_BYTE_TOKEN.fullmatch(text)), False)


class BytesDecoder:
    """For tokenizers whose tokens stand for fixed bytes; under a microsecond a token."""

    def __init__(self, tokenizer: Any, table: PieceTable, skip_special: bool):
        self._tokenizer, self._table, self._skip_special = tokenizer, table, skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._run = bytearray()  # of byte fallback tokens
        self._head: list[int] | None = []  # ids until the first text is settled, then None

    def push(self, token_id: int) -> str:
        """See `TextDecoder.push`."""
        if self._head is not None:
            self._head.append(token_id)
        piece = self._table[token_id]
        if piece.skipped:
            return ""
        if piece.fallback:
            self._run += piece.data
            return ""
        text = self._end_run() + self._utf8.decode(piece.data)
        return self._strip_start(text) if self._head is not None else text

    def flush(self) -> str:
        """See `TextDecoder.flush`."""
        text = self._utf8.decode(b"", final=True) + self._end_run()
        return self._strip_start(text) if self._head is not None else text

    def _end_run(self) -> str:
        if not self._run:
            return ""
        data, self._run = bytes(self._run), bytearray()
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return REPLACEMENT * len(data)

    def _strip_start(self, text: str) -> str:
        """Drops of the first text what the tokenizer drops: some strip its leading space."""
        if not text or self._head is None:
            return text
        spaces = len(text) - len(text.lstrip(" "))
        if spaces:
            # An unfinished character, held here, is a trailing U+FFFD there: no harm.
            whole = self._tokenizer.decode(self._head, self._skip_special)
            text = text[max(spaces - (len(whole) - len(whole.lstrip(" "))), 0) :]
        self._head = None
        return text


class WindowDecoder:
    """For any other tokenizer: decodes a short window of tokens twice and takes the difference.

    The method is that of text-generation-inference and vLLM. A window that ends in U+FFFD waits
    for more, up to `_PATIENCE` tokens: then those bytes are no beginning of a character.
    """

    _PATIENCE = 8

    def __init__(self, tokenizer: Any, skip_special: bool):
        self._tokenizer, self._skip_special = tokenizer, skip_special
        self._before: list[int] = []  # shown, kept as context for spaces between words
        self._after: list[int] = []  # not shown yet

    def push(self, token_id: int) -> str:
        """See `TextDecoder.push`."""
        if self._skip_special and self._tokenizer.is_special(token_id):
            return ""
        self._after.append(token_id)
        return self._take(patient=len(self._after) < self._PATIENCE)

    def flush(self) -> str:
        """See `TextDecoder.flush`."""
        return self._take(patient=False)

    def _take(self, patient: bool) -> str:
        whole = self._decode(self._before + self._after)
        if not self._after or (patient and whole.endswith(REPLACEMENT)):
            return ""
        text = whole[len(self._decode(self._before)) :]
        if text:
            self._before, self._after = self._after, []
        elif not patient:
            self._after = []  # they say nothing, such as ids outside the vocabulary
        return text

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(ids, self._skip_special)) if ids else ""


_tables: weakref.WeakKeyDictionary[Any, dict[bool, PieceTable]] = weakref.WeakKeyDictionary()


def make_decoder(tokenizer: Any, skip_special: bool) -> TextDecoder:
    """A decoder for one sample's tokens.

    Args:
      tokenizer: see `aqua_jax.loading.Tokenizer`.
      skip_special: leave special tokens out, as `tokenizer.decode(..., skip_special=True)` does.
    """
    if not _has_bytes(tokenizer):
        return WindowDecoder(tokenizer, skip_special)
    tables = _tables.setdefault(tokenizer, {})
    if skip_special not in tables:
        tables[skip_special] = PieceTable(tokenizer, skip_special)
    return BytesDecoder(tokenizer, tables[skip_special], skip_special)


@functools.lru_cache(maxsize=16)
def _bytes_known(tokenizer_ref: weakref.ref[Any]) -> bool:
    tokenizer: Any = tokenizer_ref()
    for token in range(_PROBED_IDS):
        if tokenizer.token_text(token) and not tokenizer.is_special(token):
            return tokenizer.token_bytes(token) is not None
    return False


def _has_bytes(tokenizer: Any) -> bool:
    """Whether ordinary tokens stand for fixed bytes (byte-level BPE, sentencepiece)."""
    return _bytes_known(weakref.ref(tokenizer))
