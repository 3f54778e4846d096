"""GGUF metadata to an HF config, for the decoder architectures that the workbench runs.

The result is a plain dictionary, ready for ``config.json``: building it imports no model class.
Everything the file states is written out, also where it equals the config class's default, since
those defaults are one checkpoint's values.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from workbench.models.store.errors import BrokenModelError, UnsupportedModelError
from workbench.models.store.gguf_file import GgufFile

#: Llama 3.1's constants for its RoPE scaling; the file holds only the resulting factors.
LLAMA3_LOW_FREQ_FACTOR = 1.0
LLAMA3_HIGH_FREQ_FACTOR = 4.0
LLAMA3_ORIGINAL_CONTEXT = 8192

#: Gemma 3: every sixth layer attends to everything, with its own RoPE base for the others.
GEMMA3_SLIDING_PATTERN = 6
GEMMA3_LOCAL_ROPE_BASE = 10_000.0
#: Only the 27B model scales attention by hidden_size / num_heads; the file does not say so.
GEMMA3_27B_NUM_LAYERS = 62

ConfigDict = dict[str, Any]


def gguf_config(file: GgufFile, dtype: str) -> ConfigDict:
    """HF config of the model in `file`.

    Parameters
    ----------
    file
        An open GGUF file.
    dtype
        Name of the dtype that the weights are going to be saved in, e.g. ``"bfloat16"``.

    Raises
    ------
    UnsupportedModelError
        If the architecture, or a variant of it, is not supported; names the supported ones.
    """
    build = _BUILDERS.get(file.architecture)
    if build is None:
        raise UnsupportedModelError(
            f"{file.path}: GGUF architecture {file.architecture!r} is not supported; "
            f"supported: {', '.join(SUPPORTED_ARCHITECTURES)} (Mistral files say 'llama')"
        )
    if file.arch_get("expert_count", 0):
        raise UnsupportedModelError(
            f"{file.path}: a mixture of {file.arch_get('expert_count')} experts; only dense "
            f"{', '.join(SUPPORTED_ARCHITECTURES)} models are supported in GGUF"
        )
    return {**build(file), **_common(file), "dtype": dtype}


def _common(file: GgufFile) -> ConfigDict:
    """Keys with one meaning in every supported architecture."""
    tensors = file.tensors
    if "token_embd.weight" not in tensors:
        raise BrokenModelError(f"{file.path}: the tensor 'token_embd.weight' is missing")
    vocab_size, hidden_size = tensors["token_embd.weight"].shape
    if hidden_size != file.arch_require("embedding_length"):
        raise BrokenModelError(
            f"{file.path}: token_embd.weight is {hidden_size} wide, but "
            f"embedding_length says {file.arch_require('embedding_length')}"
        )
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": _whole(file, "feed_forward_length"),
        "num_hidden_layers": _whole(file, "block_count"),
        "num_attention_heads": _whole(file, "attention.head_count"),
        "num_key_value_heads": _num_kv_heads(file),
        "max_position_embeddings": _whole(file, "context_length"),
        "rms_norm_eps": _decimal(file.arch_require("attention.layer_norm_rms_epsilon")),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_dropout": 0.0,
        "bos_token_id": file.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": file.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": file.get("tokenizer.ggml.padding_token_id"),
        "use_cache": True,
    }


def _llama(file: GgufFile) -> ConfigDict:
    head_dim = _head_dim(file)
    rotary_dim = file.arch_get("rope.dimension_count", head_dim)
    if rotary_dim != head_dim:
        raise UnsupportedModelError(
            f"{file.path}: RoPE over {rotary_dim} of {head_dim} head dimensions; "
            "a llama file must rotate the whole head"
        )
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "head_dim": head_dim,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in file.tensors,
        "rope_parameters": _rope(file, default_theta=10_000.0),
    }


def _qwen2(file: GgufFile) -> ConfigDict:
    return {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_act": "silu",
        "use_sliding_window": False,
        "rope_parameters": _rope(file, default_theta=10_000.0),
    }


def _qwen3(file: GgufFile) -> ConfigDict:
    return {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_act": "silu",
        "head_dim": _head_dim(file),
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "use_sliding_window": False,
        "rope_parameters": _rope(file, default_theta=10_000.0),
    }


def _gemma3(file: GgufFile) -> ConfigDict:
    head_dim = _head_dim(file)
    num_layers = _whole(file, "block_count")
    scale = head_dim
    if num_layers == GEMMA3_27B_NUM_LAYERS:
        scale = _whole(file, "embedding_length") // _whole(file, "attention.head_count")
    return {
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        "hidden_activation": "gelu_pytorch_tanh",
        "head_dim": head_dim,
        "query_pre_attn_scalar": scale,
        "attention_bias": False,
        "sliding_window": _whole(file, "attention.sliding_window"),
        "layer_types": _gemma3_layer_types(file, num_layers),
        "rope_parameters": {
            "full_attention": _rope(file, default_theta=1_000_000.0),
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": float(file.arch_get("rope.freq_base_swa", GEMMA3_LOCAL_ROPE_BASE)),
            },
        },
        "final_logit_softcapping": file.arch_get("final_logit_softcapping"),
        "attn_logit_softcapping": file.arch_get("attn_logit_softcapping"),
    }


def _gemma3_layer_types(file: GgufFile, num_layers: int) -> list[str]:
    """From the pattern: its period, or whether each layer slides; absent in most files."""
    pattern = file.arch_get("attention.sliding_window_pattern", GEMMA3_SLIDING_PATTERN)
    if isinstance(pattern, int):
        slides = [(layer + 1) % pattern != 0 for layer in range(num_layers)]
    else:
        slides = [bool(value) for value in pattern]
    return ["sliding_attention" if slide else "full_attention" for slide in slides]


def _rope(file: GgufFile, default_theta: float) -> ConfigDict:
    """HF `rope_parameters` from the file's RoPE keys and its `rope_freqs` tensor."""
    theta = float(file.arch_get("rope.freq_base", default_theta))
    kind = file.arch_get("rope.scaling.type", "none")
    if "rope_freqs.weight" in file.tensors:
        return _llama3_rope(file, theta)
    if kind == "none":
        return {"rope_type": "default", "rope_theta": theta}
    factor = float(file.arch_require("rope.scaling.factor"))
    if kind == "linear":
        return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
    if kind == "yarn":
        yarn = {
            "rope_type": "yarn",
            "rope_theta": theta,
            "factor": factor,
            "original_max_position_embeddings": file.arch_require(
                "rope.scaling.original_context_length"
            ),
            "beta_fast": file.arch_get("rope.scaling.yarn_beta_fast"),
            "beta_slow": file.arch_get("rope.scaling.yarn_beta_slow"),
        }
        return {key: value for key, value in yarn.items() if value is not None}
    raise UnsupportedModelError(
        f"{file.path}: RoPE scaling {kind!r} is not supported; "
        "supported: none, linear, yarn, llama3"
    )


