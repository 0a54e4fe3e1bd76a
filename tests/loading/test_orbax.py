"""Orbax checkpoints: bits there and back, other people's trees, damage, memory, the converter."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import gguf
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from aqua_jax.config import EngineConfig, SamplingParams
from aqua_jax.engine.engine import Engine
from aqua_jax.errors import AquaError, ConfigError, ModelLoadError
from aqua_jax.loading import LoadedModel, load, load_tokenizer, save
from aqua_jax.loading.find_tokenizer import tokenizer_files
from aqua_jax.models.config import ModelConfig
from aqua_jax.models.decoder import Decoder
from aqua_jax.models.huggingface import config_from_hf
from aqua_jax.models.parameters import abstract_decoder, parameters, random_params
from tests.engine.driving import run_all
from tests.loading.checkpoints import BF16, GGUF_CONFIG, write_directory, write_gguf
from tests.loading.limits import ROOT, run_python
from tests.loading.test_gguf_tokenizer import byte_level_metadata, made, sentencepiece_metadata
from tests.loading.vocabularies import TEXTS, byte_level, with_bos, write_tokenizer
from tests.scale import scaled
from tests.tiny import CONFIG

QWEN2 = {**CONFIG, "model_type": "qwen2"}
QWEN3 = {**CONFIG, "model_type": "qwen3", "tie_word_embeddings": True}
SCALED = {**CONFIG, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "mlp_bias": True}
WINDOWS = {**CONFIG, "model_type": "mistral", "sliding_window": 24}


def assert_same(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Same names, shapes, dtypes and bits."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        ours, theirs = np.asarray(found[name]), np.asarray(value)
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype), name
        assert ours.tobytes() == theirs.tobytes(), name


def tiny(config: Mapping[str, Any] = CONFIG, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """Random parameters."""
    return dict(random_params(config_from_hf(config), dtype))


@pytest.mark.parametrize("dtype", [np.float32, BF16], ids=["f32", "bf16"])
@pytest.mark.parametrize("config", [CONFIG, QWEN2, QWEN3, SCALED, WINDOWS])
def test_there_and_back(tmp_path: pathlib.Path, config: dict[str, Any], dtype: Any) -> None:
    write_directory(tmp_path / "hf", config, dtype=dtype)
    source = load(str(tmp_path / "hf"))
    save(tmp_path / "ours", source.config, source.params)
    for load_format in ("auto", "orbax"):
        found = load(str(tmp_path / "ours"), load_format=load_format)
        assert (found.config, found.dtype) == (source.config, source.dtype)
        assert found.eos_token_ids == source.eos_token_ids
        assert_same(found.params, source.params)
    other = "float32" if dtype is BF16 else "bfloat16"
    converted = load(str(tmp_path / "ours"), dtype=other)
    assert_same(converted.params, load(str(tmp_path / "hf"), dtype=other).params)


def test_transforms_see_what_safetensors_give(tmp_path: pathlib.Path) -> None:
    write_directory(tmp_path / "hf", dtype=BF16)
    source = load(str(tmp_path / "hf"))
    save(tmp_path / "ours", source.config, source.params)

    def double(name: str, value: np.ndarray) -> np.ndarray:
        return value + value if name.endswith("kernel") else value

    assert_same(load(str(tmp_path / "ours"), transform=double).params,
                load(str(tmp_path / "hf"), transform=double).params)


@pytest.mark.parametrize("biases", [("qkv_bias",), ("o_bias", "mlp_bias"), ()])
def test_biases_that_no_config_json_states(
    tmp_path: pathlib.Path, biases: tuple[str, ...]
) -> None:
    fields = {name: name in biases for name in ("qkv_bias", "o_bias", "mlp_bias")}
    config = dataclasses.replace(config_from_hf(QWEN2), **fields)
    params = dict(random_params(config))
    save(tmp_path / "m", config, params)
    found = load(str(tmp_path / "m"))
    assert found.config == config
    assert_same(found.params, params)
    raw = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**raw, "aqua_jax_biases": ["x"]}))
    with pytest.raises(ModelLoadError, match="aqua_jax_biases"):
        load(str(tmp_path / "m"))


def test_a_trained_decoder_and_the_config_it_came_with(tmp_path: pathlib.Path) -> None:
    model = Decoder(config_from_hf(QWEN3), rngs=nnx.Rngs(3))
    save(tmp_path / "m", {**QWEN3, "torch_dtype": "bfloat16", "note": 1}, parameters(model))
    assert_same(load(str(tmp_path / "m")).params, parameters(model))
    written = json.loads((tmp_path / "m" / "config.json").read_text())
    assert written == {**QWEN3, "note": 1, "dtype": "float32"}


@pytest.mark.parametrize("form", ["state", "pure"])
@pytest.mark.parametrize("place", ["", "default"])
def test_what_flax_users_save(tmp_path: pathlib.Path, form: str, place: str) -> None:
    """An nnx state, or its dictionary, beside config.json or below it (CheckpointManager)."""
    model = Decoder(config_from_hf(CONFIG), rngs=nnx.Rngs(3))
    state = nnx.state(model, nnx.Param)
    with ocp.StandardCheckpointer() as writer:
        tree = nnx.to_pure_dict(state) if form == "pure" else state
        writer.save(tmp_path / "m" / place, tree)
    (tmp_path / "m" / "config.json").write_text(json.dumps(CONFIG))
    assert_same(load(str(tmp_path / "m")).params, parameters(model))


def written(folder: pathlib.Path, tree: Any, config: Mapping[str, Any] = CONFIG) -> str:
    """A directory with this tree, unchecked."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    with ocp.StandardCheckpointer() as writer:
        writer.save(folder / "params", tree)
    return str(folder)


