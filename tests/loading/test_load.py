"""`load` end to end: values, dtypes, fusing, transform, overrides, and every refusal."""

from __future__ import annotations

import json
import os
import pathlib
import threading

import gguf
import hypothesis
import hypothesis.strategies as st
import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from aqua_jax.errors import ConfigError, ModelLoadError, RequestError
from aqua_jax.loading import load
from aqua_jax.models.config import RopeScaling
from aqua_jax.models.huggingface import hf_tensor_map
from tests.loading.checkpoints import (
    BF16,
    GGUF_CONFIG,
    as_parameters,
    random_tensors,
    write_directory,
    write_gguf,
)
from tests.tiny import CONFIG, write_config

BIASED = {**CONFIG, "attention_bias": True, "mlp_bias": True}
QWEN3 = {**CONFIG, "model_type": "qwen3", "tie_word_embeddings": True}
QUANTISED = [
    gguf.GGMLQuantizationType[name]
    for name in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
]


def assert_same(params: dict[str, jax.Array], expected: dict[str, np.ndarray]) -> None:
    """Same names, shapes, dtypes and bits."""
    assert set(params) == set(expected)
    for name, value in expected.items():
        assert params[name].dtype == value.dtype, name
        np.testing.assert_array_equal(np.asarray(params[name]), value, err_msg=name)


@pytest.mark.parametrize("config", [CONFIG, BIASED, QWEN3], ids=["llama", "biases", "qwen3"])
@pytest.mark.parametrize("stored", [np.float32, np.float16, BF16, np.float64])
@pytest.mark.parametrize("shards", [1, 3])
def test_directory(tmp_path: pathlib.Path, config: dict, stored: type, shards: int) -> None:
    tensors = write_directory(tmp_path, config, dtype=stored, shards=shards)
    loaded = load(str(tmp_path))
    wanted = np.float32 if np.dtype(stored) in (np.float32, np.float64) else BF16
    assert loaded.dtype == wanted
    assert_same(loaded.params, as_parameters(config, tensors, wanted))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtype_is_what_was_asked_for(tmp_path: pathlib.Path, dtype: str) -> None:
    tensors = write_directory(tmp_path, dtype=BF16 if dtype == "float32" else np.float32)
    loaded = load(str(tmp_path), dtype=dtype)
    assert_same(loaded.params, as_parameters(CONFIG, tensors, np.dtype(dtype)))


@pytest.mark.parametrize("kind", QUANTISED, ids=lambda kind: kind.name)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_gguf(tmp_path: pathlib.Path, kind: gguf.GGMLQuantizationType, family: str) -> None:
    config = {**GGUF_CONFIG, "model_type": family, "tie_word_embeddings": family == "qwen2"}
    values = write_gguf(tmp_path / "m.gguf", config, kind=kind)
    loaded = load(str(tmp_path / "m.gguf"))
    wanted = np.float32 if kind == gguf.GGMLQuantizationType.F32 else BF16
    assert loaded.dtype == wanted
    assert loaded.config.tied_embeddings == (family == "qwen2")
    assert loaded.config.qkv_bias == (family == "qwen2")
    assert loaded.config.qk_norm == (family == "qwen3")
    assert_same(loaded.params, as_parameters(config, values, wanted))


def test_gguf_found_in_a_directory(tmp_path: pathlib.Path) -> None:
    write_gguf(tmp_path / "weights.gguf")
    assert load(str(tmp_path)).config.num_layers == 2


def test_gguf_with_biases_states_them(tmp_path: pathlib.Path) -> None:
    config = {**GGUF_CONFIG, "attention_bias": True, "mlp_bias": True}
    values = write_gguf(tmp_path / "m.gguf", config)
    loaded = load(str(tmp_path / "m.gguf"))
    assert loaded.config.qkv_bias and loaded.config.o_bias and loaded.config.mlp_bias
    assert_same(loaded.params, as_parameters(config, values))


def test_transform_sees_every_parameter_once(tmp_path: pathlib.Path) -> None:
    tensors = write_directory(tmp_path)
    expected = as_parameters(CONFIG, tensors)
    seen: dict[str, tuple[int, ...]] = {}

    def double(name: str, value: np.ndarray) -> jax.Array | np.ndarray:
        seen[name] = value.shape
        return jax.numpy.asarray(value * 2) if value.ndim == 1 else value * 2

    loaded = load(str(tmp_path), transform=double)
    assert seen == {name: value.shape for name, value in expected.items()}
    assert_same(loaded.params, {name: value * 2 for name, value in expected.items()})


def test_transform_may_return_a_view_of_its_argument(tmp_path: pathlib.Path) -> None:
    tensors = write_directory(tmp_path)
    loaded = load(str(tmp_path), transform=lambda name, value: value)
    assert_same(loaded.params, as_parameters(CONFIG, tensors))


