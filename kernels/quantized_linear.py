"""Linear layers of 4- and 8-bit weights: fewer bytes a token, the same activations.

Codes on a grid of groups of inputs, ``value = (code - zero) * scale``. Products multiply 16-bit
activations (W8A16, W4A16); fp32 ones are rounded to bf16 on their way in.

==================  ===============================================================================
implementation      what serves, and what it leaves out
==================  ===============================================================================
``native``          torch's CPU kernels for a few rows: 8 bits with one scale an output; 4 bits in
                    groups of 32, 64, 128 or 256
``triton``          ``kernels.triton``, on a CUDA device: both, with one scale an output or in
                    groups of 32, 64 or a multiple of 128
``reference``       torch, any device: the weight is written out and multiplied; everything
==================  ===============================================================================

A layer is laid out for one of them when it is packed. The native kernel of 8 bits is for few rows;
of more, codes are widened once a product and multiplied by the matrix library. Which of the Triton
kernels takes a product follows from its rows (:func:`kernel_of`).

Where inputs belong to groups in another order than their own (act-order), the layer is packed in
the order of its groups, and each product first gathers x in that order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import triton
from kernels.norm import RowNorm

Implementation = Literal["native", "triton", "reference"]

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
    input_order : Tensor [in_features] int64, or None
        Inputs in the order in which the layer is packed; None: their own.
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
    input_order: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes that the layer keeps in memory."""
        tensors = (self.packed, self.scales, self.zeros, self.bias, self.input_order)
        return sum(t.nbytes for t in tensors if t is not None)


def native_limit(
    bits: int, group_size: int, has_zeros: bool, out_features: int, device: torch.device
) -> str | None:
    """Why the CPU's kernels cannot serve such a layer, if so; ``group_size`` 0 is one scale an
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


def triton_limit(group_size: int, device: torch.device) -> str | None:
    """Why the Triton kernels cannot serve such a layer, if so."""
    if not triton.HAS_TRITON:
        return "Triton is not installed: pip install triton"
    if device.type != "cuda" and not triton.is_interpreted():
        return f"they need a CUDA device, and the layer is on {device}"
    from kernels.triton.quantized_layout import SERVED_GROUPS, is_served

    if not is_served(group_size):
        return f"groups must be of {SERVED_GROUPS}, not {group_size}"
    return None


def kernel_limit(
    bits: int, group_size: int, has_zeros: bool, out_features: int, device: torch.device
) -> str | None:
    """Why no kernel for the layer's device serves it, if so; then ``reference`` does."""
    if device.type == "cuda" or triton.is_interpreted():
        return triton_limit(group_size, device)
    return native_limit(bits, group_size, has_zeros, out_features, device)


def pack_quantized_linear(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    bits: int,
    dtype: torch.dtype,
    group_index: Tensor | None = None,
) -> QuantizedLinear:
    """Lay a quantised weight out for :func:`apply_quantized_linear`.

    Parameters
    ----------
    codes : Tensor [N, K] int
        Without zero points from ``-2 ** (bits - 1)`` on, with them from 0 on.
    scales : Tensor [N, G] float
        ``K / G`` inputs share one; on the device of ``codes``.
    zeros : Tensor [N, G] int, or None
        Codes of 0.
    bias : Tensor [N] or None
    bits : int
        4 or 8.
    dtype
        Of the activations.
    group_index : Tensor [K] int, or None
        Group of each input, as many of each; None: consecutive ones.
    """
    out_features, in_features = codes.shape
    num_groups = scales.shape[1]
    if scales.shape[0] != out_features or in_features % num_groups:
        raise ValueError(f"scales of {tuple(scales.shape)} do not fit codes {tuple(codes.shape)}")
    if bits not in (4, 8):
        raise ValueError(f"weights have 4 or 8 bits, not {bits}")
    group_size = 0 if num_groups == 1 else in_features // num_groups
    order = None
    if group_index is not None:
        order = _order_of_groups(group_index.to(codes.device), num_groups)
        codes = codes[:, order]
    half = 1 << (bits - 1)
    common = (in_features, out_features, bits, group_size)
    if codes.device.type == "cuda" or triton.is_interpreted():
        if triton_limit(group_size, codes.device) is None:
            return _pack_for_triton(common, codes, scales, zeros, bias, dtype, order)
    elif native_limit(bits, group_size, zeros is not None, out_features, codes.device) is None:
        compute = torch.bfloat16 if dtype == torch.float32 else dtype
        if bits == 8:
            packed, kept = codes.to(torch.int8).contiguous(), scales[:, 0].to(compute).contiguous()
        else:
            unsigned = codes.int() + (half if zeros is None else 0)
            packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unsigned.contiguous(), 1)
            shift = torch.zeros_like(scales) if zeros is None else (half - zeros) * scales
            kept = torch.stack([scales, shift], 2).transpose(0, 1).to(compute).contiguous()
        return QuantizedLinear(*common, "native", packed, kept, None, bias, order)
    signed = codes if zeros is None else codes - half
    stored = None if zeros is None else (zeros - half).to(torch.int8)
    packed = signed.to(torch.int8)
    if bits == 4 and in_features % 2 == 0:
        low, high = (packed.view(out_features, -1, 2) & 15).unbind(2)
        packed = (low | high << 4).view(torch.uint8)
    kept = scales.to(torch.float32)
    return QuantizedLinear(*common, "reference", packed, kept, stored, bias, order)


