"""Small tokenizers for tests, made on the spot: byte-level BPE and sentencepiece-like."""

from __future__ import annotations

import json
import pathlib
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

CORPUS = [
    "The quick brown fox jumps over the lazy dog, 1234567 times.",
    "def main():\n    return [x ** 2 for x in range(10)]\n",
    "Größe, naïve, café, crème brûlée; 漢字かな交じり文; привет, мир; 🙂👍🏽",
    "I'm sure we'll say that they've said it's what she'd do.",
] * 4

TEXTS = [
    "", " ", "a", "Hello, world!", "The quick brown fox", "  leading and trailing  ",
    "tabs\tand\nnewlines\r\n\n\n  mixed \n", "1234567890 3.14 1,000 0x1F a1b22c333",
    "café naïve Größe", "漢字かな交じり文", "привет, мир", "🙂👍🏽👨‍👩‍👧‍👦",
    "I'm we'll DON'T they'VE",
    "def f(x):\n    if x:\n\treturn {'a': [1, 2]}  # ok\n", "<|end|>", "a<|end|>b <|user|>\nhi",
    "\u200b\u00a0\ufeff", "e\u0301 \u00e9", "x" * 300, "\x00\x01\x7f", "½ ² ١٢٣", "ℌ𝕖𝕝𝕝𝕠",
]  # fmt: skip


def byte_level(special: tuple[str, ...] = ("<|end|>", "<|user|>")) -> Tokenizer:
    """A trained byte-level BPE tokenizer of about 400 tokens with two special ones."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(special), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    return tokenizer


def with_bos(tokenizer: Tokenizer, token: str) -> Tokenizer:
    """Adds a post-processor that puts `token` before every text."""
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{token}:0 $A:0", special_tokens=[(token, tokenizer.token_to_id(token))]
    )
    return tokenizer


def write_tokenizer(path: pathlib.Path, tokenizer: Tokenizer, **settings: Any) -> pathlib.Path:
    """tokenizer.json, and tokenizer_config.json with `settings`."""
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **settings}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


def sentencepiece_pieces() -> list[tuple[str, float, int]]:
    """(piece, score, type) of a small sentencepiece BPE vocabulary: types as in GGUF."""
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    pieces += [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
    words = [
        "▁t", "he", "▁the", "in", "er", "▁a", "ll", "▁he", "▁hello", "llo", "▁w", "or", "ld",
        "▁world", "▁▁", "▁▁▁▁", "qu", "ck", "▁qu",
    ]  # fmt: skip
    pieces += [(word, -float(rank), 1) for rank, word in enumerate(words)]
    letters = dict.fromkeys("▁etaoinshrdlucmfwygpbvkxqjzé.,!")
    return pieces + [(letter, -1000.0 - rank, 1) for rank, letter in enumerate(letters)]
