"""Linear layers of 4- and 8-bit weights: fewer bytes a token, the same activations.

Codes on a grid of groups of inputs, ``value = (code - zero) * scale``. Products multiply 16-bit
activations (W8A16, W4A16); fp32 ones are rounded to bf16 on their way in.

==================  ===============================================================================
implementation      what serves, and what it leaves out
==================  ===============================================================================
``native``          torch's CPU kernels for a few rows: 8 bits with one scale an output; 4 bits in
                    groups of 32, 64, 128 or 256
``reference``       torch, any device: the weight is written out and multiplied; everything
==================  ===============================================================================

A layer is laid out for one of them when it is packed. The native kernel of 8 bits is for few rows;
of more, codes are widened once a product and multiplied by the matrix library.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Implementation = Literal["native", "reference"]

#: Of more rows, widening 8-bit codes costs less than the kernel loses to the matrix library.
_MAX_NATIVE_ROWS = 12
_NATIVE_GROUPS = (32, 64, 128, 256)
_NATIVE_OUTPUTS = 16  # the 4-bit kernel serves multiples of it


@dataclass(slots=True, frozen=True, eq=False)
class QuantizedLinear:
    """A linear layer ready to be applied; made by :func:`pack_quantized_linear`.

    Attributes
    ----------
    packed : Tensor
        Codes in the layout of the implementation.
    scales : Tensor
        What turns sums of codes into values, in that layout too.
    zeros : Tensor or None
        Zero points, where they are not part of ``scales``.
    bias : Tensor [out_features] or None
    """

    in_features: int
    out_features: int
    bits: int
    group_size: int
    implementation: Implementation
    packed: Tensor
    scales: Tensor
    zeros: Tensor | None
    bias: Tensor | None

    @property
    def num_bytes(self) -> int:
        """Bytes that the layer keeps in memory."""
        tensors = (self.packed, self.scales, self.zeros, self.bias)
        return sum(t.nbytes for t in tensors if t is not None)


def native_limit(
    bits: int, group_size: int, has_zeros: bool, out_features: int, device: torch.device
) -> str | None:
    """Why the native kernels cannot serve such a layer, if so; ``group_size`` 0 is one scale an
    output."""
    if device.type != "cpu":
        return f"they are for CPUs, and the layer is on {device}"
    if bits == 8 and (group_size or has_zeros):
        return "8 bits need one scale an output, without groups and zero points"
    if bits == 4 and group_size not in _NATIVE_GROUPS:
        return f"4 bits need groups of {', '.join(map(str, _NATIVE_GROUPS))}, not {group_size}"
    if bits == 4 and out_features % _NATIVE_OUTPUTS:
        return f"4 bits need outputs that {_NATIVE_OUTPUTS} divides, not {out_features}"
    return None


def pack_quantized_linear(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    bits: int,
    dtype: torch.dtype,
) -> QuantizedLinear:
    """Lay a quantised weight out for :func:`apply_quantized_linear`.

    Parameters
    ----------
    codes : Tensor [N, K] int
        Without zero points from ``-2 ** (bits - 1)`` on, with them from 0 on.
    scales : Tensor [N, G] float
        ``K / G`` consecutive inputs share one; on the device of ``codes``.
    zeros : Tensor [N, G] int, or None
        Codes of 0.
    bias : Tensor [N] or None
    bits : int
        4 or 8.
    dtype
        Of the activations.
    """
    out_features, in_features = codes.shape
    num_groups = scales.shape[1]
    if scales.shape[0] != out_features or in_features % num_groups:
        raise ValueError(f"scales of {tuple(scales.shape)} do not fit codes {tuple(codes.shape)}")
    if bits not in (4, 8):
        raise ValueError(f"weights have 4 or 8 bits, not {bits}")
    group_size = 0 if num_groups == 1 else in_features // num_groups
    half = 1 << (bits - 1)
    compute = torch.bfloat16 if dtype == torch.float32 else dtype
    shape = (bits, group_size, zeros is not None, out_features)
    is_native = native_limit(*shape, codes.device) is None
    common = (in_features, out_features, bits, group_size)
    if not is_native:
        signed = codes if zeros is None else codes - half
        stored = None if zeros is None else (zeros - half).to(torch.int8)
        packed = signed.to(torch.int8)
        if bits == 4 and in_features % 2 == 0:
            low, high = (packed.view(out_features, -1, 2) & 15).unbind(2)
            packed = (low | high << 4).view(torch.uint8)
        kept = scales.to(torch.float32)
        return QuantizedLinear(*common, "reference", packed, kept, stored, bias)
    if bits == 8:
        packed, kept = codes.to(torch.int8).contiguous(), scales[:, 0].to(compute).contiguous()
    else:
        unsigned = codes.int() + (half if zeros is None else 0)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unsigned.contiguous(), 1)
        shift = torch.zeros_like(scales) if zeros is None else (half - zeros) * scales
        kept = torch.stack([scales, shift], 2).transpose(0, 1).to(compute).contiguous()
    return QuantizedLinear(*common, "native", packed, kept, None, bias)


def apply_quantized_linear(layer: QuantizedLinear, x: Tensor) -> Tensor:
    """``x @ weight.T + bias``.

    Parameters
    ----------
    layer : QuantizedLinear
    x : Tensor [T, K]

    Returns
    -------
    Tensor [T, N]
        In the dtype of ``x``.
    """
    if layer.implementation == "reference":
        return F.linear(x, dequantized_weight(layer, x.dtype), layer.bias)
    rows = x.to(layer.scales.dtype).contiguous()
    if layer.bits == 4:
        out = torch.ops.aten._weight_int4pack_mm_for_cpu(
            rows, layer.packed, layer.group_size, layer.scales
        )
    elif len(x) <= _MAX_NATIVE_ROWS:
        out = torch.ops.aten._weight_int8pack_mm(rows, layer.packed, layer.scales)
    else:  # every code is a bf16 number
        out = F.linear(rows, layer.packed.to(rows.dtype)).mul_(layer.scales)
    found: Tensor = out.to(x.dtype)
    return found if layer.bias is None else found.add_(layer.bias)


def dequantized_weight(layer: QuantizedLinear, dtype: torch.dtype) -> Tensor:
    """The weight ``[N, K]`` that a layer stands for; of the native layout of 4 bits slowly."""
    shape = (layer.out_features, layer.in_features)
    if layer.implementation == "native":
        if layer.bits == 8:
            return layer.packed.to(dtype).mul_(layer.scales.to(dtype).unsqueeze(1))
        unit = torch.eye(layer.in_features, dtype=layer.scales.dtype)
        columns: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            unit, layer.packed, layer.group_size, layer.scales
        )
        return columns.T.to(dtype)
    codes = layer.packed
    if codes.dtype == torch.uint8:  # two of 4 bits
        pairs = torch.stack([codes << 4, codes], 2).view(torch.int8)
        codes = (pairs >> 4).view(shape)
    values = codes.float().view(layer.out_features, layer.scales.shape[1], -1)
    if layer.zeros is not None:
        values -= layer.zeros.unsqueeze(2)
    return values.mul_(layer.scales.unsqueeze(2)).view(shape).to(dtype)
