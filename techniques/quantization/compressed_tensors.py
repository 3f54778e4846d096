"""The compressed-tensors format, ``pack-quantized``: what vLLM and Transformers read.

A layer ``X`` has ``X.weight_packed`` ``[N, ceil(K / n)]`` int32, ``n = 32 / bits`` codes a word,
the first in the lowest bits and every code counted from the least; ``X.weight_scale`` ``[N, G]``;
``X.weight_shape`` ``[2]`` int64; and with zero points ``X.weight_zero_point`` ``[ceil(N / n), G]``,
packed along the outputs. Where groups are of inputs in another order, ``X.weight_g_idx`` ``[K]``
has the group of each. The model's ``config.json`` has the scheme in ``quantization_config``.
Source: https://github.com/vllm-project/compressed-tensors, release 0.20.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from techniques.quantization.weights import QuantizedWeight, WeightScheme
from workbench.core.errors import ConfigError, UnsupportedError

METHOD, FORMAT = "compressed-tensors", "pack-quantized"
PACKED, SCALE, ZERO, SHAPE = "weight_packed", "weight_scale", "weight_zero_point", "weight_shape"
INDEX = "weight_g_idx"
_ORDERS = ("group", "weight", "dynamic", "static")  # the last two are other names of the first


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Codes ``[R, C]`` from 0 on, ``32 / bits`` of them in an int32: ``[R, ceil(C / n)]``."""
    per_word = 32 // bits
    padded = F.pad(codes.to(torch.int64), (0, -codes.shape[1] % per_word))
    groups = padded.reshape(len(codes), -1, per_word)
    words = (groups << (bits * torch.arange(per_word))).sum(2)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def unpack_words(words: Tensor, bits: int, count: int) -> Tensor:
    """What :func:`pack_words` packed: ``count`` codes a row, int16."""
    shifts = bits * torch.arange(32 // bits, dtype=torch.int32, device=words.device)
    codes = (words.unsqueeze(2) >> shifts) & ((1 << bits) - 1)
    return codes.reshape(len(words), -1)[:, :count].to(torch.int16)


def tensors_of(name: str, weight: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a layer, by their names in a checkpoint; scales in ``dtype``."""
    scheme = weight.scheme
    assert isinstance(scheme, WeightScheme)
    if weight.group_index is not None:
        raise UnsupportedError(
            f"layer {name} has groups of inputs in another order, which no file is written with: "
            "let groups be consecutive."
        )
    found = {
        f"{name}.{PACKED}": pack_words(weight.codes - scheme.least, scheme.bits),
        f"{name}.{SCALE}": weight.scales.to(dtype).contiguous(),
        f"{name}.{SHAPE}": torch.tensor(weight.codes.shape),
    }
    if weight.zeros is not None:
        found[f"{name}.{ZERO}"] = pack_words(weight.zeros.T, scheme.bits).T.contiguous()
    return found


def codes_of(
    packed: Tensor, zeros: Tensor | None, scheme: WeightScheme, in_features: int
) -> tuple[Tensor, Tensor | None]:
    """Codes ``[N, K]`` and zero points ``[N, G]`` of a layer, as :class:`QuantizedWeight` has
    them."""
    codes = unpack_words(packed, scheme.bits, in_features) + scheme.least
    if zeros is None:
        return codes, None
    return codes, unpack_words(zeros.T.contiguous(), scheme.bits, len(packed)).T.contiguous()


def config_of(scheme: WeightScheme, kept: Sequence[str]) -> dict[str, Any]:
    """``quantization_config``; ``kept`` are the linear layers that stay as they are."""
    weights = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": not scheme.has_zeros,
        "strategy": "group" if scheme.group_size else "channel",
        "group_size": scheme.group_size or None,
        "dynamic": False,
        "observer": "minmax",
    }
    group = {"targets": ["Linear"], "weights": weights}
    return {
        "quant_method": METHOD,
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {**group, "input_activations": None}},
        "ignore": list(kept),
    }


def read_config(config: Mapping[str, Any]) -> tuple[WeightScheme, tuple[str, ...]]:
    """The scheme of a checkpoint, and the layers it leaves out: names, or patterns behind ``re:``.

    Raises
    ------
    UnsupportedError
        Another method, another format, or a scheme that is more than rounded weights; it is named.
    """
    method = config.get("quant_method")
    if method != METHOD:
        raise UnsupportedError(
            f"the checkpoint is quantised by {method!r}; {METHOD!r} in format {FORMAT!r} is read."
        )
    groups = list(config.get("config_groups", {}).values())
    forms = {config.get("format"), *(group.get("format") for group in groups)} - {None}
    if forms - {FORMAT} or len(groups) != 1 or groups[0].get("targets") != ["Linear"]:
        raise UnsupportedError(
            f"the checkpoint has format {', '.join(map(str, sorted(forms)))} and {len(groups)} "
            f"groups of layers; format {FORMAT!r} with one group for all Linear layers is read."
        )
    weights = groups[0].get("weights") or {}
    activations = groups[0].get("input_activations")
    known = weights.get("type") == "int" and weights.get("strategy") in ("group", "channel")
    order = weights.get("actorder")
    if not known or activations or order not in (None, False, True, *_ORDERS):
        raise UnsupportedError(
            f"the checkpoint's weights are {weights}, its activations {activations}: integer "
            "weights with scales of groups or of outputs, actorder "
            f"{', '.join(_ORDERS)} or none, and activations as they are, are read."
        )
    size = weights.get("group_size") or 0
    grouped = weights["strategy"] == "group"
    try:
        scheme = WeightScheme(
            weights["num_bits"], int(size) if grouped else 0, not weights.get("symmetric", True)
        )
    except ConfigError as error:
        raise UnsupportedError(f"the checkpoint's scheme: {error}") from error
    return scheme, tuple(config.get("ignore") or ())


def is_ordered_by_group(weights: Mapping[str, Any]) -> bool:
    """Whether layers have ``weight_g_idx``, from the arguments of their weights; other orders are
    those in which columns were rounded, and leave nothing behind."""
    return weights["strategy"] == "group" and weights.get("actorder") in ("group", "dynamic", True)


def is_kept(name: str, ignored: Sequence[str]) -> bool:
    """Whether a layer is among those that a checkpoint leaves out."""
    return any(
        re.match(entry[3:], name) is not None if entry.startswith("re:") else entry == name
        for entry in ignored
    )
