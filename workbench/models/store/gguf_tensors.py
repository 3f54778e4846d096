"""GGUF tensors to HF state-dict entries: names, RoPE layout and norm offsets.

Two conventions differ. llama.cpp interleaves the two halves of each rotary head in `llama` files
(pairs ``(0, 1), (2, 3), ...``), where HF rotates ``(i, i + head_dim / 2)``: q and k rows go back.
And `gemma3` files store ``1 + w`` for each RMSNorm, where HF stores ``w``.
"""

from __future__ import annotations

import re

import torch

from workbench.models.store.errors import BrokenModelError, UnsupportedModelError
from workbench.models.store.gguf_config import ConfigDict
from workbench.models.store.gguf_file import GgufFile

_GLOBAL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}

_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

_QK_NORM_NAMES = {
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}

_LAYER_NAMES_BY_ARCHITECTURE = {
    "llama": _LAYER_NAMES,
    "qwen2": _LAYER_NAMES,
    "qwen3": _LAYER_NAMES | _QK_NORM_NAMES,
    "gemma3": _LAYER_NAMES
    | _QK_NORM_NAMES
    | {
        # Gemma norms both sides of each block, so the names shift by one place.
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
}

#: Consumed by the config (see `gguf_config`), not weights.
_NOT_WEIGHTS = frozenset({"rope_freqs.weight"})

_LAYER_TENSOR = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


def hf_names(file: GgufFile, config: ConfigDict) -> dict[str, str]:
    """Map each weight of `file` to its HF name, GGUF name first, in file order.

    Raises
    ------
    UnsupportedModelError
        If the file holds a tensor that the architecture does not have.
    BrokenModelError
        If a tensor that the architecture needs is absent.
    """
    layer_names = _LAYER_NAMES_BY_ARCHITECTURE[file.architecture]
    mapping: dict[str, str] = {}
    for name in file.tensors:
        if name in _NOT_WEIGHTS:
            continue
        hf_name = _hf_name(name, layer_names)
        if hf_name is None:
            raise UnsupportedModelError(
                f"{file.path}: tensor {name!r} has no place in a {config['model_type']} model"
            )
        mapping[name] = hf_name
    missing = sorted(_required_names(layer_names, config) - set(mapping))
    if missing:
        raise BrokenModelError(
            f"{file.path}: {len(missing)} tensors are missing, first {missing[0]!r}; get it again"
        )
    return mapping


def _hf_name(name: str, layer_names: dict[str, str]) -> str | None:
    if name in _GLOBAL_NAMES:
        return _GLOBAL_NAMES[name]
    match = _LAYER_TENSOR.fullmatch(name)
    if match is None or match[2] not in layer_names:
        return None
    return f"model.layers.{match[1]}.{layer_names[match[2]]}.{match[3]}"


def _required_names(layer_names: dict[str, str], config: ConfigDict) -> set[str]:
    layers = range(config["num_hidden_layers"])
    required = {f"blk.{layer}.{name}.weight" for layer in layers for name in layer_names}
    biased: tuple[str, ...] = ()
    if config["model_type"] == "qwen2" or config.get("attention_bias"):
        biased += ("attn_q", "attn_k", "attn_v")
    if config["model_type"] != "qwen2" and config.get("attention_bias"):
        biased += ("attn_output",)
    if config.get("mlp_bias"):
        biased += ("ffn_gate", "ffn_up", "ffn_down")
    required |= {f"blk.{layer}.{name}.bias" for layer in layers for name in biased}
    return required | {"token_embd.weight", "output_norm.weight"}


def hf_tensor(file: GgufFile, name: str, config: ConfigDict) -> torch.Tensor:
    """Tensor `name` of `file`, dequantised to fp32 and in HF's layout.

    Returns
    -------
    torch.Tensor
        fp32, contiguous, shape as in the HF state dict (``[out_features, in_features]``).
    """
    values = file.dequantize(name)
    if file.architecture == "llama" and ".attn_q." in name:
        return unpermute_rope(values, config["num_attention_heads"])
    if file.architecture == "llama" and ".attn_k." in name:
        return unpermute_rope(values, config["num_key_value_heads"])
    if file.architecture == "gemma3" and name.endswith("norm.weight"):
        return values - 1.0
    return values


def unpermute_rope(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows of a q or k projection from interleaved pairs to HF's split halves.

    Parameters
    ----------
    weight
        Weight ``[num_heads * head_dim, in_features]`` or bias ``[num_heads * head_dim]``.
    num_heads
        Query heads for q, key/value heads for k.
    """
    rows = weight.shape[0]
    if rows % (2 * num_heads):
        raise BrokenModelError(f"{rows} rows do not split into {num_heads} rotary heads")
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, *weight.shape[1:])
    return pairs.transpose(1, 2).reshape(weight.shape).contiguous()