def test_trees_that_do_not_fit(tmp_path: pathlib.Path) -> None:
    params = tiny()
    name = "layers.1.mlp.down.kernel"
    value = params[name]
    endless = value.copy()
    endless[-1, -1] = np.inf
    wrong: dict[str, tuple[Any, str]] = {
        "shape": ({**params, name: value.T.copy()}, name),
        "packed": ({**params, name: value.reshape(1, *value.shape)}, name),
        "dtype": ({**params, name: value.astype(np.int32)}, name),
        "infinite": ({**params, name: endless}, name),
        "missing": ({key: value for key, value in params.items() if key != name}, name),
        "more": ({**params, "layers.7.x": value}, "layers.7.x"),
        "twice": ({**params, "norm": {"scale": params["norm.scale"]}}, "norm.scale"),
        "list": ({**params, "norm": [params["norm.scale"]]}, "norm|saved tree"),
        "scalar": ({**params, "step": 3}, "step"),
    }
    for case, (tree, named) in wrong.items():
        with pytest.raises(ModelLoadError, match=named):
            load(written(tmp_path / case, tree))


def test_directories_without_one_checkpoint(tmp_path: pathlib.Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(ModelLoadError, match="0 Orbax checkpoints"):
        load(str(tmp_path), load_format="orbax")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "_METADATA").write_text("{}")
    with pytest.raises(ModelLoadError, match=r"2 Orbax checkpoints.*a, b"):
        load(str(tmp_path))
    shutil.rmtree(tmp_path / "b")
    with pytest.raises(ModelLoadError, match="unreadable metadata"):
        load(str(tmp_path))
    (tmp_path / "config.json").unlink()
    with pytest.raises(ModelLoadError, match=r"config\.json"):
        load(str(tmp_path))


