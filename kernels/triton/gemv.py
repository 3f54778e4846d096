# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""One row times a weight, with what stands in front of the product and behind it, in Triton.

A step of one request is as fast as its weights are read. So a program asks for its first weights
before it waits for the launch ahead, and the row's norm, the gated activation and the addition to
the residual, each a launch that reads no weight, are part of the products on either side of them.
Every program takes the norm of the whole row for itself: the row is small and in the L2 cache.
Sums are fp32; values are rounded where the ops alone round them (:mod:`kernels.norm`,
:mod:`kernels.activation`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.norm import RowNorm
from kernels.triton import has_dependent_launch, num_multiprocessors
from kernels.triton.activation import ACTIVATIONS, gate
from kernels.triton.launch import Launcher, dependent_options, planned
from kernels.triton.prefetch import PIECE, prefetch

MAX_NORMED = 16384


@dataclass(frozen=True, slots=True)
class GemvTiling:
    """How the kernel is cut.

    Attributes
    ----------
    block_n, block_k
        Rows of the weight that a program takes, and columns that it takes at a time.
    num_warps, num_stages
        Of a program; ``num_stages`` blocks of columns are on their way at a time.
    prefetched
        Blocks of columns after the first that a program asks the L2 cache for while it waits.
    """

    block_n: int
    block_k: int
    num_warps: int = 4
    num_stages: int = 3
    prefetched: int = 1


@triton.jit
def gemv_kernel(
    out,
    x,
    weight,
    bias,
    residual,
    norm_weight,
    eps,
    offset,
    out_features,
    in_features,
    weight_stride,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PREFETCHED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_ROW: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    IS_EVEN: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    """Grid: (tiles). A tile of a gated product holds as many rows of the gate as of the rest."""
    dtype: tl.constexpr = out.dtype.element_ty
    tile = tl.program_id(0)
    row = tl.arange(0, BLOCK_N)
    if ACTIVATION == "none":
        feature = tile * BLOCK_N + row
        is_feature = feature < out_features
        source = tl.minimum(feature, out_features - 1)
    else:
        HALF: tl.constexpr = BLOCK_N // 2
        inner = tile * HALF + row % HALF
        source = tl.minimum(inner, out_features - 1) + (row // HALF) * out_features
    column = tl.arange(0, BLOCK_K)
    # Rows beyond the end are read as the last one, and not written.
    places = (weight + source.to(tl.int64) * weight_stride)[:, None] + column[None, :]
    if IS_DEPENDENT:
        gdc_launch_dependents()
    if IS_EVEN:
        w = tl.load(places)
    else:
        w = tl.load(places, mask=(column < in_features)[None, :], other=0.0)
    if IS_DEPENDENT:
        if PREFETCHED > 0:
            ahead = BLOCK_K + tl.arange(0, PREFETCHED * BLOCK_K // PIECE) * PIECE
            ahead = tl.minimum(ahead, in_features - PIECE)
            prefetch((weight + source.to(tl.int64) * weight_stride)[:, None] + ahead[None, :])
        gdc_wait()  # the launch before wrote x and the residual
    rstd = 1.0
    if norm_weight is not None:
        whole = tl.arange(0, BLOCK_ROW)
        value = tl.load(x + whole, mask=whole < in_features, other=0.0).to(tl.float32)
        rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(value * value, 0) / in_features + eps))
    values = _load_row(x, norm_weight, rstd, offset, column, in_features, HAS_OFFSET, IS_EVEN)
    products = w.to(tl.float32) * values[None, :]
    for k in tl.range(1, tl.cdiv(in_features, BLOCK_K), num_stages=STAGES):
        at = k * BLOCK_K + column
        if IS_EVEN:
            w = tl.load(places + k * BLOCK_K)
        else:
            w = tl.load(places + k * BLOCK_K, mask=(at < in_features)[None, :], other=0.0)
        values = _load_row(x, norm_weight, rstd, offset, at, in_features, HAS_OFFSET, IS_EVEN)
        products += w.to(tl.float32) * values[None, :]
    total = tl.sum(products, 1)
    if ACTIVATION == "none":
        if bias is not None:
            total += tl.load(bias + feature, mask=is_feature, other=0.0).to(tl.float32)
        total = total.to(dtype)
        if residual is not None:
            before = tl.load(residual + feature, mask=is_feature, other=0.0)
            total = (before.to(tl.float32) + total.to(tl.float32)).to(dtype)
            tl.store(residual + feature, total, mask=is_feature)
        else:
            tl.store(out + feature, total, mask=is_feature)
    else:
        if bias is not None:
            total += tl.load(bias + source).to(tl.float32)
        total = total.to(dtype).to(tl.float32)
        gates, rest = tl.split(tl.trans(tl.reshape(total, [2, HALF])))
        feature = tile * HALF + tl.arange(0, HALF)
        gated = gate(gates, ACTIVATION == "gelu_tanh").to(dtype).to(tl.float32)
        tl.store(out + feature, (gated * rest).to(dtype), mask=feature < out_features)


@triton.jit
def _load_row(
    x,
    norm_weight,
    rstd,
    offset,
    column,
    in_features,
    HAS_OFFSET: tl.constexpr,
    IS_EVEN: tl.constexpr,
):
    """Columns of the row in fp32, normed where there is a norm; rounded as the norm alone does."""
    if IS_EVEN:
        values = tl.load(x + column).to(tl.float32)
    else:
        values = tl.load(x + column, mask=column < in_features, other=0.0).to(tl.float32)
    if norm_weight is not None:
        dtype: tl.constexpr = x.dtype.element_ty
        if IS_EVEN:
            scale = tl.load(norm_weight + column).to(tl.float32)
        else:
            scale = tl.load(norm_weight + column, mask=column < in_features, other=0.0)
            scale = scale.to(tl.float32)
        values = values * rstd
        if HAS_OFFSET:
            values = values * (scale + offset)
        else:
            values = values.to(dtype).to(tl.float32) * scale
        values = values.to(dtype).to(tl.float32)
    return values


def gemv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: RowNorm | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    tiling: GemvTiling | None = None,
    is_dependent: bool | None = None,
) -> Tensor:
    """``norm(x) @ weight.T + bias`` for one row; then either gated or added to the residual.

    Parameters
    ----------
    x : Tensor [1, K]
    weight : Tensor [N, K]
        In the dtype of ``x``, its rows contiguous. With an activation, ``N = 2 F``: the rows of the
        gate first.
    bias : Tensor [N] or None
    norm : RowNorm or None
        None: ``x`` as it is.
    residual : Tensor [1, N] or None
        Where the product is added in place; then it is what is returned.
    activation : str or None
        One of :data:`ACTIVATIONS`, of the first half of the product, times the second half.
    tiling : GemvTiling or None
        None: :func:`choose_tiling`.
    is_dependent : bool or None
        Whether to start before the launch ahead has ended; None: where the card can.

    Returns
    -------
    Tensor [1, N], [1, F] with an activation

    Notes
    -----
    Never waits for the device. Weights, their norms and biases must not have been written by the
    launch ahead: they are read before it has ended.
    """
    num_rows, in_features = x.shape
    if num_rows != 1:
        raise ValueError(f"{num_rows} rows: this kernel takes one")
    if activation is not None and (activation not in ACTIVATIONS or residual is not None):
        raise ValueError(
            f"activation {activation!r} must be one of {', '.join(ACTIVATIONS)}, without a residual"
        )
    if norm is not None and in_features > MAX_NORMED:
        raise ValueError(f"a norm of {in_features} values: this kernel takes up to {MAX_NORMED}")
    rows = weight.shape[0]
    assert in_features > 0
    if residual is not None:
        out = residual
    else:
        out_features = rows if activation is None else rows // 2
        out = torch.empty(1, out_features, dtype=x.dtype, device=x.device)
    if rows:
        tensors = (out, x, weight, bias, residual, None if norm is None else norm.weight)
        eps, offset = (0.0, 0.0) if norm is None else (norm.eps, norm.offset)
        is_aligned = weight.data_ptr() % 16 == 0
        _gemv(tensors, eps, offset, activation or "none", is_aligned, tiling, is_dependent)
    return out


@planned
def _gemv(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    _bias: Tensor | None,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    offset: float,
    activation: str,
    is_aligned: bool,
    tiling: GemvTiling | None,
    is_dependent: bool | None,
) -> Launcher:
    (rows, in_features), out_features = weight.shape, out.shape[1]
    assert x.shape[1] == in_features and weight.dtype == x.dtype
    assert weight.stride(1) == 1 and x.stride(1) == 1
    assert residual is None or (residual.shape == (1, rows) and residual.stride(1) == 1)
    assert norm_weight is None or (
        norm_weight.shape == (in_features,) and norm_weight.stride(0) == 1
    )
    if tiling is None:
        tiling = choose_tiling(rows, in_features, x.dtype, x.device)
    block_n = tiling.block_n if activation == "none" else tiling.block_n // 2
    if is_dependent is None:
        is_dependent = has_dependent_launch(x.device)
    can_prefetch = (
        in_features % int(PIECE.value) == 0
        and weight.stride(0) % 16 == 0
        and is_aligned
        and tiling.block_k % int(PIECE.value) == 0
        and in_features > tiling.block_k
    )
    return Launcher(
        gemv_kernel,
        (triton.cdiv(out_features, block_n),),
        eps,
        offset,
        out_features,
        in_features,
        weight.stride(0),
        BLOCK_N=tiling.block_n,
        BLOCK_K=tiling.block_k,
        STAGES=tiling.num_stages,
        PREFETCHED=tiling.prefetched if can_prefetch else 0,
        ACTIVATION=activation,
        BLOCK_ROW=triton.next_power_of_2(in_features) if norm_weight is not None else 1,
        HAS_OFFSET=norm_weight is not None and offset != 0.0,
        IS_EVEN=in_features % tiling.block_k == 0,
        IS_DEPENDENT=is_dependent,
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
        **dependent_options(is_dependent),
    )


def choose_tiling(
    rows: int, in_features: int, dtype: torch.dtype, device: torch.device
) -> GemvTiling:
    """The cut that suits a shape, as measured on an H100 (``experiments.gpu_gemv --tune``).

    A program that takes whole rows has asked for all its weights before it waits, which is best
    while a multiprocessor has room for all its programs at a time, and for a large weight of up to
    4,096 columns. What lies between is a matter of enough bytes on their way.
    """
    few = rows <= 8 * num_multiprocessors(device)
    if in_features <= 4096 and few:
        block_k = max(1024, triton.next_power_of_2(in_features))
        tiling = GemvTiling(4, block_k, num_warps=max(4, block_k // 512), num_stages=1)
    elif in_features <= 1024:
        is_large = rows >= 6144
        shape = (16, 512) if is_large else (8, 1024)
        tiling = GemvTiling(*shape, num_warps=4, num_stages=1, prefetched=2)
    elif in_features < 4096:
        tiling = GemvTiling(8, 1024, num_warps=8, num_stages=1)
    elif in_features == 4096 and rows >= 16384:
        tiling = GemvTiling(4, 4096, num_warps=8, num_stages=1)
    else:
        tiling = GemvTiling(16, 512, num_warps=8, num_stages=3)
    if dtype == torch.float32:  # as many bytes
        return replace(tiling, block_k=tiling.block_k // 2)
    return tiling


def example_launches() -> dict[str, Callable[[], object]]:
    """Calls that :mod:`kernels.triton.compile_ahead` builds."""

    def call(
        dtype: torch.dtype, rows: int, in_features: int, form: str = "", offset: float = 0.0
    ) -> Callable[[], object]:
        def run() -> object:
            x, weight, bias = (
                torch.empty(s, dtype=dtype)
                for s in ((1, in_features), (rows, in_features), (rows,))
            )
            norm = RowNorm(torch.empty(in_features, dtype=dtype), 1e-6, offset)
            return gemv(
                x,
                weight,
                bias if "bias" in form else None,
                norm=norm if "norm" in form else None,
                residual=torch.empty(1, rows, dtype=dtype) if "residual" in form else None,
                activation=next((a for a in ACTIVATIONS if a in form), None),
            )

        return run

    half = torch.bfloat16
    return {
        "bf16, 4096 x 1024, norm": call(half, 4096, 1024, "norm"),
        "bf16, 100 x 14336, residual": call(half, 100, 14336, "residual"),
        "bf16, 6144 x 1024, norm, silu": call(half, 6144, 1024, "norm silu"),
        "fp16, 100 x 96, norm, gelu_tanh, bias": call(
            torch.float16, 100, 96, "norm gelu_tanh bias", offset=1.0
        ),
        "fp32, 100 x 576, norm, silu": call(torch.float32, 100, 576, "norm silu"),
        "bf16, 4096 x 4096, residual": call(half, 4096, 4096, "residual"),
    }