def test_dummy_needs_only_a_config(tmp_path: pathlib.Path) -> None:
    write_config(tmp_path)
    first, second = (load(str(tmp_path), load_format="dummy", seed=3) for _ in range(2))
    assert_same(first.params, {name: np.asarray(v) for name, v in second.params.items()})
    assert first.dtype == BF16 and first.eos_token_ids == (2,)
    other = load(str(tmp_path / "config.json"), load_format="dummy", dtype="float32", seed=4)
    assert other.params["norm.scale"].dtype == np.float32
    kernel = "layers.0.mlp.down.kernel"
    assert other.params[kernel].dtype == np.float32
    assert not np.array_equal(first.params[kernel], other.params[kernel].astype(BF16))


def test_overrides_replace_fields_of_the_config(tmp_path: pathlib.Path) -> None:
    write_directory(tmp_path)
    scaling = {"rope_type": "linear", "factor": 4.0}
    loaded = load(str(tmp_path), config_overrides={"rope_scaling": scaling})
    assert loaded.config.rope_scaling == RopeScaling(kind="linear", factor=4.0)


def test_end_of_sequence_ids_are_united(tmp_path: pathlib.Path) -> None:
    write_directory(tmp_path)
    (tmp_path / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [7, 5, True, -1, 131, "x"]})
    )
    assert load(str(tmp_path)).eos_token_ids == (7, 5, 2)


def test_a_tokenizer_that_is_not_there_is_not_blamed_on_the_model(tmp_path: pathlib.Path) -> None:
    write_directory(tmp_path)
    with pytest.raises(ConfigError, match=r"^tokenizer: got '/no/such'"):
        load(str(tmp_path), tokenizer="/no/such")


def test_without_tokenizer_text_is_refused_by_name(tmp_path: pathlib.Path) -> None:
    write_directory(tmp_path / "nameless")
    words = load(str(tmp_path / "nameless")).tokenizer
    with pytest.raises(RequestError, match=r"prompt.*prompt_token_ids.*'nameless'"):
        words.encode("hello")
    with pytest.raises(RequestError, match="messages"):
        words.apply_chat_template([{"role": "user", "content": "hello"}])
    assert words.decode([1, 2]) == "" and words.token_bytes(1) is None


def test_missing_tensors_are_named(tmp_path: pathlib.Path) -> None:
    tensors = random_tensors(CONFIG)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    write_directory(tmp_path, tensors=tensors)
    with pytest.raises(ModelLoadError, match=r"1 of 21 .*'model\.layers\.1\.mlp\.up_proj"):
        load(str(tmp_path))


def test_unexpected_tensors_are_named(tmp_path: pathlib.Path) -> None:
    tensors = {**random_tensors(CONFIG), "model.layers.0.self_attn.q_proj.lora": np.ones(2)}
    write_directory(tmp_path, tensors=tensors)
    with pytest.raises(ModelLoadError, match=r"no place for: 'model\.layers\.0.*lora'"):
        load(str(tmp_path))


def test_known_leftovers_are_ignored(tmp_path: pathlib.Path) -> None:
    config = {**CONFIG, "tie_word_embeddings": True}
    tensors = {
        **random_tensors(config), "lm_head.weight": np.ones((131, 48), np.float32),
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32),
    }  # fmt: skip
    write_directory(tmp_path, config, tensors)
    assert "lm_head.kernel" not in load(str(tmp_path)).params


def test_wrong_shape_says_got_and_expected(tmp_path: pathlib.Path) -> None:
    tensors = random_tensors(CONFIG)
    tensors["model.norm.weight"] = np.ones((2, 24), np.float32)
    write_directory(tmp_path, tensors=tensors)
    with pytest.raises(ModelLoadError, match=r"'model\.norm\.weight'.*\(2, 24\).*\(48,\)"):
        load(str(tmp_path))


def test_integer_weights_are_refused(tmp_path: pathlib.Path) -> None:
    tensors = write_directory(tmp_path)
    tensors["model.norm.weight"] = np.ones(48, np.int32)
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelLoadError, match=r"model\.norm\.weight.*int32"):
        load(str(tmp_path))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("stored", [np.float32, np.float16, BF16])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.self_attn.k_proj.weight"])
def test_a_weight_that_is_not_finite_is_refused(
    tmp_path: pathlib.Path, value: float, stored: type, name: str
) -> None:
    tensors = random_tensors(CONFIG)
    tensors[name].reshape(-1)[-1] = value
    write_directory(tmp_path, tensors=tensors, dtype=stored)
    with pytest.raises(ModelLoadError, match=f"'{name}': NaN or infinity"):
        load(str(tmp_path))


def test_a_weight_beyond_the_dtype_is_refused(tmp_path: pathlib.Path) -> None:
    tensors = random_tensors(CONFIG)
    tensors["lm_head.weight"][3, 4] = np.finfo(np.float32).max
    write_directory(tmp_path, tensors=tensors)
    assert np.isfinite(load(str(tmp_path)).params["lm_head.kernel"]).all()
    with pytest.raises(ModelLoadError, match=r"lm_head\.weight.*\(as bfloat16\)"):
        load(str(tmp_path), dtype="bfloat16")