# Reads that TensorStore still has under way when one fails report to a loop that is gone.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_damaged_files_are_errors(tmp_path: pathlib.Path) -> None:
    """Files gone or cut short give the same model (Orbax keeps some it doesn't read) or an error.

    A flipped bit of a weight is another weight: formats without checksums cannot tell.
    """
    good = tmp_path / "good"
    source = tiny()
    save(good, config_from_hf(CONFIG), source)
    rng, refused, same = random.Random(0), set(), 0
    for path in sorted(entry for entry in good.rglob("*") if entry.is_file()):
        whole = path.read_bytes()
        for trial in range(scaled(4)):
            broken = tmp_path / "broken"
            shutil.copytree(good, broken)
            target = broken / path.relative_to(good)
            if trial == 0:
                target.unlink()
            elif trial % 2:
                target.write_bytes(whole[: rng.randrange(len(whole))])
            else:
                flipped = bytearray(whole)
                flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
                target.write_bytes(flipped)
            try:
                found = load(str(broken))
            except AquaError:
                refused.add(path.name)
            else:
                assert {n: v.shape for n, v in found.params.items()} == {
                    n: v.shape for n, v in source.items()
                }
                if trial == 0 or trial % 2:
                    assert_same(found.params, source)
                    same += 1
            shutil.rmtree(broken)
    assert {"config.json", "_METADATA", "manifest.ocdbt"} <= refused and len(refused) >= 5
    assert same > 0


def test_save_writes_all_or_nothing(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, params = config_from_hf(CONFIG), tiny()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "x").write_text("")
    (tmp_path / "file").write_text("")
    for name in ("taken", "file"):
        with pytest.raises(ConfigError, match="directory"):
            save(tmp_path / name, config, params)
    with pytest.raises(ModelLoadError, match=r"norm\.scale"):
        save(tmp_path / "m", config, {n: v for n, v in params.items() if n != "norm.scale"})
    with pytest.raises(ModelLoadError, match=r"norm\.scale.*expected \(48,\)"):
        save(tmp_path / "m", config, {**params, "norm.scale": np.ones(4, np.float32)})
    with pytest.raises(ConfigError, match="extra_files"):
        save(tmp_path / "m", config, params, {"../x": b""})
    with pytest.raises(FileNotFoundError):
        save(tmp_path / "gone" / "m", config, params)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            save(tmp_path / "m", config, params)
    assert sorted(os.listdir(tmp_path)) == ["file", "taken"]
    (tmp_path / "m").mkdir()
    save(tmp_path / "m", config, params)  # an empty directory is as good as none
    assert sorted(os.listdir(tmp_path)) == ["file", "m", "taken"]


_MEASURE = """
import json, pathlib, sys
import numpy as np, jax, ml_dtypes
from aqua_jax.loading import load

def status(key):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))

def pack(name, value):  # copies as a packed layout does
    return np.array(value, order="C") if value.ndim == 2 else value

jax.block_until_ready(jax.device_put(np.ones(4)) + 1)
before = status("VmRSS")
early = "orbax" in sys.modules
model = load(sys.argv[1], dtype=sys.argv[2], transform=pack)
jax.block_until_ready(model.params)
print(json.dumps({
    "peak": status("VmHWM") - before, "after": status("VmRSS") - before, "early": early,
    "size": sum(value.nbytes for value in model.params.values()),
    "largest": max(value.nbytes for value in model.params.values()),
}))
"""


def test_peak_memory(tmp_path: pathlib.Path) -> None:
    config = ModelConfig("llama", 20000, 1152, 3072, 2, 18, 6, 64, 512)
    shapes = abstract_decoder(config, BF16)[1]
    rng, mib = np.random.default_rng(0), 1 << 20
    save(tmp_path / "m", config, {
        name: rng.random(spec.shape, np.float32).astype(spec.dtype)
        for name, spec in shapes.items()
    })
    found = json.loads(run_python(_MEASURE, str(tmp_path / "m"), "float32"))
    assert not found["early"] and found["size"] > 280 * mib
    # The promise is 500 MiB beyond model and largest tensor; the code that is imported for it
    # and TensorStore's buffers take 90 to 130.
    assert found["peak"] <= found["size"] + found["largest"] + 200 * mib, found
    assert found["after"] <= found["size"] + 200 * mib, found


def tokens(model: str) -> list[list[int]]:
    """What the engine says to three prompts."""
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    config = EngineConfig(model=model, kv_cache_tokens=256, max_step_tokens=64, warmup="none")
    with Engine(config) as engine:
        work = [([3 + i, 20, 7 * i + 1, 90], params) for i in range(3)]
        return [list(out.outputs[0].token_ids) for out in run_all(engine, work)]


