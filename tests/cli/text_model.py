"""A two-layer model with random weights, a real (byte-level) tokenizer and a chat template."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.tiny import write_config

ROOT = pathlib.Path(__file__).resolve().parents[2]
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ENGINE_FLAGS = (
    "--load_format=dummy", "--dtype=float32", "--kv_cache_tokens=4096", "--max_num_seqs=8",
    "--max_step_tokens=64", "--warmup=none",
)


def write_text_model(folder: pathlib.Path, **overrides: Any) -> pathlib.Path:
    """Writes config.json, tokenizer.json and tokenizer_config.json; returns the directory."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=["<|pad|>", "<|begin|>", "<|end|>"],
    )
    backend.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 4, trainer)
    write_config(folder, **{"vocab_size": 300, "max_position_embeddings": 2048, **overrides})
    (folder / "tokenizer.json").write_text(backend.to_str())
    settings = {"eos_token": "<|end|>", "bos_token": "<|begin|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def command(*arguments: str) -> list[str]:
    """The command line that runs aqua-jax in this Python."""
    return [sys.executable, "-m", "aqua_jax.cli.main", *arguments]


def run_command(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs aqua-jax to its end, output captured."""
    return subprocess.run(
        command(*arguments), cwd=ROOT, capture_output=True, text=True, timeout=240,
        env={**os.environ}, check=False, **options,
    )
