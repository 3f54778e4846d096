"""Families: how a Hugging Face config and its weight names map onto a :class:`ModelSpec`.

Adding one is a function from config to spec and an entry in ``FAMILIES``.
"""

from __future__ import annotations

import importlib
import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from workbench.core.errors import UnsupportedError, WorkbenchError
from workbench.models.rope import RopeSpec, rope_from_hf
from workbench.models.spec import LayerSpec, ModelSpec
from workbench.slots.attention import AttentionLayer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True, slots=True)
class WeightNames:
    """Names of a family's weights in its checkpoints, without ``.weight`` and ``.bias``.

    Names of a layer's parts follow the layer's own prefix. The norms are named by what they come
    before or after; a family with plain pre-norms has no ``*_out_norm``.
    """

    embedding: str = "model.embed_tokens"
    layer_prefix: str = "model.layers.{index}."
    final_norm: str = "model.norm"
    head: str = "lm_head"
    q_proj: str = "self_attn.q_proj"
    k_proj: str = "self_attn.k_proj"
    v_proj: str = "self_attn.v_proj"
    o_proj: str = "self_attn.o_proj"
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    gate_proj: str = "mlp.gate_proj"
    up_proj: str = "mlp.up_proj"
    down_proj: str = "mlp.down_proj"
    attention_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    attention_out_norm: str = ""
    mlp_out_norm: str = ""

    def of_layer(self, index: int, part: str) -> str:
        """Full name of a layer's part, where ``part`` is one of this class's fields."""
        return self.layer_prefix.format(index=index) + str(getattr(self, part))


@dataclass(frozen=True, slots=True)
class Family:
    """One way of writing a decoder down.

    Attributes
    ----------
    architectures
        Names that ``config.architectures`` may carry; the first is the text-only one.
    model_types
        Names that ``config.model_type`` may carry; the first belongs to the first architecture.
    to_spec
        From the text config to what differs from the defaults of :func:`_spec`.
    config_type
        Model type whose Transformers config reads this family's, where Transformers has none for
        it.
    renames
        Prefixes of checkpoint names and what they are read as; the first that fits is used.
    ignored
        Prefixes (after renaming) of weights that the text model does not have.
    """

    architectures: tuple[str, ...]
    model_types: tuple[str, ...]
    to_spec: Callable[[Any], dict[str, Any]]
    names: WeightNames = WeightNames()
    config_type: str = ""
    renames: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()


# -- config to spec -------------------------------------------------------------------------------


