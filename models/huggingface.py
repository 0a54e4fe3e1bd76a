"""Hugging Face checkpoints: their config.json as a `ModelConfig`, their tensor names as ours.

Our parameters are fused and `[in, out]`; Hugging Face's are one tensor a projection, `[out, in]`:

  ours                               shape            Hugging Face (under `model.layers.{i}.`)
  embed.embedding                    [V, d]           model.embed_tokens.weight
  layers.{i}.input_norm.scale        [d]              input_layernorm.weight
  layers.{i}.attention.qkv.kernel    [d, (H+2K)*D]    self_attn.{q,k,v}_proj.weight
  layers.{i}.attention.qkv.bias      [(H+2K)*D]       self_attn.{q,k,v}_proj.bias
  layers.{i}.attention.q_norm.scale  [D]              self_attn.q_norm.weight (k_norm alike)
  layers.{i}.attention.o.kernel      [H*D, d]         self_attn.o_proj.weight (.bias alike)
  layers.{i}.post_norm.scale         [d]              post_attention_layernorm.weight
  layers.{i}.mlp.gate_up.kernel      [d, 2F]          mlp.{gate,up}_proj.weight (.bias alike)
  layers.{i}.mlp.down.kernel         [F, d]           mlp.down_proj.weight (.bias alike)
  norm.scale                         [d]              model.norm.weight
  lm_head.kernel                     [d, V]           lm_head.weight; absent when tied

`hf_tensor_map` gives this table for one model. `ParamSource.join` makes our array of theirs,
`ParamSource.split` theirs of ours. Rotary pairs are half-split on both sides, so that no rows move.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from aqua_jax.errors import ConfigError, ModelLoadError
from aqua_jax.models.config import INTEGER_LIMITS, ModelConfig, RopeScaling

# What each family's config means where it says nothing (the defaults of transformers 5.23).
# None for num_key_value_heads: as many as query heads. None for head_dim: hidden size / heads.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {
        "max_position_embeddings": 2048, "num_key_value_heads": None, "head_dim": None,
        "sliding_window": None, "bos_token_id": 1, "eos_token_id": 2,
    },
    "mistral": {
        "max_position_embeddings": 131072, "num_key_value_heads": 8, "head_dim": None,
        "sliding_window": 4096, "bos_token_id": 1, "eos_token_id": 2,
    },
    "qwen2": {
        "max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": None,
        "sliding_window": 4096, "bos_token_id": None, "eos_token_id": None,
    },
    "qwen3": {
        "max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128,
        "sliding_window": 4096, "bos_token_id": None, "eos_token_id": None,
    },
}  # fmt: skip

# Names in ModelConfig's errors, as the file spells them.
_FILE_NAMES = {
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "max_position": "max_position_embeddings",
    "tied_embeddings": "tie_word_embeddings",
    "o_bias": "attention_bias",
    "eos_token_ids": "eos_token_id",
    "layer_windows": "sliding_window",
    "original_max_position": "original_max_position_embeddings",
    "kind": "rope_type",
}
_LAYER_TYPES = ("full_attention", "sliding_attention")
# What a kind of rotary scaling may say beside its factor and the trained length.
_ROPE_FIELDS: dict[str, tuple[str, ...]] = {
    "linear": (), "dynamic": (), "llama3": ("low_freq_factor", "high_freq_factor"),
    "yarn": (
        "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate",
    ),
}
# Values of these fields that this decoder computes; anything else would be silently wrong.
_ONLY = {
    "hidden_act": ("silu", "swish"),
    "partial_rotary_factor": (1, 1.0),
    "quantization_config": (None,),
}


def config_from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """Reads the contents of a config.json.

    Both spellings of rotary scaling are understood: `rope_scaling` with `rope_theta` beside it,
    and transformers 5's `rope_parameters` with `rope_theta` inside. Fields that don't change what
    the model computes are ignored.

    Args:
      config: the parsed JSON object.

    Returns:
      The architecture.

    Raises:
      ConfigError: a field is missing, out of range, of the wrong type or asks for something this
        decoder doesn't compute; named as in the file, with the value and what is allowed.
      ModelLoadError: `config` isn't an object.
    """
    if not isinstance(config, Mapping):
        raise ModelLoadError(f"config.json: got {type(config).__name__}; allowed: a JSON object")
    family = config.get("model_type")
    if not isinstance(family, str) or family not in _DEFAULTS:
        raise ConfigError("model_type", family, "one of " + ", ".join(_DEFAULTS))
    for field, values in _ONLY.items():
        value = config.get(field)
        if value is not None and value not in values:
            raise ConfigError(field, value, "absent or " + str(values[0]))

    # A null sliding window means none, and a null token id likewise: absent isn't the same.
    defaults = _DEFAULTS[family]
    nullable = {
        field: config.get(field, defaults[field])
        for field in ("sliding_window", "bos_token_id", "eos_token_id")
    }
    heads = _required(config, "num_attention_heads")
    kv_heads = config.get("num_key_value_heads", defaults["num_key_value_heads"])
    attention_bias = family in ("llama", "qwen3") and _flag(config, "attention_bias")
    theta, scaling = _rope(config)
    try:
        return ModelConfig(
            family=family,
            vocab_size=_required(config, "vocab_size"),
            hidden_size=_required(config, "hidden_size"),
            intermediate_size=_required(config, "intermediate_size"),
            num_layers=_required(config, "num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=heads if kv_heads is None else kv_heads,
            head_dim=_head_dim(config, defaults["head_dim"]),
            max_position=_max_position(config),
            rms_norm_eps=_or(config.get("rms_norm_eps"), 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            layer_windows=_windows(config, family, nullable["sliding_window"]),
            tied_embeddings=_flag(config, "tie_word_embeddings"),
            qkv_bias=family == "qwen2" or attention_bias,
            o_bias=attention_bias,
            mlp_bias=family == "llama" and _flag(config, "mlp_bias"),
            qk_norm=family == "qwen3",
            bos_token_id=nullable["bos_token_id"],
            eos_token_ids=_token_ids(nullable["eos_token_id"]),
        )
    except ConfigError as error:
        field = _FILE_NAMES.get(error.field, error.field)
        raise ConfigError(field, error.value, error.allowed) from None


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _required(config: Mapping[str, Any], field: str) -> int:
    """A size the file must give."""
    ours = {theirs: name for name, theirs in _FILE_NAMES.items()}.get(field, field)
    value, (low, high) = config.get(field), INTEGER_LIMITS[ours]
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ConfigError(field, value, f"an integer from {low} to {high} (required)")
    return value


def _flag(config: Mapping[str, Any], field: str) -> bool:
    value = _or(config.get(field), False)
    if not isinstance(value, bool):
        raise ConfigError(field, value, "true or false")
    return value


def _max_position(config: Mapping[str, Any]) -> Any:
    default = _DEFAULTS[config["model_type"]]["max_position_embeddings"]
    return _or(config.get("max_position_embeddings"), default)


def _head_dim(config: Mapping[str, Any], default: int | None) -> Any:
    given = _or(config.get("head_dim"), default)
    if given is not None:
        return given
    hidden, heads = _required(config, "hidden_size"), _required(config, "num_attention_heads")
    if hidden % heads != 0:
        raise ConfigError(
            "hidden_size", hidden, f"a multiple of num_attention_heads ({heads}), or give head_dim"
        )
    return hidden // heads


def _token_ids(value: Any) -> tuple[Any, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def _windows(config: Mapping[str, Any], family: str, window: Any) -> tuple[Any, ...]:
    """Window of each layer; empty when none has one.

    Mistral: every layer, unless `layer_types` says otherwise (as in Ministral). Qwen: with
    `use_sliding_window`, the layers from `max_window_layers` on, or as `layer_types` says.
    """
    if family == "llama":
        return ()
    layers = _required(config, "num_hidden_layers")
    if family != "mistral" and not _flag(config, "use_sliding_window"):
        window = None
    types = config.get("layer_types")
    if types is not None:
        return _windows_by_type(types, layers, window)
    if window is None:
        return ()
    first = 0
    if family != "mistral":
        first = _or(config.get("max_window_layers"), 28)
        if not isinstance(first, int) or isinstance(first, bool) or first < 0:
            raise ConfigError("max_window_layers", first, "an integer >= 0")
    windows = tuple(window if index >= first else None for index in range(layers))
    return windows if any(entry is not None for entry in windows) else ()


def _windows_by_type(types: Any, layers: int, window: Any) -> tuple[Any, ...]:
    allowed = f"a list of {layers} of " + ", ".join(_LAYER_TYPES)
    if not isinstance(types, (list, tuple)) or len(types) != layers:
        raise ConfigError("layer_types", types, allowed)
    for kind in types:
        if not isinstance(kind, str) or kind not in _LAYER_TYPES:
            raise ConfigError("layer_types", kind, allowed)
    if "sliding_attention" not in types:
        return ()
    if window is None:
        raise ConfigError(
            "sliding_window", window, "an integer >= 1: layer_types has sliding_attention"
        )
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def _rope(config: Mapping[str, Any]) -> tuple[Any, RopeScaling]:
    """Base and scaling, from `rope_scaling` if it says anything, else from `rope_parameters`."""
    where = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    fields = _or(config.get(where), {})
    if not isinstance(fields, Mapping):
        raise ConfigError(where, fields, "an object, or null")
    for kind in _LAYER_TYPES:
        if kind in fields:
            raise ConfigError(f"{where}.{kind}", fields[kind], "one setting for all layers")
    share = fields.get("partial_rotary_factor")
    if share is not None and share not in _ONLY["partial_rotary_factor"]:
        raise ConfigError(f"{where}.partial_rotary_factor", share, "absent or 1")
    theta = _or(_or(fields.get("rope_theta"), config.get("rope_theta")), 10000.0)
    kind = _or(_or(fields.get("rope_type"), fields.get("type")), "default")
    if not isinstance(kind, str) or kind not in _ROPE_READERS:
        raise ConfigError(f"{where}.rope_type", kind, "one of " + ", ".join(_ROPE_READERS))
    try:
        return theta, _ROPE_READERS[kind](config, fields, where)
    except ConfigError as error:
        prefix, _, field = error.field.rpartition(".")
        if prefix != "rope_scaling":
            raise
        name = f"{where}.{_FILE_NAMES.get(field, field)}"
        raise ConfigError(name, error.value, error.allowed) from None


def _factor(fields: Mapping[str, Any], where: str) -> Any:
    if fields.get("factor") is None:
        raise ConfigError(f"{where}.factor", None, "a number >= 1 (required)")
    return fields["factor"]


def _original_length(config: Mapping[str, Any], fields: Mapping[str, Any]) -> Any:
    """Trained context; a value beside the rope settings wins over one inside (transformers)."""
    beside = config.get("original_max_position_embeddings")
    return beside if beside is not None else fields.get("original_max_position_embeddings")


def _given(fields: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The named fields that aren't null: RopeScaling's defaults stand in for the others."""
    return {name: fields[name] for name in names if fields.get(name) is not None}