def _llama3_rope(file: GgufFile, theta: float) -> ConfigDict:
    """Recover Llama 3.1's scaling parameters from the per-frequency factors of the file.

    The lowest frequency is always scaled by the whole factor, so the largest entry is that factor;
    the other constants are Llama 3.1's, and the factors they give are compared with the file's.
    """
    stored = file.dequantize("rope_freqs.weight").numpy()
    factor = float(stored.max())
    expected = llama3_rope_factors(theta, 2 * stored.size, factor)
    if not np.allclose(stored, expected, rtol=1e-4):
        raise UnsupportedModelError(
            f"{file.path}: its RoPE factors are not those of Llama 3.1's scaling"
        )
    return {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": _decimal(factor),
        "low_freq_factor": LLAMA3_LOW_FREQ_FACTOR,
        "high_freq_factor": LLAMA3_HIGH_FREQ_FACTOR,
        "original_max_position_embeddings": LLAMA3_ORIGINAL_CONTEXT,
    }


def llama3_rope_factors(theta: float, head_dim: int, factor: float) -> np.ndarray:
    """What Llama 3.1 divides each RoPE frequency by.

    Returns
    -------
    np.ndarray
        fp32, shape ``[head_dim / 2]``: 1 for short wavelengths, `factor` for long ones, a smooth
        blend between (Llama 3.1 model card and reference code).
    """
    frequencies = 1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    wavelengths = 2 * math.pi / frequencies
    smooth = (LLAMA3_ORIGINAL_CONTEXT / wavelengths - LLAMA3_LOW_FREQ_FACTOR) / (
        LLAMA3_HIGH_FREQ_FACTOR - LLAMA3_LOW_FREQ_FACTOR
    )
    smooth = np.clip(smooth, 0.0, 1.0)
    return (1.0 / ((1.0 - smooth) / factor + smooth)).astype(np.float32)


def _head_dim(file: GgufFile) -> int:
    stated = file.arch_get("attention.key_length")
    if stated is not None:
        return int(stated)
    return _whole(file, "embedding_length") // _whole(file, "attention.head_count")


def _num_kv_heads(file: GgufFile) -> int:
    if file.arch_get("attention.head_count_kv") is None:
        return _whole(file, "attention.head_count")
    return _whole(file, "attention.head_count_kv")


def _whole(file: GgufFile, key: str) -> int:
    """A value that must be one number for the whole model, not one a layer."""
    value = file.arch_require(key)
    if not isinstance(value, int):
        raise UnsupportedModelError(
            f"{file.path}: {key!r} varies by layer, which no supported architecture has"
        )
    return value


def _decimal(value: float) -> float:
    """The shortest decimal with the same fp32 value: 1e-05 rather than 9.999999747e-06."""
    return float(str(np.float32(value)))


_BUILDERS: dict[str, Callable[[GgufFile], ConfigDict]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma3": _gemma3,
}

SUPPORTED_ARCHITECTURES: tuple[str, ...] = tuple(_BUILDERS)