def _pack_for_triton(
    common: tuple[int, int, int, int],
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    order: Tensor | None,
) -> QuantizedLinear:
    """4 bits count from 0 there, 8 are signed."""
    from kernels.triton.quantized_layout import pack_tiles

    bits = common[2]
    if bits == 4:
        codes = codes if zeros is not None else codes + 8
    elif zeros is not None:
        codes, zeros = codes - 128, zeros - 128
    stored = None if zeros is None else zeros.T.to(torch.int8).contiguous()
    packed = pack_tiles(codes, bits)
    kept = scales.T.to(_scale_dtype(scales, dtype)).contiguous()
    return QuantizedLinear(*common, "triton", packed, kept, stored, bias, order)


def _scale_dtype(scales: Tensor, dtype: torch.dtype) -> torch.dtype:
    """That of the activations where a group's share of memory counts and its range holds them."""
    if scales.shape[1] == 1 or dtype == torch.float32:
        return torch.float32
    limits = torch.finfo(dtype)
    least, greatest = (float(value) for value in scales.abs().aminmax())
    return dtype if limits.tiny <= least and greatest <= limits.max else torch.float32


def _order_of_groups(group_index: Tensor, num_groups: int) -> Tensor | None:
    """Inputs sorted by their group, ``[K]`` int64; None: they are."""
    counts = torch.bincount(group_index.long(), minlength=num_groups)
    if len(counts) != num_groups or bool((counts != counts[0]).any()):
        raise ValueError(
            f"group_index has groups of {sorted(set(counts.tolist()))} inputs; all {num_groups} "
            "must have as many."
        )
    order = group_index.long().argsort(stable=True)
    return None if bool((order[1:] > order[:-1]).all()) else order


def kernel_of(layer: QuantizedLinear, num_rows: int, dtype: torch.dtype) -> str:
    """What multiplies so many rows: one of :data:`kernels.triton.quantized_product.KERNELS` for a
    layer laid out for Triton, else the implementation."""
    if layer.implementation != "triton":
        return layer.implementation
    from kernels.triton.quantized_product import kernel_for

    return kernel_for(num_rows, layer.out_features * layer.in_features, dtype)


def apply_quantized_linear(
    layer: QuantizedLinear, x: Tensor, activation: str | None = None
) -> Tensor:
    """``x @ weight.T + bias``.

    Parameters
    ----------
    layer : QuantizedLinear
    x : Tensor [T, K]
    activation : str or None
        Of layers laid out for Triton: ``silu`` or ``gelu_tanh`` of the first half of the product,
        times the second half.

    Returns
    -------
    Tensor [T, N], [T, N / 2] with an activation
        In the dtype of ``x``.
    """
    if layer.input_order is not None:
        x = x.index_select(1, layer.input_order)
    if layer.implementation == "triton":
        from kernels.triton import quantized_product

        parts = (layer.packed, layer.scales, layer.zeros, layer.bias)
        facts = (layer.bits, layer.out_features)
        return quantized_product.multiply(x, *parts, *facts, activation)
    if activation is not None:
        raise ValueError(f"implementation {layer.implementation!r} has no gated products")
    if layer.implementation == "reference":
        return F.linear(x, _weight_as_packed(layer, x.dtype), layer.bias)
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


def apply_quantized_row(
    layer: QuantizedLinear,
    x: Tensor,
    *,
    norm: RowNorm | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """A single row's product with what stands before and behind it, of a layer laid out for Triton.

    Parameters
    ----------
    x : Tensor [1, K]
    norm, residual, activation
        As of :func:`kernels.triton.quantized_gemv.quantized_gemv`.
    """
    from kernels.triton import norm as norms
    from kernels.triton.quantized_gemv import quantized_gemv

    if layer.input_order is not None:
        if norm is not None:
            x, norm = norms.rms_norm(x, norm.weight, norm.eps, offset=norm.offset), None
        x = x.index_select(1, layer.input_order)
    parts = (layer.packed, layer.scales, layer.zeros, layer.bias)
    return quantized_gemv(
        x, *parts, bits=layer.bits, rows=layer.out_features, norm=norm, residual=residual,
        activation=activation,
    )  # fmt: skip


def dequantized_weight(layer: QuantizedLinear, dtype: torch.dtype) -> Tensor:
    """The weight ``[N, K]`` that a layer stands for; of the native layout of 4 bits slowly."""
    weight = _weight_as_packed(layer, dtype)
    if layer.input_order is None:
        return weight
    return torch.empty_like(weight).index_copy_(1, layer.input_order, weight)


def _weight_as_packed(layer: QuantizedLinear, dtype: torch.dtype) -> Tensor:
    """With its inputs in the order in which the layer is packed."""
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
    if layer.implementation == "triton":
        from kernels.triton.quantized_layout import unpack_tiles

        codes = unpack_tiles(codes, layer.bits, *shape)
        if layer.bits == 4 and layer.zeros is None:
            codes = codes - 8
    elif codes.dtype == torch.uint8:  # two of 4 bits
        pairs = torch.stack([codes << 4, codes], 2).view(torch.int8)
        codes = (pairs >> 4).view(shape)
    scales, zeros = layer.scales, layer.zeros
    if layer.implementation == "triton":
        scales, zeros = scales.T, None if zeros is None else zeros.T
    values = codes.float().view(layer.out_features, scales.shape[1], -1)
    if zeros is not None:
        values -= zeros.unsqueeze(2)
    return values.mul_(scales.float().unsqueeze(2)).view(shape).to(dtype)