def _read_default(config: Any, fields: Any, where: str) -> RopeScaling:
    return RopeScaling()


def _read_linear(config: Any, fields: Mapping[str, Any], where: str) -> RopeScaling:
    return RopeScaling(kind="linear", factor=_factor(fields, where))


def _read_dynamic(config: Any, fields: Mapping[str, Any], where: str) -> RopeScaling:
    # transformers measures the length against max_position_embeddings, whatever else is given.
    return RopeScaling(kind="dynamic", factor=_factor(fields, where))


def _read_llama3(
    config: Mapping[str, Any], fields: Mapping[str, Any], where: str
) -> RopeScaling:
    return RopeScaling(
        kind="llama3",
        factor=_factor(fields, where),
        original_max_position=_original_length(config, fields),
        **_given(fields, _ROPE_FIELDS["llama3"]),
    )


def _read_yarn(config: Mapping[str, Any], fields: Mapping[str, Any], where: str) -> RopeScaling:
    original, factor = _original_length(config, fields), fields.get("factor")
    scaling = RopeScaling(
        kind="yarn",
        factor=1.0 if factor is None else factor,
        original_max_position=original,
        **_given(fields, _ROPE_FIELDS["yarn"]),
    )
    if factor is None:  # DeepSeek's convention: the ratio of the two lengths
        longest = _max_position(config)
        if original is None or not isinstance(longest, int) or not original <= longest <= 2**30:
            raise ConfigError(
                f"{where}.factor", None,
                "a number >= 1, or original_max_position_embeddings to compute it from",
            )  # fmt: skip
        scaling = dataclasses.replace(scaling, factor=longest / original)
    return scaling


