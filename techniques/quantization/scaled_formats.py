"""Checkpoints whose weights and activations have 8 bits: what they say of themselves.

==============================  ===================================================================
compressed-tensors              ``X.weight`` ``[N, K]`` fp8 (``float-quantized``) or int8
                                (``int-quantized``), ``X.weight_scale`` ``[N, 1]``, ``[1]`` or of
                                blocks ``[ceil(N / 128), ceil(K / 128)]``, and of static
                                activations ``X.input_scale`` ``[1]``
``quant_method: fp8``           the same blocks with scales called ``X.weight_scale_inv``, which
                                are factors in spite of their name
==============================  ===================================================================

Sources: https://github.com/vllm-project/compressed-tensors, release 0.20; DeepSeek-V3's repository
(README_WEIGHTS.md).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.scaled_linear import BLOCK_SIZE
from techniques.quantization.compressed_tensors import METHOD
from techniques.quantization.weights import FP8Scheme, QuantizedWeight, Scheme
from workbench.core.errors import UnsupportedError

WEIGHT, SCALE, INPUT_SCALE, BLOCK_SCALE = (
    "weight", "weight_scale", "input_scale", "weight_scale_inv",
)  # fmt: skip
FLOAT_FORMAT, INT_FORMAT = "float-quantized", "int-quantized"
BLOCK_METHOD = "fp8"


@dataclass(frozen=True, slots=True)
class ScaledScheme:
    """How a checkpoint has its weights and expects its activations.

    Attributes
    ----------
    format
        One of :data:`kernels.scaled_linear.FORMATS`.
    per_tensor
        Whether a layer of the checkpoint has one scale, and not one an output.
    is_static
        Whether a layer's activations have one scale, which the checkpoint holds.
    kept
        Layers in the model's dtype: names, or patterns behind ``re:``.
    scale
        What the checkpoint calls the scales of weights.
    """

    format: str
    per_tensor: bool = False
    is_static: bool = False
    kept: tuple[str, ...] = ()
    scale: str = SCALE


def read_scaled_config(config: Mapping[str, Any]) -> ScaledScheme:
    """The scheme of a checkpoint, from its ``quantization_config``.

    Raises
    ------
    UnsupportedError
        Another method or format, or a strategy that no product here follows; it is named.
    """
    method = config.get("quant_method")
    if method == METHOD:
        return _compressed(config)
    if method == BLOCK_METHOD:
        return _blocks(config)
    raise UnsupportedError(
        f"the checkpoint is quantised by {method!r}; {METHOD!r} in formats {FLOAT_FORMAT!r} and "
        f"{INT_FORMAT!r}, and {BLOCK_METHOD!r} in blocks of {BLOCK_SIZE} x {BLOCK_SIZE} are read."
    )


def _compressed(config: Mapping[str, Any]) -> ScaledScheme:
    groups = list(config.get("config_groups", {}).values())
    forms = {config.get("format"), *(group.get("format") for group in groups)} - {None}
    if len(forms) != 1 or len(groups) != 1 or groups[0].get("targets") != ["Linear"]:
        raise UnsupportedError(
            f"the checkpoint has format {', '.join(map(str, sorted(forms)))} and {len(groups)} "
            f"groups of layers; format {FLOAT_FORMAT!r} or {INT_FORMAT!r} with one group for all "
            "Linear layers is read."
        )
    form = forms.pop()
    weights = dict(groups[0].get("weights") or {})
    inputs = groups[0].get("input_activations")
    if form not in (FLOAT_FORMAT, INT_FORMAT) or not inputs:
        raise UnsupportedError(
            f"the checkpoint has format {form!r} and activations "
            f"{'in 16 bits' if not inputs else 'quantised'}; {FLOAT_FORMAT!r} and {INT_FORMAT!r} "
            "with activations in 8 bits are read. Of format 'pack-quantized', choose "
            "engine/linear=packed_checkpoint."
        )
    kind = "float" if form == FLOAT_FORMAT else "int"
    strategy, of_inputs = weights.get("strategy"), inputs.get("strategy")
    is_static = not inputs.get("dynamic", False)
    blocks = weights.get("block_structure")
    fits = all(
        part.get("type") == kind and part.get("num_bits") == 8 and part.get("symmetric", True)
        for part in (weights, inputs)
    )
    if strategy == "block":
        fits &= kind == "float" and list(blocks or ()) == [BLOCK_SIZE, BLOCK_SIZE]
        fits &= of_inputs == "group" and inputs.get("group_size") == BLOCK_SIZE and not is_static
    else:
        fits &= strategy in ("channel", "tensor")
        if is_static:
            fits &= of_inputs == "tensor" and kind == "float"
        else:
            fits &= of_inputs in ("token", "tensor")
    if not fits:
        raise UnsupportedError(
            f"the checkpoint's weights are {weights}, its activations {dict(inputs)}. Read are "
            "symmetric ones of 8 bits: weights with strategy channel or tensor, with activations "
            "of strategy token or tensor that are dynamic, or of fp8 tensor that are static; and "
            f"fp8 in blocks of {BLOCK_SIZE} x {BLOCK_SIZE} with groups of {BLOCK_SIZE} activations."
        )
    if config.get("kv_cache_scheme"):
        raise UnsupportedError(
            "the checkpoint has scales for an 8-bit KV cache, which are not read; choose a "
            "checkpoint without kv_cache_scheme."
        )
    format = "int8" if kind == "int" else "fp8"
    if kind == "float" and (is_static or strategy == "block"):
        format = "fp8_tensor" if is_static else "fp8_block"
    kept = tuple(config.get("ignore") or ())
    return ScaledScheme(format, strategy == "tensor", is_static, kept)


def _blocks(config: Mapping[str, Any]) -> ScaledScheme:
    size, scheme = config.get("weight_block_size"), config.get("activation_scheme", "dynamic")
    if list(size or ()) != [BLOCK_SIZE, BLOCK_SIZE] or scheme != "dynamic":
        raise UnsupportedError(
            f"the checkpoint has fp8 weights in blocks of {size} and {scheme} activations; blocks "
            f"of [{BLOCK_SIZE}, {BLOCK_SIZE}] and dynamic activations are read."
        )
    if config.get("fmt", "e4m3") != "e4m3":
        raise UnsupportedError(f"the checkpoint's fp8 is {config['fmt']!r}; e4m3 is read.")
    # Entries name modules with all below them. Writers leave the head out without a word.
    names = [*(config.get("modules_to_not_convert") or ()), "lm_head"]
    kept = tuple(f"re:{re.escape(name)}(\\.|$)" for name in names)
    return ScaledScheme("fp8_block", kept=kept, scale=BLOCK_SCALE)


def scaled_config(scheme: Scheme, kept: Sequence[str]) -> dict[str, Any]:
    """``quantization_config`` of compressed-tensors for what :func:`scaled_tensors` writes;
    ``kept`` stay as they are."""
    is_static = isinstance(scheme, FP8Scheme) and scheme.is_static
    kind = "float" if isinstance(scheme, FP8Scheme) else "int"
    common = {"num_bits": 8, "type": kind, "symmetric": True, "group_size": None}
    strategy = "tensor" if is_static else "channel"
    weights = {**common, "strategy": strategy, "dynamic": False, "observer": "minmax"}
    inputs = {**common, "strategy": "token", "dynamic": True, "observer": None}
    if is_static:
        inputs |= {"strategy": "tensor", "dynamic": False, "observer": "minmax"}
    return {
        "quant_method": METHOD,
        "format": INT_FORMAT if kind == "int" else FLOAT_FORMAT,
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
        },
        "ignore": list(kept),
    }


def scaled_tensors(name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
    """The tensors of a layer, by their names in a checkpoint; scales in fp32, as they are
    multiplied."""
    is_fp8 = isinstance(weight.scheme, FP8Scheme)
    scales = weight.scales.float().contiguous()
    found = {f"{name}.{WEIGHT}": weight.codes if is_fp8 else weight.codes.to(torch.int8)}
    if weight.input_scale is not None:
        found[f"{name}.{INPUT_SCALE}"] = weight.input_scale.float()
        scales = scales[:1, 0].clone()
    found[f"{name}.{SCALE}"] = scales
    return found


def check_scales(name: str, scales: Tensor) -> None:
    """Raise where scales are missing values, or none that a number can be divided by."""
    if not bool(((scales > 0) & scales.isfinite()).all()):
        raise UnsupportedError(
            f"layer {name} has scales that are no positive finite numbers: the checkpoint is "
            "broken, or not written to its end."
        )