def _head_dim(config: Any) -> int:
    explicit = getattr(config, "head_dim", None)
    return int(explicit or config.hidden_size // config.num_attention_heads)


def _windows_by_type(config: Any) -> list[int | None]:
    """Sliding window of each layer, from ``layer_types``."""
    return [
        config.sliding_window if kind == "sliding_attention" else None
        for kind in config.layer_types
    ]


def _layers(
    config: Any,
    windows: list[int | None],
    ropes: list[RopeSpec] | None = None,
    scale: float | None = None,
) -> tuple[LayerSpec, ...]:
    head_dim = _head_dim(config)
    if ropes is None:
        ropes = [rope_from_hf(config.rope_parameters, head_dim)] * config.num_hidden_layers
    return tuple(
        LayerSpec(
            attention=AttentionLayer(
                index=index,
                num_heads=config.num_attention_heads,
                num_kv_heads=config.num_key_value_heads,
                head_dim=head_dim,
                scale=head_dim**-0.5 if scale is None else scale,
                sliding_window=windows[index],
            ),
            rope=ropes[index],
        )
        for index in range(config.num_hidden_layers)
    )


def _llama(config: Any) -> dict[str, Any]:
    return {
        "layers": _layers(config, [None] * config.num_hidden_layers),
        "qkv_bias": config.attention_bias,
        "o_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
    }


def _mistral(config: Any) -> dict[str, Any]:
    return {"layers": _layers(config, [config.sliding_window] * config.num_hidden_layers)}


def _qwen2(config: Any) -> dict[str, Any]:
    return {"layers": _layers(config, _windows_by_type(config)), "qkv_bias": True}


def _qwen3(config: Any) -> dict[str, Any]:
    return {
        "layers": _layers(config, _windows_by_type(config)),
        "qk_norm": True,
        "qkv_bias": config.attention_bias,
        "o_bias": config.attention_bias,
    }


def _gemma3(config: Any) -> dict[str, Any]:
    if config.use_bidirectional_attention:
        raise UnsupportedError(
            "use_bidirectional_attention is set: this is an embedding model, not a decoder. "
            "Only causal Gemma 3 models are supported."
        )
    head_dim = _head_dim(config)
    ropes = [rope_from_hf(config.rope_parameters[kind], head_dim) for kind in config.layer_types]
    # attn_logit_softcapping is a relic of Gemma 2: Transformers does not apply it in Gemma 3.
    layers = _layers(
        config, _windows_by_type(config), ropes, scale=config.query_pre_attn_scalar**-0.5
    )
    return {
        "layers": layers,
        "activation": config.hidden_activation,
        "norm_style": "sandwich",
        "norm_offset": 1.0,
        "qk_norm": True,
        "qkv_bias": config.attention_bias,
        "o_bias": config.attention_bias,
        "embedding_scale": config.hidden_size**0.5,
        "logit_soft_cap": config.final_logit_softcapping,
    }


_GEMMA3_NAMES = WeightNames(
    attention_out_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_out_norm="post_feedforward_layernorm",
)

FAMILIES: tuple[Family, ...] = (
    Family(("LlamaForCausalLM",), ("llama",), _llama),
    Family(("MistralForCausalLM",), ("mistral",), _mistral),
    Family(("Qwen2ForCausalLM",), ("qwen2",), _qwen2),
    # MiMo-7B (arXiv:2505.07608): a Qwen2 with a module behind it that predicts a further token.
    Family(("MiMoForCausalLM",), ("mimo",), _qwen2, config_type="qwen2"),
    Family(("Qwen3ForCausalLM",), ("qwen3",), _qwen3),
    Family(
        ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
        ("gemma3_text", "gemma3"),
        _gemma3,
        names=_GEMMA3_NAMES,
        renames=(
            ("model.language_model.", "model."),
            ("language_model.model.", "model."),
            ("language_model.lm_head.", "lm_head."),
            ("model.vision_tower.", "vision_tower."),
            ("model.multi_modal_projector.", "multi_modal_projector."),
        ),
        ignored=("vision_tower.", "multi_modal_projector."),
    ),
)

_BY_ARCHITECTURE = {name: family for family in FAMILIES for name in family.architectures}
_ARCHITECTURE_OF_TYPE = {
    model_type: name
    for family in FAMILIES
    for name, model_type in zip(family.architectures, family.model_types, strict=True)
}

_preloading: threading.Thread | None = None

ACTIVATIONS = ("gelu_pytorch_tanh", "silu")


def architecture_of(config: PreTrainedConfig | Mapping[str, Any]) -> str:
    """Name of a config's architecture, from ``architectures`` or else from ``model_type``.

    Raises
    ------
    UnsupportedError
        It is none of the supported ones, which are listed.
    """
    get = config.get if isinstance(config, Mapping) else lambda key: getattr(config, key, None)
    listed = get("architectures")
    name = listed[0] if listed else _ARCHITECTURE_OF_TYPE.get(get("model_type") or "", "")
    if name not in _BY_ARCHITECTURE:
        given = name or f"(none; model_type is {get('model_type')!r})"
        raise UnsupportedError(
            f"architecture {given} is not supported. Supported: "
            f"{', '.join(sorted(_BY_ARCHITECTURE))}."
        )
    return str(name)


def family_of(config: PreTrainedConfig | Mapping[str, Any]) -> Family:
    """Family of a config; raises as :func:`architecture_of`."""
    return _BY_ARCHITECTURE[architecture_of(config)]


def config_from_dict(values: Mapping[str, Any]) -> PreTrainedConfig:
    """Turn the content of a ``config.json`` into a Transformers config, which fills in defaults.

    Raises
    ------
    UnsupportedError
        The architecture is not supported.
    WorkbenchError
        A value is missing or of the wrong type.
    """
    architecture = architecture_of(values)
    family = _BY_ARCHITECTURE[architecture]
    model_type = values.get("model_type")
    if model_type not in family.model_types:
        model_type = family.model_types[family.architectures.index(architecture)]
    model_type = family.config_type or model_type
    config_class = _config_class(model_type)
    try:
        config: PreTrainedConfig = config_class.from_dict({**values, "model_type": model_type})
    except Exception as error:  # Transformers raises many kinds for a bad value
        raise WorkbenchError(f"the model's config is not valid: {error}") from error
    config.architectures = [architecture]
    return config


def _config_class(model_type: str) -> Any:
    """Transformers' class for the configs of a type of model.

    Its module is imported without the docstrings that Transformers generates for it: for these it
    would import all models, generation and torch's compiler, which takes longer than all else
    that an engine on a GPU needs before its first token.
    """
    if _preloading is not None:
        # The package puts another module in its place when it is done; an import meanwhile would
        # wait for it, and get the first.
        _preloading.join()
    import transformers

    utils = transformers.utils
    generate = getattr(utils, "auto_docstring", None)
    if generate is None:
        return transformers.CONFIG_MAPPING[model_type]
    utils.auto_docstring = lambda given=None, **_: given if given is not None else lambda obj: obj
    try:
        return transformers.CONFIG_MAPPING[model_type]
    finally:
        utils.auto_docstring = generate


def preload() -> None:
    """Begin to import what :func:`config_from_dict` needs, while the caller waits for a device."""
    global _preloading
    if _preloading is None:
        load = partial(importlib.import_module, "transformers")
        _preloading = threading.Thread(target=load, daemon=True)
        _preloading.start()


def read_config(source: Path | str | PreTrainedConfig | Mapping[str, Any]) -> PreTrainedConfig:
    """Config of a model folder, of the content of a ``config.json``, or as given.

    A folder's ``generation_config.json`` overrides the end-of-sequence ids, as in Transformers.

    Raises
    ------
    WorkbenchError
        A file is missing or not JSON (it is named), or a value is not valid.
    UnsupportedError
        The architecture is not supported.
    """
    if isinstance(source, Mapping):
        return config_from_dict(source)
    if not isinstance(source, (str, Path)):
        architecture_of(source)
        return source
    folder = Path(source)
    values = _read_json(folder / "config.json")
    if (folder / "generation_config.json").exists():
        generation = _read_json(folder / "generation_config.json")
        if generation.get("eos_token_id") is not None:
            values["eos_token_id"] = generation["eos_token_id"]
    return config_from_dict(values)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise WorkbenchError(
            f"{path} does not exist. A model folder holds config.json and safetensors files."
        ) from None
    except (OSError, ValueError) as error:
        raise WorkbenchError(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise WorkbenchError(f"{path} does not hold a JSON object.")
    return values


def spec_from_hf(config: PreTrainedConfig | Mapping[str, Any]) -> ModelSpec:
    """Describe the decoder of a Hugging Face config.

    Parameters
    ----------
    config
        A Transformers config, or the content of a ``config.json``.

    Raises
    ------
    UnsupportedError
        The architecture, the rotary embedding or the activation is not supported; the message
        lists what is.
    """
    config = read_config(config)
    architecture = architecture_of(config)
    text = config.get_text_config()
    fields = {**_common(config, text), **_BY_ARCHITECTURE[architecture].to_spec(text)}
    if fields["activation"] not in ACTIVATIONS:
        raise UnsupportedError(
            f"activation {fields['activation']!r} is not supported. Supported: "
            f"{', '.join(ACTIVATIONS)}."
        )
    return ModelSpec(architecture=architecture, **fields)


def _common(config: Any, text: Any) -> dict[str, Any]:
    """Fields that every family reads alike."""
    eos = getattr(text, "eos_token_id", None)
    if config is not text:
        eos = getattr(config, "eos_token_id", None) or eos
    dtype = getattr(text, "dtype", None) or getattr(config, "dtype", None)
    return {
        "vocab_size": text.vocab_size,
        "hidden_size": text.hidden_size,
        "intermediate_size": text.intermediate_size,
        "max_position_embeddings": text.max_position_embeddings,
        "activation": getattr(text, "hidden_act", None),
        "norm_eps": text.rms_norm_eps,
        "tie_word_embeddings": bool(config.tie_word_embeddings),
        "initializer_range": text.initializer_range,
        "bos_token_id": getattr(text, "bos_token_id", None),
        "eos_token_ids": _as_tuple(eos),
        "dtype": getattr(torch, dtype) if isinstance(dtype, str) else dtype,
        "num_prediction_layers": int(getattr(text, "num_nextn_predict_layers", None) or 0),
    }


def _as_tuple(ids: int | list[int] | None) -> tuple[int, ...]:
    if ids is None:
        return ()
    return (ids,) if isinstance(ids, int) else tuple(ids)
