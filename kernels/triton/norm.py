# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""RMS normalisation in Triton, alone or with the residual addition before it.

A row stays in the registers of one program between its sum of squares and its product with the
weight: everything is read once and written once. Semantics, and where it rounds:
:mod:`kernels.norm`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.triton import has_dependent_launch, num_multiprocessors
from kernels.triton.launch import Launcher, dependent_options, planned

MAX_HIDDEN = 16384
_TILE = 1024  # values that a program of short rows takes


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0, is_invariant: bool = False
) -> Tensor:
    """See :func:`kernels.norm.rms_norm`.

    ``is_invariant``: a row's sum is taken in the same order however many rows there are.
    """
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        _norm((out, x, None, weight), eps, offset, is_invariant)
    return out


def add_rms_norm_(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    *,
    offset: float = 0.0,
    is_invariant: bool = False,
) -> Tensor:
    """See :func:`kernels.norm.add_rms_norm_`; ``is_invariant`` as in :func:`rms_norm`."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        _norm((out, x, residual, weight), eps, offset, is_invariant)
    return out


@planned
def _norm(
    out: Tensor,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    offset: float,
    is_invariant: bool,
) -> Launcher:
    assert x.dim() in (2, 3) and x.stride(-1) == 1
    if residual is not None:
        assert x.dim() == 2 and x.shape == residual.shape and x.dtype == residual.dtype
        assert residual.stride(1) == 1
    hidden = x.shape[-1]
    assert weight.shape == (hidden,) and weight.stride(0) == 1
    if hidden > MAX_HIDDEN:
        raise ValueError(f"rows of {hidden} values: this kernel takes up to {MAX_HIDDEN}")
    num_rows = out.numel() // hidden
    block = triton.next_power_of_2(hidden)
    rows = max(1, _TILE // block)
    num_programs = triton.cdiv(num_rows, rows)
    # Few programs are about latency: as many threads as a row can feed with 16 bytes each.
    is_few = is_invariant or num_programs <= 2 * num_multiprocessors(x.device)
    num_warps = max(1, min(32, rows * block // (256 if is_few else 512)))
    is_dependent = has_dependent_launch(x.device)
    return Launcher(
        rms_norm_kernel,
        (num_programs,),
        eps,
        offset,
        num_rows,
        x.stride(0),
        x.stride(1) if x.dim() == 3 else 0,
        0 if residual is None else residual.stride(0),
        x.shape[1] if x.dim() == 3 else 1,
        HIDDEN=hidden,
        BLOCK=block,
        ROWS=rows,
        HAS_OFFSET=offset != 0.0,
        IS_DEPENDENT=is_dependent,
        num_warps=num_warps,
        **dependent_options(is_dependent),
    )


@triton.jit(do_not_specialize=["num_rows"])
def rms_norm_kernel(
    out,
    x,
    residual,
    weight,
    eps,
    offset,
    num_rows,
    x_stride,
    x_stride_inner,
    residual_stride,
    num_inner,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    """Grid: (rows / ROWS). A row is one of ``num_inner`` of a token."""
    if IS_DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = (row < num_rows)[:, None] & (column < HIDDEN)[None, :]
    dtype: tl.constexpr = out.dtype.element_ty
    source = x + (row // num_inner) * x_stride + (row % num_inner) * x_stride_inner
    value = tl.load(source[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
    scale = tl.load(weight + column, mask=column < HIDDEN, other=0.0).to(tl.float32)[None, :]
    if residual is not None:
        place = residual + (row * residual_stride)[:, None] + column[None, :]
        total = (value + tl.load(place, mask=mask, other=0.0).to(tl.float32)).to(dtype)
        tl.store(place, total, mask=mask)
        value = total.to(tl.float32)
    mean = tl.sum(value * value, 1) / HIDDEN
    value = value * tl.div_rn(1.0, tl.sqrt_rn(mean + eps))[:, None]
    if HAS_OFFSET:
        value = value * (scale + offset)
    else:
        value = value.to(dtype).to(tl.float32) * scale
    target = out + (row * HIDDEN)[:, None] + column[None, :]
    tl.store(target, value.to(dtype), mask=mask)


def example_launches() -> dict[str, Callable[[], object]]:
    """Calls that :mod:`kernels.triton.compile_ahead` builds."""

    def norm(shape: tuple[int, ...], dtype: torch.dtype, offset: float) -> Callable[[], object]:
        x = torch.empty(shape, dtype=dtype, device="meta")
        weight = torch.empty(shape[-1], dtype=dtype, device="meta")
        return lambda: rms_norm(x, weight, 1e-6, offset=offset)

    def add(shape: tuple[int, int], dtype: torch.dtype) -> Callable[[], object]:
        x = torch.empty(shape, dtype=dtype, device="meta")
        weight = torch.empty(shape[-1], dtype=dtype, device="meta")
        return lambda: add_rms_norm_(x, torch.empty_like(x), weight, 1e-6)

    return {
        "add, bf16, 1 x 4096": add((1, 4096), torch.bfloat16),
        "add, bf16, 8192 x 4096": add((8192, 4096), torch.bfloat16),
        "add, fp32, 32 x 576": add((32, 576), torch.float32),
        "bf16, 8192 x 16384": norm((8192, 16384), torch.bfloat16, 0.0),
        "fp16, 32 x 2560, offset": norm((32, 2560), torch.float16, 1.0),
        "bf16, 4096 x 16 heads x 128": norm((4096, 16, 128), torch.bfloat16, 0.0),
    }