_ROPE_READERS = {
    "default": _read_default,
    "linear": _read_linear,
    "dynamic": _read_dynamic,
    "llama3": _read_llama3,
    "yarn": _read_yarn,
}


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `config_from_hf`: what a config.json says for this architecture.

    Biases are written as far as Hugging Face's fields go: a family that has them always or never,
    or `attention_bias`, which means q, k, v and o together.

    Raises:
      ConfigError: no config.json says this (such as windows of different sizes).
    """
    family, rope = config.family, config.rope_scaling
    windows = {window for window in config.layer_windows if window is not None}
    if len(windows) > 1:
        raise ConfigError("layer_windows", config.layer_windows, "one size for all layers")
    raw: dict[str, Any] = {
        "model_type": family,
        "architectures": [f"{family.capitalize()}ForCausalLM"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tied_embeddings,
        "hidden_act": config.hidden_act,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids) or None,
        "sliding_window": min(windows, default=None),
        "attention_bias": config.qkv_bias and config.o_bias,
        "mlp_bias": config.mlp_bias,
    }
    if windows:
        raw["use_sliding_window"] = True
        raw["layer_types"] = [_LAYER_TYPES[window is not None] for window in config.layer_windows]
    if rope.kind != "none":
        fields = {name: getattr(rope, name) for name in ("factor", *_ROPE_FIELDS[rope.kind])}
        fields["original_max_position_embeddings"] = rope.original_max_position
        given = {name: value for name, value in fields.items() if value is not None}
        raw["rope_scaling"] = {"rope_type": rope.kind, **given}
    said = config_from_hf(raw)
    for field in dataclasses.fields(ModelConfig):
        ours, theirs = getattr(config, field.name), getattr(said, field.name)
        if ours != theirs and not field.name.endswith("_bias"):
            raise ConfigError(field.name, ours, f"{theirs}, for a {family} model's config.json")
    return raw


@dataclasses.dataclass(frozen=True)
class ParamSource:
    """Where one of our parameters comes from.

    Attributes:
      names: Hugging Face tensors, in the order they stand along our output axis.
      transpose: whether theirs is `[out, in]` and ours `[in, out]`.
      shapes: shape of each tensor as Hugging Face stores it, to check files against.
    """

    names: tuple[str, ...]
    transpose: bool
    shapes: tuple[tuple[int, ...], ...]

    def join(self, tensors: Sequence[np.ndarray]) -> np.ndarray:
        """Our array of theirs: concatenated along their first axis, then transposed."""
        array = tensors[0] if len(tensors) == 1 else np.concatenate(tensors, axis=0)
        return np.ascontiguousarray(array.T) if self.transpose else array

    def split(self, array: np.ndarray) -> dict[str, np.ndarray]:
        """Their tensors, by name, of our (unpacked) array: the inverse of `join`."""
        whole = array.T if self.transpose else array
        ends = np.cumsum([shape[0] for shape in self.shapes])[:-1]
        return dict(zip(self.names, np.split(whole, ends, axis=0), strict=True))


def hf_tensor_map(config: ModelConfig) -> dict[str, ParamSource]:
    """Every parameter of the decoder by our dotted name, with the tensors it is made of."""
    d, f, v = config.hidden_size, config.intermediate_size, config.vocab_size
    q, kv = config.query_size, config.kv_size
    table: dict[str, ParamSource] = {
        "embed.embedding": ParamSource(("model.embed_tokens.weight",), False, ((v, d),)),
        "norm.scale": ParamSource(("model.norm.weight",), False, ((d,),)),
    }

    def linear(name: str, parts: Mapping[str, int], features: int, bias: bool) -> None:
        names, widths = tuple(parts), tuple(parts.values())
        table[f"{name}.kernel"] = ParamSource(
            tuple(f"{part}.weight" for part in names), True,
            tuple((width, features) for width in widths),
        )  # fmt: skip
        if bias:
            table[f"{name}.bias"] = ParamSource(
                tuple(f"{part}.bias" for part in names), False,
                tuple((width,) for width in widths),
            )  # fmt: skip

    def norm(name: str, source: str, features: int) -> None:
        table[f"{name}.scale"] = ParamSource((f"{source}.weight",), False, ((features,),))

    for index in range(config.num_layers):
        ours, theirs = f"layers.{index}", f"model.layers.{index}"
        attention, mlp = f"{theirs}.self_attn", f"{theirs}.mlp"
        norm(f"{ours}.input_norm", f"{theirs}.input_layernorm", d)
        qkv = {f"{attention}.q_proj": q, f"{attention}.k_proj": kv, f"{attention}.v_proj": kv}
        linear(f"{ours}.attention.qkv", qkv, d, config.qkv_bias)
        linear(f"{ours}.attention.o", {f"{attention}.o_proj": d}, q, config.o_bias)
        if config.qk_norm:
            norm(f"{ours}.attention.q_norm", f"{attention}.q_norm", config.head_dim)
            norm(f"{ours}.attention.k_norm", f"{attention}.k_norm", config.head_dim)
        norm(f"{ours}.post_norm", f"{theirs}.post_attention_layernorm", d)
        gate_up = {f"{mlp}.gate_proj": f, f"{mlp}.up_proj": f}
        linear(f"{ours}.mlp.gate_up", gate_up, d, config.mlp_bias)
        linear(f"{ours}.mlp.down", {f"{mlp}.down_proj": d}, f, config.mlp_bias)
    if not config.tied_embeddings:
        linear("lm_head", {"lm_head": v}, d, False)
    return table
