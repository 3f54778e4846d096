# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Rows of activations to 8 bits in Triton, alone or with what they come out of.

A row is read once: its values, or the norm or gated activation of what is read, stay in registers
between their greatest size and their rounding. Values are rounded to the dtype of the model first,
where the ops alone round (:mod:`kernels.norm`, :mod:`kernels.activation`), so that a fused launch
gives the bits of the two launches that it stands for. Semantics: :mod:`kernels.scaled_linear`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.norm import RowNorm
from kernels.triton import has_dependent_launch, is_interpreted
from kernels.triton.activation import ACTIVATIONS, gate
from kernels.triton.launch import Launcher, dependent_options, planned
from kernels.triton.numbers import as_bits, encode_fp8

GROUP_SIZE = 128
MAX_NORMED = 16384
_MAX_BLOCK = 16384
_LONG_BLOCK = 8192  # values that a program holds of a row that it reads twice
_LIMITS = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
_LEAST = tl.constexpr(1e-12)
# 1.5 * 2 ** 23: added and taken away again, it rounds to an integer, ties to even.
_ROUND_FP32 = tl.constexpr(12582912.0)


def quantize_rows(
    x: Tensor,
    code_dtype: torch.dtype,
    *,
    group_size: int = 0,
    static_scale: Tensor | None = None,
    norm: RowNorm | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Rows in 8 bits, with the scale that each row or group of 128 values has for itself.

    Parameters
    ----------
    x : Tensor [T, K], [T, 2K] with an activation
        Rows may lie apart.
    code_dtype
        ``torch.float8_e4m3fn`` or ``torch.int8``.
    group_size : int
        Values that share a scale: 0 for all of a row, or 128.
    static_scale : Tensor [1] or None
        The scale of all, in fp32; None: of each row or group, from its greatest value.
    norm : RowNorm or None
        Rows are normed first.
    residual : Tensor [T, K] or None
        With a norm: ``x`` is added to it in place, and the norm is of the sum.
    activation : str or None
        ``silu`` or ``gelu_tanh`` of the first half of each row, times the second half.

    Returns
    -------
    codes : Tensor [T, K]
    scales : Tensor [T, 1] or [T, ceil(K / 128)] float32
        Those of groups one row after another (``stride(0) == 1``), as matrix libraries take them;
        a static scale is not repeated in memory.

    Notes
    -----
    Never waits for the device.
    """
    if activation is not None and (activation not in ACTIVATIONS or norm is not None):
        raise ValueError(
            f"activation {activation!r} must be one of {', '.join(ACTIVATIONS)}, without a norm"
        )
    if group_size not in (0, GROUP_SIZE) or (group_size and static_scale is not None):
        raise ValueError(f"group_size={group_size} must be 0, or {GROUP_SIZE} without static scale")
    num_rows = x.shape[0]
    width = x.shape[1] if activation is None else x.shape[1] // 2
    if norm is not None and width > MAX_NORMED:
        raise ValueError(f"a norm of {width} values: this kernel takes up to {MAX_NORMED}")
    if width and x.stride(1) != 1:
        x = x.contiguous()
    codes = torch.empty(num_rows, width, dtype=code_dtype, device=x.device)
    if static_scale is not None:
        scales = static_scale.view(1, 1).expand(num_rows, 1)
    elif group_size:
        groups = triton.cdiv(width, GROUP_SIZE)
        scales = torch.empty(groups, num_rows, dtype=torch.float32, device=x.device).t()
    else:
        scales = torch.empty(num_rows, 1, dtype=torch.float32, device=x.device)
    if codes.numel():
        eps, offset = (0.0, 0.0) if norm is None else (norm.eps, norm.offset)
        norm_weight = None if norm is None else norm.weight
        tensors = (codes, scales, x, residual, norm_weight)
        _quantize(tensors, group_size, static_scale is not None, eps, offset, activation or "none")
    return codes, scales


@planned
def _quantize(
    codes: Tensor,
    scales: Tensor,
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    group_size: int,
    is_static: bool,
    eps: float,
    offset: float,
    activation: str,
) -> Launcher:
    num_rows, width = codes.shape
    assert x.stride(1) == 1 and codes.is_contiguous()
    if residual is not None:
        assert norm_weight is not None and residual.shape == x.shape
        assert residual.stride(1) == 1 and residual.dtype == x.dtype
    assert norm_weight is None or (norm_weight.shape == (width,) and norm_weight.stride(0) == 1)
    block = max(GROUP_SIZE, triton.next_power_of_2(width))
    if block > _MAX_BLOCK:
        block = _LONG_BLOCK
    # 16 values a thread, read 16 bytes at a time; few rows are about latency.
    num_warps = max(1, min(32, block // (256 if num_rows <= 64 else 512)))
    is_dependent = has_dependent_launch(x.device)
    return Launcher(
        quantize_rows_kernel,
        (num_rows,),
        eps,
        offset,
        width,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        scales.stride(1) if group_size else 0,
        seen_as=as_bits if is_interpreted() else None,
        BLOCK=block,
        IS_WHOLE=block >= width,
        GROUP=group_size,
        LIMIT=_LIMITS[codes.dtype],
        IS_FP8=codes.dtype == torch.float8_e4m3fn,
        IS_STATIC=is_static,
        HAS_OFFSET=offset != 0.0,
        ACTIVATION=activation,
        IS_INTERPRETED=is_interpreted(),
        IS_DEPENDENT=is_dependent,
        num_warps=num_warps,
        **dependent_options(is_dependent),
    )


@triton.jit
def quantize_rows_kernel(
    codes,
    scales,
    x,
    residual,
    norm_weight,
    eps,
    offset,
    width,
    x_stride,
    residual_stride,
    group_stride,
    BLOCK: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    GROUP: tl.constexpr,
    LIMIT: tl.constexpr,
    IS_FP8: tl.constexpr,
    IS_STATIC: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    ACTIVATION: tl.constexpr,
    IS_INTERPRETED: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    """Grid: (rows). Rows longer than a block are read twice, but those with scales of groups."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    if IS_DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    source = x + row * x_stride
    target = codes + row * width
    if IS_WHOLE:
        value = _load(source, column, width, ACTIVATION)
        if norm_weight is not None:
            value = _norm(
                value, residual, row * residual_stride, norm_weight, column, eps, offset, width,
                x.dtype.element_ty, HAS_OFFSET,
            )  # fmt: skip
        _round(
            value, target, scales, row, group_stride, column, width,
            BLOCK, GROUP, LIMIT, IS_FP8, IS_STATIC, IS_INTERPRETED,
        )  # fmt: skip
    elif GROUP > 0 or IS_STATIC:
        for start in range(0, width, BLOCK):
            at = start + column
            value = _load(source, at, width, ACTIVATION)
            _round(
                value, target, scales, row, group_stride, at, width,
                BLOCK, GROUP, LIMIT, IS_FP8, IS_STATIC, IS_INTERPRETED,
            )  # fmt: skip
    else:
        most = tl.zeros([BLOCK], tl.int32)
        for start in range(0, width, BLOCK):
            value = _load(source, start + column, width, ACTIVATION)
            most = tl.maximum(most, tl.abs(value).to(tl.int32, bitcast=True))
        scale, inverse = _scale_of(tl.max(most, 0), LIMIT)
        tl.store(scales + row, scale)
        for start in range(0, width, BLOCK):
            at = start + column
            value = _load(source, at, width, ACTIVATION)
            _write(target, at, value * inverse, at < width, LIMIT, IS_FP8, IS_INTERPRETED)


@triton.jit
def _load(source, column, width, ACTIVATION: tl.constexpr):
    """Values of a row in fp32, or the gated activation of them, rounded as the op alone does."""
    mask = column < width
    value = tl.load(source + column, mask=mask, other=0.0)
    if ACTIVATION != "none":
        dtype: tl.constexpr = value.dtype
        up = tl.load(source + width + column, mask=mask, other=0.0).to(tl.float32)
        gated = gate(value.to(tl.float32), ACTIVATION == "gelu_tanh").to(dtype).to(tl.float32)
        value = (gated * up).to(dtype)
    return value.to(tl.float32)


@triton.jit
def _norm(
    value,
    residual,
    place,
    norm_weight,
    column,
    eps,
    offset,
    width,
    dtype: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
):
    """As :func:`kernels.triton.norm.rms_norm_kernel`."""
    mask = column < width
    weight = tl.load(norm_weight + column, mask=mask, other=0.0).to(tl.float32)
    if residual is not None:
        before = tl.load(residual + place + column, mask=mask, other=0.0).to(tl.float32)
        total = (value + before).to(dtype)
        tl.store(residual + place + column, total, mask=mask)
        value = total.to(tl.float32)
    value = value * tl.div_rn(1.0, tl.sqrt_rn(tl.sum(value * value, 0) / width + eps))
    if HAS_OFFSET:
        value = value * (weight + offset)
    else:
        value = value.to(dtype).to(tl.float32) * weight
    return value.to(dtype).to(tl.float32)


@triton.jit
def _scale_of(most, LIMIT: tl.constexpr):
    """Scale and its inverse, of the bits of the greatest size: as integers, NaN is the greatest."""
    size = most.to(tl.float32, bitcast=True)
    # Tiny values share the least scale; NaN is over every number here, as it is among integers.
    size = tl.where(size < _LEAST, _LEAST, size)
    scale = tl.div_rn(size, LIMIT)
    return scale, tl.div_rn(1.0, scale)


@triton.jit
def _round(
    value,
    target,
    scales,
    row,
    group_stride,
    column,
    width,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    LIMIT: tl.constexpr,
    IS_FP8: tl.constexpr,
    IS_STATIC: tl.constexpr,
    IS_INTERPRETED: tl.constexpr,
):
    mask = column < width
    if IS_STATIC:
        scale = tl.load(scales)
        value = value * tl.div_rn(1.0, scale)
    elif GROUP > 0:
        groups = tl.reshape(value, [BLOCK // GROUP, GROUP])
        scale, inverse = _scale_of(tl.max(tl.abs(groups).to(tl.int32, bitcast=True), 1), LIMIT)
        group = tl.max(tl.reshape(column, [BLOCK // GROUP, GROUP]), 1) // GROUP
        place = scales + row + group * group_stride
        tl.store(place, scale, mask=group * GROUP < width)
        value = tl.reshape(groups * inverse[:, None], [BLOCK])
    else:
        scale, inverse = _scale_of(tl.max(tl.abs(value).to(tl.int32, bitcast=True), 0), LIMIT)
        tl.store(scales + row, scale)
        value = value * inverse
    _write(target, column, value, mask, LIMIT, IS_FP8, IS_INTERPRETED)


@triton.jit
def _write(
    target, column, value, mask, LIMIT: tl.constexpr, IS_FP8: tl.constexpr,
    IS_INTERPRETED: tl.constexpr,
):  # fmt: skip
    # Not tl.clamp: NaN stays NaN.
    value = tl.where(value > LIMIT, LIMIT, value)
    value = tl.where(value < -LIMIT, -LIMIT, value)
    if not IS_FP8:
        code = ((value + _ROUND_FP32) - _ROUND_FP32).to(tl.int8)
    elif IS_INTERPRETED:  # numpy has no fp8
        code = tl.where(value == value, encode_fp8(value), 0x7F).to(tl.uint8)
    else:
        code = value.to(tl.float8e4nv)
    tl.store(target + column, code, mask=mask)


def example_launches() -> dict[str, Callable[[], object]]:
    """Calls that :mod:`kernels.triton.compile_ahead` builds."""

    def call(
        code_dtype: torch.dtype, num_rows: int, width: int, form: str = "", group_size: int = 0
    ) -> Callable[[], object]:
        def run() -> object:
            activation = next((a for a in ACTIVATIONS if a in form), None)
            shape = (num_rows, width if activation is None else 2 * width)
            x = torch.empty(shape, dtype=torch.bfloat16, device="meta")
            norm = RowNorm(torch.empty(width, dtype=x.dtype, device="meta"), 1e-6)
            scale = torch.empty(1, device="meta") if "static" in form else None
            return quantize_rows(
                x,
                code_dtype,
                group_size=group_size,
                static_scale=scale,
                norm=norm if "norm" in form else None,
                residual=torch.empty_like(x) if "add" in form else None,
                activation=activation,
            )

        return run

    fp8, int8 = torch.float8_e4m3fn, torch.int8
    return {
        "int8, 1 x 4096, add, norm": call(int8, 1, 4096, "add norm"),
        "fp8, 4096 x 4096, add, norm": call(fp8, 4096, 4096, "add norm"),
        "fp8, 4096 x 14336, silu": call(fp8, 4096, 14336, "silu"),
        "fp8, 1 x 14336, silu, groups": call(fp8, 1, 14336, "silu", GROUP_SIZE),
        "fp8, 4096 x 4096, norm, groups": call(fp8, 4096, 4096, "norm", GROUP_SIZE),
        "fp8, 32 x 4096, static": call(fp8, 32, 4096, "static"),
        "int8, 32 x 28672, gelu_tanh": call(int8, 32, 28672, "gelu_tanh"),
        "fp8, 32 x 576": call(fp8, 32, 576),
    }
