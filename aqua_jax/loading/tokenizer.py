"""Tokenizers: text to ids and back, and chat templates.

Built on the bare `tokenizers` package, whose import takes 0.03 s where transformers' takes 1 s and
its tokenizer classes more.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from aqua_jax.errors import RequestError
from aqua_jax.loading.chat_template import ChatTemplate

if TYPE_CHECKING:
    import tokenizers

_LONG_TEXT = 2000  # characters
TOKENIZER_LIMIT = 512 << 20  # bytes of tokenizer.json; 34 MB is the largest seen


class Tokenizer(Protocol):
    """Text to token ids and back. Thread-safe: nothing is changed after construction."""

    eos_token_ids: tuple[int, ...]  # of the tokenizer's own settings
    bos_token_id: int | None
    vocab_size: int  # ids are below it; a model's embedding may have more rows

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Ids of `text`; special tokens written in it are recognised.

        Args:
          text: any text without lone surrogates.
          add_special: whether to add what the tokenizer puts around a text (such as bos).

        Raises:
          RequestError: not text, or this model has no tokenizer.
        """
        ...

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of `ids`; bytes that are not (yet) UTF-8 become U+FFFD, unknown ids nothing."""
        ...

    def token_bytes(self, token: int) -> bytes | None:
        """The bytes that an ordinary token stands for, before any stripping at the text's start.

        None for special tokens, ids outside the vocabulary, and tokenizers whose tokens have no
        fixed bytes.
        """
        ...

    def token_text(self, token: int) -> str:
        """The token as the vocabulary spells it ('Ġhello'); empty for unknown ids."""
        ...

    def is_special(self, token: int) -> bool:
        """Whether `decode` with `skip_special` leaves the token out."""
        ...

    def apply_chat_template(
        self, messages: Any, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """Prompt text of a conversation; encode it with `add_special=False`.

        Raises:
          RequestError: no chat template, or messages it refuses.
        """
        ...


class NoTokenizer:
    """Stands in for a missing tokenizer: token-id prompts work, text is refused."""

    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    vocab_size = 0

    def __init__(self, name: str):
        self.name = name

    def _refuse(self, field: str, value: Any) -> RequestError:
        return RequestError(
            field, value, f"prompt_token_ids only: model {self.name!r} has no tokenizer"
        )

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Raises RequestError."""
        raise self._refuse("prompt", text)

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Empty: there is no text."""
        return ""

    def token_bytes(self, token: int) -> bytes | None:
        """None: unknown."""
        return None

    def token_text(self, token: int) -> str:
        """Empty: unknown."""
        return ""

    def is_special(self, token: int) -> bool:
        """False: unknown."""
        return False

    def apply_chat_template(
        self, messages: Any, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """Raises RequestError."""
        raise self._refuse("messages", messages)


def _byte_alphabet() -> dict[str, int]:
    """Character -> byte of GPT-2's byte-level alphabet (openai/gpt-2 `bytes_to_unicode`)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    return table | {chr(256 + index): byte for index, byte in enumerate(others)}


_BYTES = _byte_alphabet()


def _decoder_kinds(backend: tokenizers.Tokenizer) -> list[dict[str, Any]]:
    """The decoder's steps, as tokenizer.json spells them."""
    decoder = backend.decoder
    if decoder is None:
        return []
    state = json.loads(decoder.__getstate__())
    return state["decoders"] if state.get("type") == "Sequence" else [state]


class FastTokenizer:
    """`Tokenizer` over a `tokenizers.Tokenizer`.

    Args:
      backend: never changed afterwards (truncation and padding are switched off here), so that
        calls from several threads are safe.
      bos_token_id: or None.
      eos_token_ids: may be empty.
      chat_template: Jinja text, or None; compiled at first use.
      special: named special tokens for the chat template.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_token_id: int | None = None,
        eos_token_ids: tuple[int, ...] = (),
        chat_template: str | None = None,
        special: Mapping[str, str] | None = None,
    ):
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.bos_token_id, self.eos_token_ids = bos_token_id, eos_token_ids
        self._added = {
            index: (token.content, token.special)
            for index, token in backend.get_added_tokens_decoder().items()
        }
        # get_vocab_size counts entries; ids may have holes, so the largest added id counts too.
        self.vocab_size = max(
            backend.get_vocab_size(with_added_tokens=False), 1 + max(self._added, default=-1)
        )
        steps = _decoder_kinds(backend)
        kinds = {step.get("type") for step in steps}
        self._byte_level = "ByteLevel" in kinds
        self._spaces = next(
            (step["pattern"]["String"] for step in steps
             if step.get("type") == "Replace" and step.get("content") == " "),
            next((step.get("replacement") for step in steps if step.get("type") == "Metaspace"),
                 None),
        )  # fmt: skip
        self._template_source, self._special = chat_template, dict(special or {})
        self._template: ChatTemplate | None = None
        self._lock = threading.Lock()

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Ids of `text`; see `Tokenizer.encode`."""
        if not isinstance(text, str):
            raise RequestError("prompt", text, "text")
        try:
            if len(text) > _LONG_TEXT:
                # Unlike `encode`, this lets other threads run: 0.4 s of them for 880 kB of text.
                return self.backend.encode_batch([text], add_special_tokens=add_special)[0].ids
            return self.backend.encode(text, add_special_tokens=add_special).ids
        except (TypeError, UnicodeEncodeError) as error:  # the binding's words for a bad string
            raise RequestError("prompt", text, "text without lone surrogates") from error

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of `ids`; see `Tokenizer.decode`."""
        known = [int(token) for token in ids if 0 <= token < 1 << 32]
        return self.backend.decode(known, skip_special_tokens=skip_special)

    def files(self) -> dict[str, bytes]:
        """Contents by name of the files from which `load_tokenizer` makes this tokenizer again.

        Ids that end a generation beside the one `eos_token` belong into config.json.
        """
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", **self._special}
        found = {
            "tokenizer.json": self.backend.to_str().encode(),
            "tokenizer_config.json": json.dumps(settings, indent=2).encode(),
        }
        if self._template_source is not None:
            found["chat_template.jinja"] = self._template_source.encode()
        return found

    def token_bytes(self, token: int) -> bytes | None:
        """The bytes of a token; see `Tokenizer.token_bytes`."""
        added = self._added.get(token)
        if added is not None:
            return None if added[1] else added[0].encode()
        text = self.token_text(token)
        if not text:
            return None
        if self._byte_level:
            try:
                return bytes(_BYTES[character] for character in text)
            except KeyError:
                return text.encode()
        if self._spaces is None:
            return None
        if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            try:
                return bytes([int(text[3:5], 16)])
            except ValueError:
                pass
        return text.replace(self._spaces, " ").encode()

    def token_text(self, token: int) -> str:
        """The vocabulary's spelling; see `Tokenizer.token_text`."""
        if not 0 <= token < 1 << 32:
            return ""
        return self.backend.id_to_token(token) or ""

    def is_special(self, token: int) -> bool:
        """Whether the token is an added special one."""
        added = self._added.get(token)
        return added is not None and added[1]

    def apply_chat_template(
        self, messages: Any, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """Prompt text of a conversation; see `Tokenizer.apply_chat_template`."""
        if self._template_source is None:
            raise RequestError("messages", messages, "a prompt: this model has no chat template")
        with self._lock:
            if self._template is None:
                self._template = ChatTemplate(self._template_source, self._special)
        return self._template.render(messages, add_generation_prompt, **variables)


def special_text(value: Any) -> str | None:
    """A special token in tokenizer_config.json: text, or an AddedToken object."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None