def test_quantised_directories_are_refused(tmp_path: pathlib.Path) -> None:
    write_config(tmp_path, quantization_config={"quant_method": "awq"})
    with pytest.raises(ModelLoadError, match=r"quantization_config.*'awq'.*GGUF"):
        load(str(tmp_path))


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_hidden_layers", 10**12), ("vocab_size", 10**30), ("hidden_size", 2**62),
     ("intermediate_size", float("inf")), ("head_dim", float("nan"))],
)  # fmt: skip
@pytest.mark.parametrize("load_format", ["dummy", "safetensors"])
def test_absurd_sizes_are_refused(
    tmp_path: pathlib.Path, field: str, value: float, load_format: str
) -> None:
    write_config(tmp_path, **{field: value})
    with pytest.raises(ConfigError, match=field):
        load(str(tmp_path), load_format=load_format)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from([0, -1, 1, 2**31, 2**63, 10**40, "llama", "yarn", "default"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["rope_type", "factor", "rope_theta", "x"]), inner),
    max_leaves=4,
)  # fmt: skip
FIELDS = [
    *CONFIG, "rope_scaling", "rope_parameters", "sliding_window", "layer_types", "attention_bias",
    "mlp_bias", "quantization_config", "use_sliding_window", "max_window_layers",
]  # fmt: skip


@hypothesis.given(
    changes=st.dictionaries(st.sampled_from(FIELDS), JSON, min_size=1, max_size=3),
    family=st.sampled_from(["llama", "mistral", "qwen2", "qwen3"]),
)
def test_any_config_loads_or_is_refused(
    tmp_path_factory: pytest.TempPathFactory, changes: dict, family: str
) -> None:
    path = tmp_path_factory.mktemp("fuzzed")
    write_directory(path)
    (path / "config.json").write_text(json.dumps({**CONFIG, "model_type": family, **changes}))
    try:
        loaded = load(str(path))
    except (ConfigError, ModelLoadError) as error:
        assert str(error)
    else:
        assert set(loaded.params) == set(hf_tensor_map(loaded.config))


@hypothesis.given(cut=st.integers(0, len(json.dumps(CONFIG)) - 1))
def test_a_shortened_config_is_refused(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    path = tmp_path_factory.mktemp("cut")
    (path / "config.json").write_text(json.dumps(CONFIG)[:cut])
    with pytest.raises(ModelLoadError, match=r"config\.json: not valid JSON"):
        load(str(path))


def test_a_directory_without_config(tmp_path: pathlib.Path) -> None:
    write_directory(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ModelLoadError, match=r"config\.json: cannot be opened"):
        load(str(tmp_path))


def test_dummy_weights_beyond_this_machine_are_refused(tmp_path: pathlib.Path) -> None:
    # 4e12 weights: under the limit of a configuration, 8 TB in memory.
    write_config(tmp_path, hidden_size=2**16, intermediate_size=2**18, num_hidden_layers=80)
    with pytest.raises(ModelLoadError, match="GiB of weights"):
        load(str(tmp_path), load_format="dummy")


def test_more_layers_than_tensors_are_refused_early(tmp_path: pathlib.Path) -> None:
    write_directory(tmp_path)
    with pytest.raises(ModelLoadError, match=r"4000 layers.* 21 tensors"):
        load(str(tmp_path), config_overrides={"num_hidden_layers": 4000})


@pytest.mark.parametrize("dtype", ["float16", "int8", ""])
def test_unknown_dtype(dtype: str) -> None:
    with pytest.raises(ConfigError, match="dtype"):
        load("demo", dtype=dtype)


def test_files_are_closed_after_success_and_failure(tmp_path: pathlib.Path) -> None:
    tensors = write_directory(tmp_path / "good", shards=3)
    tensors["model.norm.weight"][0] = np.nan
    write_directory(tmp_path / "bad", tensors=tensors, shards=3)
    load(str(tmp_path / "good"))  # first use opens whatever the libraries keep open
    before = len(os.listdir("/proc/self/fd"))
    load(str(tmp_path / "good"))
    with pytest.raises(ModelLoadError):
        load(str(tmp_path / "bad"))
    assert len(os.listdir("/proc/self/fd")) == before


def test_two_loads_at_once(tmp_path: pathlib.Path) -> None:
    tensors = write_directory(tmp_path)
    results: list[dict[str, jax.Array]] = []
    threads = [
        threading.Thread(target=lambda: results.append(load(str(tmp_path)).params))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(results) == 4
    for params in results:
        assert_same(params, as_parameters(CONFIG, tensors))


def test_bfloat16_is_kept_bit_for_bit(tmp_path: pathlib.Path) -> None:
    tensors = write_directory(tmp_path, dtype=BF16)
    loaded = load(str(tmp_path))
    stored = tensors["model.embed_tokens.weight"].view(np.uint16)
    found = np.asarray(loaded.params["embed.embedding"]).view(np.uint16)
    assert ml_dtypes.bfloat16 == loaded.dtype
    np.testing.assert_array_equal(found, stored)