def test_the_converter(tmp_path: pathlib.Path) -> None:
    source, output = tmp_path / "hf", tmp_path / "ours"
    words = with_bos(byte_level(), "<|user|>")
    write_directory(source, {**CONFIG, "vocab_size": words.get_vocab_size()}, dtype=BF16)
    write_tokenizer(source, words, bos_token="<|user|>", chat_template="{{ messages }}")
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 5]}))
    script = str(ROOT / "scripts" / "convert_checkpoint.py")
    done, failed = (
        subprocess.run(
            [sys.executable, script, f"--model={model}", f"--output={output}"],
            capture_output=True, text=True, timeout=120,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        for model in (source, tmp_path / "gone")
    )
    assert done.returncode == 0, done.stderr
    assert "MB of parameters" in done.stdout and "orbax" not in done.stderr
    assert failed.returncode == 1 and failed.stderr.startswith("convert_checkpoint: model: got")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (output / name).read_bytes() == (source / name).read_bytes()
    found, given = load(str(output)), load(str(source))
    assert found.eos_token_ids == given.eos_token_ids == (0, 5, 2)
    assert_same(found.params, given.params)
    assert tokens(str(output)) == tokens(str(source))


@pytest.mark.parametrize("pre", ["smollm", "llama-bpe", "qwen2", "sentencepiece"])
def test_a_tokenizer_from_gguf_is_written_out(tmp_path: pathlib.Path, pre: str) -> None:
    if pre == "sentencepiece":
        metadata = sentencepiece_metadata()
    else:
        metadata = byte_level_metadata(byte_level(), pre)
    metadata["tokenizer.chat_template"] = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"
    source = made(metadata)
    for name, content in source.files().items():
        (tmp_path / name).write_bytes(content)
    found = load_tokenizer(str(tmp_path))
    assert (found.bos_token_id, found.vocab_size) == (source.bos_token_id, source.vocab_size)
    assert found.eos_token_ids == source.eos_token_ids
    chat = [{"role": "user", "content": "hi"}]
    assert found.apply_chat_template(chat) == source.apply_chat_template(chat)
    for text in TEXTS:
        for special in (False, True):
            assert found.encode(text, special) == source.encode(text, special)
        ids = source.encode(text)
        assert found.decode(ids) == source.decode(ids)
    for token in range(source.vocab_size):
        assert found.token_bytes(token) == source.token_bytes(token)
        assert found.is_special(token) == source.is_special(token)


def test_a_gguf_file_becomes_a_directory_of_its_own(tmp_path: pathlib.Path) -> None:
    words = byte_level_metadata(byte_level(), "smollm", eot_token_id=3)

    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(words["tokenizer.ggml.tokens"])
        writer.add_token_merges(words["tokenizer.ggml.merges"])
        writer.add_token_types(words["tokenizer.ggml.token_type"].tolist())
        writer.add_eos_token_id(0)
        writer.add_eot_token_id(3)
        writer.add_chat_template("{{ messages[0].content }}")

    config = {**GGUF_CONFIG, "vocab_size": len(words["tokenizer.ggml.tokens"])}
    path = str(tmp_path / "m.gguf")
    write_gguf(tmp_path / "m.gguf", config, kind=gguf.GGMLQuantizationType.Q8_0, extra=add)
    source = load(path)
    save(tmp_path / "m", source.config, source.params, tokenizer_files(path))
    found: LoadedModel = load(str(tmp_path / "m"))
    assert found.config == source.config
    assert set(found.eos_token_ids) == set(source.eos_token_ids) == {0, 3}
    assert_same(found.params, source.params)
    assert found.tokenizer.encode("Hello, world!") == source.tokenizer.encode("Hello, world!")
    assert tokenizer_files(str(tmp_path / "m")).keys() == tokenizer_files(path).keys()
    write_gguf(tmp_path / "bare.gguf")
    assert tokenizer_files(str(tmp_path / "bare.gguf")) == {}
    assert jax.tree.leaves(found.params)[0].dtype == BF16
