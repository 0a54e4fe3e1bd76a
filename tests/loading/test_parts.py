"""Loading for several devices: every part is cut out of the file's rows as they go by."""

from __future__ import annotations

import functools

import ml_dtypes
import numpy as np
import pytest

from aqua_jax.errors import ConfigError, ModelLoadError
from aqua_jax.loading import assemble, checkpoint, load, save
from aqua_jax.ops.linear import pack
from tests.loading.checkpoints import GGUF_CONFIG, random_tensors, write_directory, write_gguf
from tests.tiny import CONFIG

BIASES = {**CONFIG, "attention_bias": True, "mlp_bias": True}


def pack_kernels(name, array):
    return pack(array, array.dtype) if name.endswith(".kernel") else array


@pytest.fixture(params=["safetensors", "orbax", "gguf"])
def model(request, tmp_path):
    """A checkpoint of each format."""
    if request.param == "gguf":
        write_gguf(tmp_path / "model.gguf", GGUF_CONFIG)
        return str(tmp_path / "model.gguf")
    write_directory(tmp_path / "hf", BIASES)
    if request.param == "orbax":
        loaded = load(str(tmp_path / "hf"))
        save(tmp_path / "orbax", loaded.config, loaded.params)
        return str(tmp_path / "orbax")
    return str(tmp_path / "hf")


def test_parts_are_cut_while_rows_go_by(model, monkeypatch):
    devices = 4
    whole = load(model, dtype="float32").params
    # Blocks that end anywhere: 5 or 6 rows of 48 values.
    monkeypatch.setattr(
        assemble, "row_blocks", functools.partial(checkpoint.row_blocks, block_bytes=1100)
    )
    cut = load(model, dtype="float32", transform=pack_kernels, tensor_parallel=devices)
    shards = cut.shards
    assert shards.size == devices and cut.params.keys() == whole.keys()
    for name, value in whole.items():
        cuts = shards.cuts(name)
        wanted = assemble.take_parts(np.asarray(value), cuts)
        wanted = wanted * devices if cuts is None else wanted
        got = shards.parts(cut.params[name])
        for part, want, device in zip(got, wanted, shards.devices, strict=True):
            assert part.devices() == {device}
            np.testing.assert_array_equal(np.asarray(part), pack_kernels(name, want), name)


@pytest.mark.parametrize("tensor", ["self_attn.o_proj", "self_attn.k_proj", "mlp.down_proj"])
def test_a_value_that_is_not_finite_is_found_in_any_part(tmp_path, tensor):
    tensors = random_tensors(CONFIG)
    name = f"model.layers.1.{tensor}.weight"
    tensors[name][-1, -1] = np.inf
    write_directory(tmp_path / "hf", CONFIG, tensors)
    with pytest.raises(ModelLoadError, match=f"{name}.*NaN or infinity"):
        load(str(tmp_path / "hf"), tensor_parallel=2)


def test_random_weights_are_those_of_one_device(tmp_path):
    write_directory(tmp_path / "hf", BIASES)
    settings = {"load_format": "dummy", "dtype": "bfloat16"}
    whole = load(str(tmp_path / "hf"), **settings).params
    cut = load(str(tmp_path / "hf"), tensor_parallel=2, **settings)
    for name, value in whole.items():
        wanted = assemble.take_parts(np.asarray(value), cut.shards.cuts(name))
        for part, want in zip(cut.shards.parts(cut.params[name]), wanted, strict=False):
            assert part.dtype == want.dtype in (ml_dtypes.bfloat16, np.float32)
            np.testing.assert_array_equal(np.asarray(part), want)


def test_what_cannot_be_cut_is_refused_before_weights_are_read(tmp_path, monkeypatch):
    write_directory(tmp_path / "hf", CONFIG)
    monkeypatch.setattr(assemble, "row_blocks", None)
    with pytest.raises(ConfigError, match="a divisor of the model's 4 attention heads"):
        load(str(tmp_path / "hf"), tensor_parallel=3)
