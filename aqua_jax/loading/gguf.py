"""GGUF files as `Checkpoint`s: Hugging Face names, half-split rotary order, float32 rows.

`llama.cpp`'s converter interleaves the rows of q and k of the llama architecture (for its
interleaved rotary embedding); `read_rows` undoes that. Sources: convert_hf_to_gguf.py
(`LlamaModel.permute`) and the tensor names of the `gguf` package.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from typing import Any

import numpy as np

from aqua_jax.errors import DependencyError, ModelLoadError
from aqua_jax.loading import files, gguf_format
from aqua_jax.loading.checkpoint import TableOfContents

ARCHITECTURES = ("llama", "qwen2", "qwen3")
_TOP = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
}
_LAYER = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}
_F32, _F16, _F64, _BF16 = 0, 1, 28, 30  # GGMLQuantizationType
_DIRECT: dict[int, np.dtype] = {_F32: np.dtype("<f4"), _F16: np.dtype("<f2"), _F64: np.dtype("<f8")}
# Side data, not weights: llama3 rotary factors are read into the configuration.
SIDE_TENSORS = frozenset({"rope_freqs.weight"})


def hugging_face_name(name: str) -> str:
    """The Hugging Face name of a GGUF tensor; unknown names are returned as they are."""
    stem, _, kind = name.rpartition(".")
    if stem in _TOP:
        return f"{_TOP[stem]}.{kind}"
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    if match and match[2] in _LAYER:
        return f"model.layers.{match[1]}.{_LAYER[match[2]]}.{kind}"
    return name


def uniform(value: Any) -> Any:
    """A metadata value; an array (one entry a layer) of equal numbers is that number."""
    if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
        return value[0].item()
    return value


@dataclasses.dataclass(frozen=True)
class _Entry:
    shape: tuple[int, ...]
    type_id: int
    offset: int  # bytes from the start of the file
    row_bytes: int
    head_dim: int  # rows of one head to un-interleave; 0: rows are in order

    @property
    def dtype(self) -> np.dtype:
        """float16 and float64 as stored; float32 for everything else."""
        return _DIRECT.get(self.type_id, np.dtype(np.float32))


def _block_sizes(path: str, info: gguf_format.TensorInfo) -> tuple[int, int]:
    """(elements, bytes) of one block of the tensor's quantisation."""
    if info.type_id in _DIRECT:
        return 1, _DIRECT[info.type_id].itemsize
    gguf = import_gguf()
    try:
        kind = gguf.GGMLQuantizationType(info.type_id)
        elements, size = gguf.GGML_QUANT_SIZES[kind]
        gguf.quants.dequantize(np.zeros((1, size), np.uint8), kind)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise ModelLoadError(
            f"{path}: tensor {info.name!r}: quantisation {info.type_id} cannot be decoded: {error}"
        ) from error
    return elements, size


def import_gguf() -> Any:
    """The `gguf` package with its `quants` module, imported at first use (0.1 s).

    Raises:
      DependencyError: it is not installed.
    """
    try:
        import gguf
        import gguf.quants
    except ImportError as error:
        raise DependencyError("quantised GGUF files need: pip install gguf") from error
    return gguf


