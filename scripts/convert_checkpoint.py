"""Converts a model to a directory with an Orbax checkpoint, which Flax code can read and train.

    python scripts/convert_checkpoint.py --model=SRC --output=DIR [--dtype=auto] [--tokenizer=PATH]

SRC is whatever `aqua-jax --model` takes. DIR must not exist or be empty; it gets config.json, the
parameters as one flat tree of dotted names (kernels `[in, out]`) in `params/`, and the tokenizer:
a directory's files as they are, a .gguf file's written as tokenizer.json and chat_template.jinja.
Quantised weights are dequantised. `aqua-jax generate --model=DIR` runs the result.
"""

from __future__ import annotations

import os
import sys

from absl import app, flags

from aqua_jax.errors import AquaError
from aqua_jax.loading import files, load, resolve, save
from aqua_jax.loading.find_tokenizer import tokenizer_files

_MODEL = flags.DEFINE_string("model", None, "Hugging Face directory, .gguf file, or demo.")
_OUTPUT = flags.DEFINE_string("output", None, "Directory to write.")
_DTYPE = flags.DEFINE_enum(
    "dtype", "auto", ["auto", "bfloat16", "float32"],
    "Type of matrices; auto: float32 where they are stored in 32 bits, else bfloat16.",
)
_TOKENIZER = flags.DEFINE_string(
    "tokenizer", None, "Directory or .gguf file to take the tokenizer from instead."
)
_GENERATION = "generation_config.json"


def convert(model: str, output: str, dtype: str, tokenizer: str | None) -> int:
    """Writes `output`; returns the bytes of its parameters.

    Raises:
      AquaError: as `load` and `save`.
      OSError: as `save`.
    """
    found = resolve(model)
    extra = tokenizer_files(found.path if tokenizer is None else resolve(tokenizer).path)
    generation = os.path.join(found.path, _GENERATION)
    if os.path.isfile(generation):
        extra[_GENERATION] = files.read_bytes(generation, files.JSON_LIMIT)
    loaded = load(model, dtype=dtype, tokenizer=tokenizer)
    save(output, loaded.config, loaded.params, extra)
    return sum(value.nbytes for value in loaded.params.values())


def main(argv: list[str]) -> None:
    """Converts, and says what was written; errors go to standard error."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    try:
        size = convert(_MODEL.value, _OUTPUT.value, _DTYPE.value, _TOKENIZER.value)
    except (AquaError, OSError) as error:
        sys.exit(f"convert_checkpoint: {error}")
    print(f"{_OUTPUT.value}: {size / 1e6:.1f} MB of parameters")


if __name__ == "__main__":
    flags.mark_flags_as_required(["model", "output"])
    app.run(main)
