"""GGUF files of tiny models, written by the `gguf` package in llama.cpp's conventions.

    write_gguf(path, tiny_model("llama", vocab_size=VOCAB_SIZE), "llama")
    write_gguf(path, folder, "qwen2", ggml_type="Q4_1", pre="qwen2", drop=("output_norm.weight",))

Tensor names come from the `gguf` package's own table, so they are independent of the converter's.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from tests.helpers.tiny_models import hf_model

#: Room for the 256 bytes, the merged tokens and the special ones.
VOCAB_SIZE = 384
CONTROL, USER_DEFINED, BYTE, NORMAL, UNUSED = 3, 4, 6, 1, 5
MERGES = ["h e", "t he", "Ġ the", "1 2", "Ġ Ġ", "Ġ 1", "e r", "l l", "Ċ Ċ", "ĠĠ ĠĠ", "c a", "ca f"]


def write_gguf(
    path: Path,
    folder: Path,
    architecture: str,
    *,
    ggml_type: str = "F32",
    tokenizer: str = "gpt2",
    pre: str = "smollm",
    drop: Collection[str] = (),
    extra_tensors: Mapping[str, np.ndarray] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Write the model of an HF folder as GGUF; 2-D weights in `ggml_type`, others in F32.

    Parameters
    ----------
    path
        File to write.
    folder
        Tiny HF model, `VOCAB_SIZE` tokens.
    architecture
        GGUF architecture.
    ggml_type
        ``F32``, ``F16``, ``BF16``, ``Q8_0``, ``Q4_1``, ...
    tokenizer
        ``gpt2`` or ``llama``.
    pre
        ``tokenizer.ggml.pre``.
    drop
        GGUF names of tensors to leave out.
    extra_tensors, metadata
        Added to what the model gives; metadata values are int, float, bool or str.
    """
    model = hf_model(folder)
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    _add_config(writer, architecture, config)
    (_add_gpt2_tokenizer if tokenizer == "gpt2" else _add_llama_tokenizer)(writer, pre)
    for key, value in (metadata or {}).items():
        _add_value(writer, key, value)
    quantized = gguf.GGMLQuantizationType[ggml_type]
    for name, values in _tensors(model, architecture).items():
        if name in drop:
            continue
        if values.ndim == 2 and ggml_type != "F32":
            packed = gguf.quants.quantize(values, quantized)
            writer.add_tensor(name, packed, raw_dtype=quantized)
        else:
            writer.add_tensor(name, values)
    for name, values in (extra_tensors or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def permute_rope(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """HF's split halves to interleaved pairs, as llama.cpp's converter does for `llama`."""
    halves = weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def _tensors(model: Any, architecture: str) -> dict[str, np.ndarray]:
    config = model.config
    arch = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    tensors: dict[str, np.ndarray] = {}
    for hf_name, parameter in model.state_dict().items():
        if hf_name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = parameter.float().numpy()
        if architecture == "llama" and "q_proj" in hf_name:
            values = permute_rope(values, config.num_attention_heads)
        if architecture == "llama" and "k_proj" in hf_name:
            values = permute_rope(values, config.num_key_value_heads)
        if architecture == "gemma3" and hf_name.endswith("norm.weight"):
            values = values + np.float32(1.0)
        name = names.get_name(hf_name, try_suffixes=(".weight", ".bias"))
        assert name is not None
        tensors[name] = np.ascontiguousarray(values)
    return tensors


def _add_config(writer: gguf.GGUFWriter, architecture: str, config: Any) -> None:
    head_dim = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(head_dim)
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if architecture == "llama":
        writer.add_rope_dimension_count(head_dim)
    if architecture == "gemma3":
        writer.add_sliding_window(config.sliding_window)


def _add_gpt2_tokenizer(writer: gguf.GGUFWriter, pre: str) -> None:
    special = {"<|endoftext|>": CONTROL, "<|im_start|>": CONTROL, "<|im_end|>": CONTROL}
    tokens = [*special, "<think>", *byte_alphabet()]
    types = [*special.values(), USER_DEFINED] + [NORMAL] * 256
    for merge in MERGES:
        tokens.append(merge.replace(" ", ""))
        types.append(NORMAL)
    while len(tokens) < VOCAB_SIZE:
        tokens.append(f"[PAD{len(tokens)}]")
        types.append(UNUSED)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m['content'] }}{% endfor %}")


def _add_llama_tokenizer(writer: gguf.GGUFWriter, pre: str) -> None:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [2, CONTROL, CONTROL] + [BYTE] * 256
    letters = ["\u2581", *"etaoinshrdlucmfwypvbgkqjxzTHE.,12"]
    words = ["\u2581t", "he", "\u2581the", "\u2581\u2581", "er", "in", "an", "\u2581a", "the"]
    # Better scores first, as SentencePiece numbers its pieces: merged ones before letters.
    pieces = words + letters
    tokens += pieces
    types += [NORMAL] * len(pieces)
    scores = [0.0] * 259 + [-float(rank) for rank in range(len(pieces))]
    while len(tokens) < VOCAB_SIZE:
        tokens.append(f"<pad{len(tokens)}>")
        types.append(UNUSED)
        scores.append(-1e9)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)


def byte_alphabet() -> list[str]:
    """The 256 characters that stand for bytes in byte-level BPE, by byte."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return [bytes_to_unicode()[byte] for byte in range(256)]


def _add_value(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, value)


@torch.no_grad()
def round_norms(folder: Path) -> Path:
    """Round a folder's norm weights to 1/256, so that adding and taking away 1 is exact."""
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    weights = {
        name: (values * 256).round() / 256 if name.endswith("norm.weight") else values
        for name, values in load_file(file).items()
    }
    save_file(weights, file, metadata={"format": "pt"})
    return folder