def _dequantize(raw: np.ndarray, type_id: int) -> np.ndarray:
    """Decodes whole blocks, u8 of any shape, into a flat float32 array.

    The package works on groups of 16 rows, 9 KiB of a 576-wide model: NumPy's call overhead then
    is half the time. Blocks are independent, so pieces of 128 Ki values are decoded instead.
    """
    gguf = import_gguf()
    kind = gguf.GGMLQuantizationType(type_id)
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = raw.reshape(-1, size)
    out = np.empty(len(blocks) * elements, np.float32)
    step = max(1, (1 << 17) // elements)
    for start in range(0, len(blocks), step):
        piece = blocks[start : start + step].reshape(1, -1)
        values = gguf.quants.dequantize(piece, kind)
        out[start * elements : (start + step) * elements] = values.reshape(-1)
    return out


class GGUFCheckpoint(TableOfContents[_Entry]):
    """`Checkpoint` over one .gguf file; `header` has its metadata.

    Raises:
      ModelLoadError: a broken header, an architecture or quantisation that is not supported, or a
        tensor that lies outside the file.
    """

    def __init__(self, path: str):
        self.path = path
        self._fd, self.header = gguf_format.open_header(path)
        try:
            self.architecture = self._architecture()
            self._entries = self._build_entries()
        except BaseException:
            self.close()
            raise

    def _architecture(self) -> str:
        metadata = self.header.metadata
        name = metadata.get("general.architecture")
        if name not in ARCHITECTURES:
            raise ModelLoadError(
                f"{self.path}: general.architecture: got {name!r}; "
                f"allowed: {', '.join(ARCHITECTURES)}"
            )
        if metadata.get("split.count", 1) not in (0, 1):
            raise ModelLoadError(
                f"{self.path}: one of {metadata['split.count']} parts: merge them first "
                "(llama-gguf-split --merge)"
            )
        return name

    def _heads(self, name: str) -> int:
        """Heads whose rows are interleaved in this tensor; 0 when its rows are in order."""
        if self.architecture != "llama":
            return 0
        match = re.fullmatch(r"blk\.\d+\.attn_([qk])\.(?:weight|bias)", name)
        if not match:
            return 0
        key = "head_count" if match[1] == "q" else "head_count_kv"
        attention = f"{self.architecture}.attention"
        metadata = self.header.metadata
        heads = uniform(metadata.get(f"{attention}.{key}", metadata.get(f"{attention}.head_count")))
        if not isinstance(heads, int) or heads <= 0:
            raise ModelLoadError(
                f"{self.path}: {attention}.{key}: got {heads!r}; allowed: an integer > 0"
            )
        return heads

    def _build_entries(self) -> dict[str, _Entry]:
        header, blocks = self.header, {}
        entries: dict[str, _Entry] = {}
        for info in header.tensors.values():
            if info.type_id not in blocks:
                blocks[info.type_id] = _block_sizes(self.path, info)
            elements, size = blocks[info.type_id]
            width = info.shape[-1] if info.shape else 1
            if width % elements:
                raise ModelLoadError(
                    f"{self.path}: tensor {info.name!r}: rows of {width} elements are not whole "
                    f"blocks of {elements}"
                )
            vector = len(info.shape) < 2 and elements == 1
            row_bytes = size if vector else width // elements * size
            rows = math.prod(info.shape) if vector else math.prod(info.shape[:-1])
            begin = header.data_offset + info.offset
            if begin + rows * row_bytes > header.file_size:
                raise ModelLoadError(
                    f"{self.path}: tensor {info.name!r} {info.shape} ends at byte "
                    f"{begin + rows * row_bytes}, the file at {header.file_size}"
                )
            heads = self._heads(info.name)
            if heads and (not info.shape or info.shape[0] % (2 * heads)):
                raise ModelLoadError(
                    f"{self.path}: tensor {info.name!r}: {info.shape} does not divide into "
                    f"{heads} heads of even size"
                )
            head_dim = info.shape[0] // heads if heads else 0
            name = hugging_face_name(info.name)
            entries[name] = _Entry(info.shape, info.type_id, begin, row_bytes, head_dim)
        return entries

    def names(self) -> list[str]:
        """Names of all tensors but `SIDE_TENSORS`, in file order."""
        return [name for name in self._entries if name not in SIDE_TENSORS]

    def is_full_precision(self, name: str) -> bool:
        """Whether stored as float32 or float64."""
        return self._find(name).type_id in (_F32, _F64)

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows `start:stop` (elements of a vector), dequantised and un-interleaved.

        Raises:
          ModelLoadError: unknown name or unreadable file.
        """
        entry = self._find(name)
        if not entry.head_dim:
            return self._stored_rows(entry, start, stop)
        # Stored row (head, i, j) is row (head, j, i), j in {0, 1}: decode whole heads.
        dim = entry.head_dim
        first, last = start // dim * dim, -(-stop // dim) * dim
        rows = self._stored_rows(entry, first, last)
        heads = rows.reshape((last - first) // dim, dim // 2, 2, *rows.shape[1:])
        rows = heads.swapaxes(1, 2).reshape(rows.shape)
        return rows[start - first : stop - first]

    def _stored_rows(self, entry: _Entry, start: int, stop: int) -> np.ndarray:
        """First-axis rows as the file has them."""
        inner = math.prod(entry.shape[1:-1])  # stored rows per first-axis row; 1 for matrices
        raw = np.empty(((stop - start) * inner, entry.row_bytes), np.uint8)
        files.read_into(self._fd, self.path, entry.offset + start * inner * entry.row_bytes, raw)
        if entry.type_id in _DIRECT:
            rows = raw.view(_DIRECT[entry.type_id])
        elif entry.type_id == _BF16:
            rows = (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            rows = _dequantize(raw, entry.type_id)
        return rows.reshape(stop - start, *entry.shape[1:])

    def get(self, name: str) -> np.ndarray:
        """The whole tensor; raises ModelLoadError."""
        shape = self.shape(name)
        if not shape:
            return self._stored_rows(self._find(name), 0, 1).reshape(())
        return self.read_rows(name, 0, shape[0])

    def close(self) -> None:
        """Closes the file; idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
