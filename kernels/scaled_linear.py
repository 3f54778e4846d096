"""Linear layers whose weights and activations both have 8 bits: ``y = (x_q s_x) (w_q s_w)^T + b``.

==================  ================================  =============================================
format              weights                           activations, rounded as they come
==================  ================================  =============================================
``fp8``             e4m3, one scale an output         e4m3, one scale a row
``fp8_tensor``      e4m3, one scale a checkpoint's    e4m3, one scale for all, measured ahead
                    layer                             (static), or one a row
``fp8_block``       e4m3, a scale a 128 x 128 block   e4m3, one scale for 128 values of a row
``int8``            int8, one scale an output         int8, one scale a row
==================  ================================  =============================================

A scale is the greatest size over the format's greatest number (448, 127), so that codes are
``x / scale`` rounded to the nearest, ties to even. A row with a NaN or an infinity gives NaN.

==================  ===============================================================================
implementation      what serves
==================  ===============================================================================
``skinny``          :mod:`kernels.triton.scaled_skinny`, few rows on a GPU
``triton``          :mod:`kernels.triton.scaled_gemm`, any rows on a GPU
``cublas``          ``torch._scaled_mm``: fp8 in bf16 models, on a GPU
``int_mm``          ``torch._int_mm`` on a CPU: oneDNN's integer product
``reference``       torch, any device: the values that codes stand for, multiplied in fp32
==================  ===============================================================================

Papers: Micikevicius et al., "FP8 Formats for Deep Learning", 2022, arXiv:2209.05433; Dettmers et
al., "LLM.int8()", 2022, arXiv:2208.07339; DeepSeek-AI, "DeepSeek-V3", 2024, arXiv:2412.19437.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import triton as triton_kernels
from kernels.activation import gelu_tanh_and_mul, silu_and_mul
from kernels.norm import RowNorm, add_rms_norm_, rms_norm

FORMATS = ("fp8", "fp8_tensor", "fp8_block", "int8")
IMPLEMENTATIONS = ("skinny", "triton", "cublas", "int_mm", "reference")
BLOCK_SIZE = 128
LIMITS = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
#: Smaller rows share the scale of this size.
LEAST_SIZE = 1e-12
_FP8_CAPABILITY = (8, 9)
_INT8_CAPABILITY = (8, 0)
#: Most rows of the skinny kernel; of more, what follows is faster.
_MAX_SKINNY_ROWS = 64
_ALIGNED = 16  # bytes of a row that the matrix library divides by
_GATES = {"silu": silu_and_mul, "gelu_tanh": gelu_tanh_and_mul}


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedRows:
    """Activations in 8 bits.

    Attributes
    ----------
    codes : Tensor [T, K] float8_e4m3fn or int8
    scales : Tensor [T, 1] or [T, ceil(K / 128)] float32
        Of the rows, or of 128 values of each.
    dtype
        Of what they stand for, and of products with them.
    """

    codes: Tensor
    scales: Tensor
    dtype: torch.dtype

    def __len__(self) -> int:
        return len(self.codes)

    def dequantize(self) -> Tensor:
        """The values, ``[T, K]`` float32."""
        scales = self.scales
        if scales.shape[1] > 1 or self.codes.shape[1] <= BLOCK_SIZE:
            scales = scales.repeat_interleave(BLOCK_SIZE, 1)[:, : self.codes.shape[1]]
        return self.codes.float() * scales


@dataclass(frozen=True, slots=True, eq=False)
class ScaledLinear:
    """A linear layer ready to be applied; made by :func:`pack_scaled_linear`.

    Attributes
    ----------
    codes : Tensor [N, K] float8_e4m3fn or int8
    scales : Tensor [N], or [ceil(N / 128), ceil(K / 128)] float32
    bias : Tensor [N] or None
    input_scale : Tensor [1] float32, or None
        Of all activations; None: each row's own.
    whole_scale : Tensor [1] float32, or None
        The scale of all outputs, where they share one.
    """

    in_features: int
    out_features: int
    format: str
    codes: Tensor
    scales: Tensor
    bias: Tensor | None
    input_scale: Tensor | None
    whole_scale: Tensor | None

    @property
    def num_bytes(self) -> int:
        """Bytes that the layer keeps in memory."""
        tensors = (self.codes, self.scales, self.bias, self.input_scale)
        return sum(t.nbytes for t in tensors if t is not None)

    @property
    def group_size(self) -> int:
        """Activations of a row that share a scale; 0 for all."""
        return BLOCK_SIZE if self.format == "fp8_block" else 0

    def dequantize(self) -> Tensor:
        """The weight's values, ``[N, K]`` float32."""
        if self.format != "fp8_block":
            return self.codes.float() * self.scales.unsqueeze(1)
        wide = self.scales.repeat_interleave(BLOCK_SIZE, 0).repeat_interleave(BLOCK_SIZE, 1)
        return self.codes.float() * wide[: self.out_features, : self.in_features]


