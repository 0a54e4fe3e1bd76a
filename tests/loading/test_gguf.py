"""GGUF checkpoints: names, rotary order, every quantisation, and the configuration they state."""

from __future__ import annotations

import pathlib
from typing import Any

import gguf
import numpy as np
import pytest

from aqua_jax.errors import ModelLoadError
from aqua_jax.loading import load
from aqua_jax.loading.checkpoint import row_blocks
from aqua_jax.loading.gguf import GGUFCheckpoint
from aqua_jax.loading.gguf_config import hugging_face_config, llama3_factors, with_biases
from aqua_jax.models.config import RopeScaling
from aqua_jax.models.huggingface import config_from_hf
from tests.loading.checkpoints import GGUF_CONFIG, interleave, write_gguf

KINDS = sorted(gguf.quants._type_traits, key=int)


def checkpoint(path: pathlib.Path, **arguments: Any) -> GGUFCheckpoint:
    write_gguf(path / "m.gguf", **arguments)
    return GGUFCheckpoint(str(path / "m.gguf"))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_quantisation_the_package_decodes(
    tmp_path: pathlib.Path, kind: gguf.GGMLQuantizationType, rng: np.random.Generator
) -> None:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rows, width = 37, 3 * block
    raw = rng.integers(0, 256, (rows, width // block * size), dtype=np.uint8)
    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "llama")
    writer.add_tensor("output.weight", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(raw, kind)
        file = GGUFCheckpoint(str(tmp_path / "m.gguf"))
        assert file.shape("lm_head.weight") == (rows, width)
        np.testing.assert_array_equal(file.get("lm_head.weight"), expected)
        blocks = [rows for _, rows in row_blocks(file, "lm_head.weight", 5 * width * 4)]
        np.testing.assert_array_equal(np.concatenate(blocks), expected)


def test_rows_of_query_and_key_are_put_back_in_order(tmp_path: pathlib.Path) -> None:
    values = write_gguf(tmp_path / "m.gguf")
    stored = {info.name: info.data for info in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    file = GGUFCheckpoint(str(tmp_path / "m.gguf"))
    for letter, heads in (("q", 4), ("k", 2)):
        name = f"model.layers.1.self_attn.{letter}_proj.weight"
        raw = stored[f"blk.1.attn_{letter}.weight"]
        assert not np.array_equal(raw, values[name])
        np.testing.assert_array_equal(raw, interleave(values[name], heads))
        np.testing.assert_array_equal(file.get(name), values[name])
        for start, stop in ((0, 1), (3, 18), (15, 17), (16, 32), (31, 32)):
            np.testing.assert_array_equal(
                file.read_rows(name, start, stop), values[name][start:stop]
            )


def test_rows_of_value_and_of_other_architectures_stay(tmp_path: pathlib.Path) -> None:
    for family in ("llama", "qwen2"):
        path = tmp_path / f"{family}.gguf"
        values = write_gguf(path, {**GGUF_CONFIG, "model_type": family})
        letter = "v" if family == "llama" else "q"
        name = f"model.layers.0.self_attn.{letter}_proj.weight"
        np.testing.assert_array_equal(GGUFCheckpoint(str(path)).get(name), values[name])


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_configuration(tmp_path: pathlib.Path, family: str, tied: bool) -> None:
    config = {**GGUF_CONFIG, "model_type": family, "tie_word_embeddings": tied}
    file = checkpoint(
        tmp_path, config=config,
        extra=lambda writer: (writer.add_bos_token_id(1), writer.add_eos_token_id(2)),
    )  # fmt: skip
    found = with_biases(config_from_hf(hugging_face_config(file)), file)
    assert found == config_from_hf(config)


def test_end_of_turn_and_message_end_a_generation_too(tmp_path: pathlib.Path) -> None:
    def extra(writer: gguf.GGUFWriter) -> None:
        for key, value in (("eos", 5), ("eot", 9), ("eom", 5)):
            writer.add_uint32(f"tokenizer.ggml.{key}_token_id", value)

    write_gguf(tmp_path / "m.gguf", extra=extra)
    assert load(str(tmp_path / "m.gguf")).eos_token_ids == (5, 9)


def test_a_window_on_llama_is_mistral(tmp_path: pathlib.Path) -> None:
    file = checkpoint(tmp_path, extra=lambda writer: writer.add_sliding_window(12))
    found = config_from_hf(hugging_face_config(file))
    assert found.family == "mistral" and found.layer_windows == (12, 12)


@pytest.mark.parametrize("original", [8192, 4096])
@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_factors_become_scaling(
    tmp_path: pathlib.Path, original: int, factor: float
) -> None:
    config = {**GGUF_CONFIG, "rope_theta": 500000.0, "head_dim": 32, "num_attention_heads": 2}
    factors = llama3_factors(32, 500000.0, factor, original).astype(np.float32)
    file = checkpoint(
        tmp_path, config=config,
        extra=lambda writer: writer.add_tensor("rope_freqs.weight", factors),
    )  # fmt: skip
    assert "rope_freqs.weight" not in file.names()
    found = config_from_hf(hugging_face_config(file))
    assert found.rope_scaling == RopeScaling(
        kind="llama3", factor=factor, original_max_position=original
    )


def test_llama3_factors_leave_short_wavelengths_and_stretch_long_ones() -> None:
    # Llama 3.1 8B: 29 of 64 frequencies are unchanged, six on the ramp, 29 divided by 8.
    factors = llama3_factors(128, 500000.0, 8.0, 8192)
    assert (factors[:29] == 1).all() and (factors[35:] == 8).all()
    assert (np.diff(factors[28:36]) > 0).all()


@pytest.mark.parametrize("values", [[1.0] * 7 + [3.0], [1.0] * 7 + [np.nan], [1.0, 2.0, 4.0]])
def test_other_rotary_factors_are_refused(tmp_path: pathlib.Path, values: list[float]) -> None:
    factors = np.array(values, np.float32)
    file = checkpoint(
        tmp_path, extra=lambda writer: writer.add_tensor("rope_freqs.weight", factors)
    )
    with pytest.raises(ModelLoadError, match=r"rope_freqs\.weight"):
        hugging_face_config(file)


def test_factors_of_one_are_no_scaling(tmp_path: pathlib.Path) -> None:
    ones = np.ones(8, np.float32)
    file = checkpoint(tmp_path, extra=lambda w: w.add_tensor("rope_freqs.weight", ones))
    assert config_from_hf(hugging_face_config(file)).rope_scaling.kind == "none"


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"type": "none"}, RopeScaling()),
        ({"type": "linear", "factor": 4.0}, RopeScaling(kind="linear", factor=4.0)),
        ({"factor": 2.0}, RopeScaling(kind="linear", factor=2.0)),
        ({"type": "yarn", "factor": 4.0, "original_context_length": 128},
         RopeScaling(kind="yarn", factor=4.0, original_max_position=128)),
        ({"type": "yarn", "factor": 4.0, "yarn_beta_fast": 16.0},
         RopeScaling(kind="yarn", factor=4.0, beta_fast=16.0)),
    ],
)  # fmt: skip
def test_rotary_scaling(tmp_path: pathlib.Path, keys: dict, expected: RopeScaling) -> None:
    def extra(writer: gguf.GGUFWriter) -> None:
        for key, value in keys.items():
            add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}
            add[type(value)](f"llama.rope.scaling.{key}", value)

    found = config_from_hf(hugging_face_config(checkpoint(tmp_path, extra=extra)))
    assert found.rope_scaling == expected


