"""GGUF file to an HF folder: safetensors, config and tokenizer, dequantised by this project.

Weights are saved in bf16 by default. A Q4 or Q8 value is a small integer times an fp16 scale, so
it is not exactly a bf16 number; the rounding (relative 2**-9 at most) is far below the
quantisation's own error, and halves the folder. Everything that runs the model, HF included, loads
this folder, so comparisons between them are between equal weights.

Transformers' own GGUF path is not used: it takes about ten times as long, and models loaded by it
cannot be saved (checked with Transformers 5.23).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from workbench.models.store.errors import UnsupportedModelError
from workbench.models.store.gguf_config import ConfigDict, gguf_config
from workbench.models.store.gguf_file import GgufFile, GgufTensor
from workbench.models.store.gguf_tensors import hf_names, hf_tensor
from workbench.models.store.gguf_tokenizer import save_tokenizer
from workbench.models.store.integrity import INDEX_NAME, WEIGHTS_NAME

STORAGE_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
MAX_SHARD_BYTES = 4 << 30


def convert_gguf(
    path: str | Path,
    out: str | Path,
    *,
    dtype: str = "bfloat16",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    on_bytes: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Convert one GGUF file into an HF model folder.

    Parameters
    ----------
    path
        The ``.gguf`` file.
    out
        An existing folder to write into. Not atomic: the caller passes a temporary one.
    dtype
        Storage dtype of the weights, ``"bfloat16"`` or ``"float32"``.
    max_shard_bytes
        Size at which a new safetensors file is begun.
    on_bytes
        Called with the number of GGUF bytes done, after each tensor.

    Returns
    -------
    dict
        What the manifest records: architecture, original quantisation, storage dtype.

    Raises
    ------
    UnsupportedModelError
        For an architecture, tokenizer or tensor type that is not supported.
    BrokenModelError
        For a truncated or incomplete file.
    """
    if dtype not in STORAGE_DTYPES:
        raise UnsupportedModelError(f"storage dtype {dtype!r}; valid: {', '.join(STORAGE_DTYPES)}")
    file, folder = GgufFile(path), Path(out)
    config = gguf_config(file, dtype)
    names = hf_names(file, config)
    # The tokenizer before the weights: an unsupported one fails before the long part.
    save_tokenizer(file, folder)
    _write_json(folder / "config.json", {k: v for k, v in config.items() if v is not None})
    _write_json(folder / "generation_config.json", _generation_config(file))
    _save_weights(file, names, config, folder, max_shard_bytes, on_bytes)
    return {
        "format": "gguf",
        "architecture": file.architecture,
        "quantization": file.quantization_summary(),
        "storage_dtype": dtype,
        "note": (
            f"dequantised from GGUF to fp32, then stored as {dtype}; not bit-equal to the weights "
            "that the model was published with"
        ),
    }


def converted_bytes(path: str | Path, dtype: str = "bfloat16") -> int:
    """Bytes that `convert_gguf` is going to write for the weights."""
    return sum(_stored_bytes(t, dtype) for t in GgufFile(path).tensors.values())


def _stored_bytes(tensor: GgufTensor, dtype: str) -> int:
    return tensor.num_elements * STORAGE_DTYPES[dtype].itemsize


def _generation_config(file: GgufFile) -> dict[str, Any]:
    """Token ids that end and pad a generation. An end-of-turn token ends it as EOS does."""
    eos = file.get("tokenizer.ggml.eos_token_id")
    turn = file.get("tokenizer.ggml.eot_token_id")
    ends = [index for index in dict.fromkeys((eos, turn)) if index is not None]
    ids = {
        "bos_token_id": file.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": file.get("tokenizer.ggml.padding_token_id"),
    }
    return {key: value for key, value in ids.items() if value is not None}


def _save_weights(
    file: GgufFile,
    names: dict[str, str],
    config: ConfigDict,
    folder: Path,
    max_shard_bytes: int,
    on_bytes: Callable[[int], None] | None,
) -> None:
    dtype = config["dtype"]
    shards = _plan_shards(file, names, dtype, max_shard_bytes)
    weight_map: dict[str, str] = {}
    total_bytes = 0
    for number, shard in enumerate(shards, start=1):
        filename = (
            WEIGHTS_NAME
            if len(shards) == 1
            else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        )
        weights: dict[str, torch.Tensor] = {}
        for name in shard:
            values = hf_tensor(file, name, config)
            weights[names[name]] = values.to(STORAGE_DTYPES[dtype])
            weight_map[names[name]] = filename
            total_bytes += weights[names[name]].nbytes
            if on_bytes is not None:
                on_bytes(file.tensors[name].num_bytes)
        save_file(weights, folder / filename, metadata={"format": "pt"})
    if len(shards) > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        _write_json(folder / INDEX_NAME, index)


def _plan_shards(
    file: GgufFile, names: dict[str, str], dtype: str, max_shard_bytes: int
) -> list[list[str]]:
    """GGUF names in file order, cut so that no shard passes `max_shard_bytes` if it can."""
    shards: list[list[str]] = [[]]
    used = 0
    for name in names:
        size = _stored_bytes(file.tensors[name], dtype)
        if shards[-1] and used + size > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