def code_dtype_of(format: str) -> torch.dtype:
    """Dtype of a format's codes."""
    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r}. Valid: {', '.join(FORMATS)}.")
    return torch.int8 if format == "int8" else torch.float8_e4m3fn


def unsupported_reason(format: str, device: torch.device) -> str | None:
    """Why a format cannot be multiplied on a device, and what would work there; None if it can."""
    is_int8 = code_dtype_of(format) == torch.int8
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"products in 8 bits are for CUDA devices and CPUs, not {device.type}"
    found = torch.cuda.get_device_capability(device)
    least = _INT8_CAPABILITY if is_int8 else _FP8_CAPABILITY
    if found < least:
        other = ": format int8 works from 8.0 on" if found >= _INT8_CAPABILITY else ""
        return (
            f"{format} needs compute capability {least[0]}.{least[1]} or more, and this card has "
            f"{found[0]}.{found[1]}{other}"
        )
    if not triton_kernels.HAS_TRITON:
        return "Triton is not installed: pip install triton"
    return None


# -- quantisation -----------------------------------------------------------------------------


def quantize_weight(weight: Tensor, format: str) -> tuple[Tensor, Tensor]:
    """Round a weight ``[N, K]`` to a format.

    Returns
    -------
    codes : Tensor [N, K]
    scales : Tensor [N], [1] of ``fp8_tensor``, [ceil(N / 128), ceil(K / 128)] of ``fp8_block``
    """
    dtype = code_dtype_of(format)
    size = weight.abs()
    if format == "fp8_block":
        rows, columns = weight.shape
        pad = (0, -columns % BLOCK_SIZE, 0, -rows % BLOCK_SIZE)
        blocks = torch.nn.functional.pad(size, pad)
        blocks = blocks.view(-(-rows // BLOCK_SIZE), BLOCK_SIZE, -1, BLOCK_SIZE)
        scales = _scale_of(blocks.amax((1, 3)), dtype)
        wide = scales.repeat_interleave(BLOCK_SIZE, 0)[:rows]
        inverse = wide.reciprocal().repeat_interleave(BLOCK_SIZE, 1)[:, :columns]
    elif format == "fp8_tensor":
        scales = _scale_of(size.amax().view(1), dtype)
        inverse = scales.reciprocal()
    else:
        scales = _scale_of(size.amax(1), dtype)
        inverse = scales.reciprocal().unsqueeze(1)
    return _encode(weight.float() * inverse, dtype), scales


def quantize_rows_reference(
    x: Tensor, dtype: torch.dtype, group_size: int = 0, static_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Codes ``[T, K]`` and scales ``[T, 1]`` or ``[T, ceil(K / group_size)]`` of rows, in torch."""
    num_rows, width = x.shape
    if static_scale is not None:
        scales = static_scale.view(1, 1).expand(num_rows, 1)
        return _encode(x.float() * scales.reciprocal(), dtype), scales
    if not group_size:
        scales = _scale_of(x.abs().amax(1, keepdim=True), dtype)
        return _encode(x.float() * scales.reciprocal(), dtype), scales
    padded = torch.nn.functional.pad(x.float(), (0, -width % group_size))
    groups = padded.view(num_rows, padded.shape[1] // group_size, group_size)
    scales = _scale_of(groups.abs().amax(2), dtype)
    values = (groups * scales.reciprocal().unsqueeze(2)).flatten(1)[:, :width]
    return _encode(values, dtype), scales


def _scale_of(size: Tensor, dtype: torch.dtype) -> Tensor:
    # By a tensor: a GPU divides by a number as by its inverse, which is not the nearest.
    size = size.float().clamp(min=LEAST_SIZE)
    return size / torch.full_like(size, LIMITS[dtype])


def _encode(values: Tensor, dtype: torch.dtype) -> Tensor:
    limit = LIMITS[dtype]
    values = values.clamp(-limit, limit)
    return (values.round() if dtype == torch.int8 else values).to(dtype)


def quantize_input(
    layer: ScaledLinear,
    x: Tensor,
    *,
    norm: RowNorm | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> QuantizedRows:
    """The activations of a layer in its format, or what comes out of a norm or a gate before it.

    On a GPU one launch; the same bits as of the ops one by one.

    Parameters
    ----------
    x : Tensor [T, K], [T, 2K] with an activation
    norm : RowNorm or None
        Rows are normed first.
    residual : Tensor [T, K] or None
        With a norm: ``x`` is added to it in place, and the norm is of the sum.
    activation : str or None
        ``silu`` or ``gelu_tanh`` of the first half of each row, times the second half.
    """
    dtype = layer.codes.dtype
    if triton_kernels.unsupported_reason(x) is None:
        from kernels.triton.quantize_rows import MAX_NORMED, quantize_rows

        if norm is None or layer.in_features <= MAX_NORMED:
            codes, scales = quantize_rows(
                x,
                dtype,
                group_size=layer.group_size,
                static_scale=layer.input_scale,
                norm=norm,
                residual=residual,
                activation=activation,
            )
            return QuantizedRows(codes, scales, x.dtype)
    if norm is not None and residual is not None:
        x = add_rms_norm_(x, residual, norm.weight, norm.eps, offset=norm.offset)
    elif norm is not None:
        x = rms_norm(x, norm.weight, norm.eps, offset=norm.offset)
    elif activation is not None:
        x = _GATES[activation](x)
    codes, scales = quantize_rows_reference(x, dtype, layer.group_size, layer.input_scale)
    return QuantizedRows(codes, scales, x.dtype)


# -- products ---------------------------------------------------------------------------------


def pack_scaled_linear(
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None = None,
    *,
    format: str,
    input_scale: Tensor | None = None,
) -> ScaledLinear:
    """Lay a quantised weight out for :func:`apply_scaled_linear`.

    Parameters
    ----------
    codes : Tensor [N, K]
    scales : Tensor [N] or [1], or [ceil(N / 128), ceil(K / 128)] of ``fp8_block``
    bias : Tensor [N] or None
    format : str
        One of :data:`FORMATS`.
    input_scale : Tensor [1] or None
        Of ``fp8_tensor``: the scale of all activations. None: each row's own.

    Raises
    ------
    ValueError
        Shapes or dtypes that do not fit.
    """
    out_features, in_features = codes.shape
    if codes.dtype != code_dtype_of(format):
        raise ValueError(f"codes of {format} have dtype {code_dtype_of(format)}, not {codes.dtype}")
    if input_scale is not None and format != "fp8_tensor":
        raise ValueError(f"activations of {format} have their own scales, none for all of them")
    whole = None
    if format == "fp8_block":
        expected = (-(-out_features // BLOCK_SIZE), -(-in_features // BLOCK_SIZE))
        if scales.shape != expected:
            raise ValueError(f"scales of blocks have shape {expected}, not {tuple(scales.shape)}")
        # The matrix library reads rows of scales from places that 16 bytes divide.
        wide = torch.empty(
            expected[0], -(-expected[1] // 4) * 4, dtype=torch.float32, device=codes.device
        )
        kept = wide.zero_()[:, : expected[1]].copy_(scales)
    else:
        if scales.numel() not in (1, out_features):
            raise ValueError(f"{scales.numel()} scales for {out_features} outputs")
        kept = scales.float().reshape(-1)
        if bool((kept == kept[0]).all()):
            whole = kept[:1].clone()
        kept = kept.expand(out_features).contiguous()
    scale = None if input_scale is None else input_scale.float().reshape(1)
    return ScaledLinear(
        in_features, out_features, format, codes.contiguous(), kept, bias, scale, whole
    )


def choose_implementation(layer: ScaledLinear, num_rows: int, dtype: torch.dtype) -> str:
    """Which product serves so many rows of activations that stand for ``dtype``."""
    device = layer.codes.device
    if device.type == "cuda":
        if num_rows <= _MAX_SKINNY_ROWS:
            return "skinny"
        # The library's product of blocks has not been timed yet.
        is_triton = layer.format == "fp8_block" or cublas_limit(layer, num_rows, dtype)
        return "triton" if is_triton else "cublas"
    return "int_mm" if layer.format == "int8" and device.type == "cpu" else "reference"


def cublas_limit(layer: ScaledLinear, num_rows: int, dtype: torch.dtype) -> str | None:
    """Why the matrix library cannot serve a product, if so."""
    if layer.format == "int8":
        return "its sums of int8 go through memory before they are scaled"
    if dtype != torch.bfloat16:
        return "it gives bf16"
    if layer.in_features % _ALIGNED or layer.out_features % _ALIGNED:
        return f"it needs inputs and outputs that {_ALIGNED} divides"
    if layer.format == "fp8_block" and (num_rows % 4 or layer.in_features % BLOCK_SIZE):
        return "with scales of blocks it needs whole blocks, and rows that 4 divides"
    return None


def apply_scaled_linear(
    layer: ScaledLinear, x: Tensor | QuantizedRows, implementation: str | None = None
) -> Tensor:
    """The product of a layer.

    Parameters
    ----------
    layer : ScaledLinear
    x : Tensor [T, K] or QuantizedRows
        Activations, or what :func:`quantize_input` made of them for this layer.
    implementation : str or None
        One of :data:`IMPLEMENTATIONS`; None: :func:`choose_implementation`.

    Returns
    -------
    Tensor [T, N]
        In the dtype of the activations; rounded once.
    """
    rows = x if isinstance(x, QuantizedRows) else quantize_input(layer, x)
    if implementation is None:
        implementation = choose_implementation(layer, len(rows), rows.dtype)
    if implementation == "reference":
        return _reference(layer, rows)
    if implementation == "int_mm":
        sums = torch._int_mm(rows.codes, layer.codes.t()).float()
        return _with_bias(sums.mul_(rows.scales).mul_(layer.scales), layer).to(rows.dtype)
    if implementation == "cublas":
        return _cublas(layer, rows)
    arguments = (rows.codes, rows.scales, layer.codes, layer.scales, layer.bias)
    if implementation == "skinny":
        from kernels.triton.scaled_skinny import scaled_skinny_linear

        return scaled_skinny_linear(*arguments, out_dtype=rows.dtype)
    if implementation == "triton":
        from kernels.triton.scaled_gemm import scaled_gemm

        return scaled_gemm(*arguments, out_dtype=rows.dtype)
    raise ValueError(
        f"unknown implementation {implementation!r}. Valid: {', '.join(IMPLEMENTATIONS)}."
    )


def _reference(layer: ScaledLinear, rows: QuantizedRows) -> Tensor:
    if layer.format == "fp8_block":
        out = rows.dequantize() @ layer.dequantize().T
    else:  # codes are exact, so scales may follow the sums
        out = (rows.codes.float() @ layer.codes.float().T).mul_(rows.scales).mul_(layer.scales)
    return _with_bias(out, layer).to(rows.dtype)


def _with_bias(out: Tensor, layer: ScaledLinear) -> Tensor:
    return out if layer.bias is None else out.add_(layer.bias)


def _cublas(layer: ScaledLinear, rows: QuantizedRows, *, is_fast: bool = True) -> Tensor:
    """``is_fast``: sums stay in the tensor cores, which keep fewer bits than fp32."""
    scales, weight_scales = rows.scales, layer.scales.unsqueeze(0)
    if layer.format == "fp8_block":  # its sums are scaled block by block
        weight_scales, is_fast = layer.scales.t(), False
    elif layer.input_scale is not None and layer.whole_scale is not None:
        scales, weight_scales = layer.input_scale, layer.whole_scale
    else:
        scales = scales.contiguous()
    out: Tensor = torch._scaled_mm(
        rows.codes,
        layer.codes.t(),
        scale_a=scales,
        scale_b=weight_scales,
        out_dtype=rows.dtype,
        use_fast_accum=is_fast,
    )
    return _with_bias(out, layer)