@pytest.mark.parametrize(
    ("key", "kind", "value", "message"),
    [
        ("rope.scaling.type", "string", "longrope", "'longrope'; allowed: none, linear, yarn"),
        ("rope.scaling.factor", "float32", float("nan"), "finite"),
        ("rope.freq_base", "string", "big", "finite number"),
        ("rope.dimension_count", "uint32", 8, "head dimension, 16"),
        ("expert_count", "uint32", 8, "experts"),
        ("feed_forward_length", "int32", -1, "integer > 0"),
        ("attention.head_count_kv", "array", [2, 1], "integer > 0"),
    ],
)
def test_unsupported_metadata_is_named(
    tmp_path: pathlib.Path, key: str, kind: str, value: object, message: str
) -> None:
    def extra(writer: gguf.GGUFWriter) -> None:
        writer.kv_data[0].pop(f"llama.{key}", None)
        getattr(writer, f"add_{kind}")(f"llama.{key}", value)

    with pytest.raises(ModelLoadError, match=message) as caught:
        hugging_face_config(checkpoint(tmp_path, extra=extra))
    assert f"llama.{key}" in str(caught.value)


@pytest.mark.parametrize("key", ["embedding_length", "block_count", "context_length"])
def test_missing_metadata_is_named(tmp_path: pathlib.Path, key: str) -> None:
    file = checkpoint(tmp_path, extra=lambda writer: writer.kv_data[0].pop(f"llama.{key}"))
    with pytest.raises(ModelLoadError, match=rf"llama\.{key}: got None"):
        hugging_face_config(file)


def test_heads_a_layer_that_all_agree_are_one_number(tmp_path: pathlib.Path) -> None:
    def extra(writer: gguf.GGUFWriter) -> None:
        writer.kv_data[0].pop("llama.attention.head_count_kv")
        writer.add_array("llama.attention.head_count_kv", [2, 2])

    values = write_gguf(tmp_path / "m.gguf", extra=extra)
    file = GGUFCheckpoint(str(tmp_path / "m.gguf"))
    assert hugging_face_config(file)["num_key_value_heads"] == 2
    name = "model.layers.0.self_attn.k_proj.weight"
    np.testing.assert_array_equal(file.get(name), values[name])
