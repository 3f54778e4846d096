# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Rows of a weight of 4 or 8 bits written out in 16, in Triton, for a matrix library to multiply.

A few thousand rows of x keep the tensor cores busy for much longer than the weight takes to be
written out, piece by piece into the same memory, which the L2 cache holds.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.triton import has_dependent_launch
from kernels.triton.launch import Launcher, dependent_options, planned
from kernels.triton.quantized_layout import TILE_ROWS, group_of, num_chunks, packed_shape

_BLOCK_N, _BLOCK_K, _NUM_WARPS = 16, 512, 4
_TILE_ROWS = tl.constexpr(TILE_ROWS)


@triton.jit(do_not_specialize=["first_row", "num_rows"])
def dequantize_kernel(
    out,
    words,
    scales,
    zeros,
    first_row,
    num_rows,
    last_row,
    in_features,
    out_stride,
    chunks,
    num_groups,
    total_rows,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    IS_EVEN: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    """Grid: (tiles of rows, blocks of columns)."""
    STORED: tl.constexpr = BLOCK_K // 4 if BITS == 4 else BLOCK_K
    ROW: tl.constexpr = 32 if BITS == 4 else 128
    if IS_DEPENDENT:
        gdc_launch_dependents()
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    source = tl.minimum(first_row + row, last_row)
    stored = tl.arange(0, STORED)
    chunk = tl.program_id(1) * (BLOCK_K // 128) + stored // ROW
    within = tl.minimum(chunk, chunks - 1) * (_TILE_ROWS * ROW) + stored % ROW
    at = (source // _TILE_ROWS).to(tl.int64) * chunks * (_TILE_ROWS * ROW)
    at += source % _TILE_ROWS * ROW
    if BITS == 4:
        codes = words.to(tl.pointer_type(tl.int16), bitcast=True)
    else:
        codes = words.to(tl.pointer_type(tl.int8), bitcast=True)
    w = tl.load((codes + at)[:, None] + within[None, :])
    is_row = row < num_rows
    out_rows = out + row.to(tl.int64) * out_stride
    if IS_DEPENDENT:
        gdc_wait()  # the launch before may still read what is written over
    for RUN in tl.static_range(4 if BITS == 4 else 1):
        if BITS == 4:
            column = chunk * 128 + RUN * 32 + stored % 32
            code = ((w >> (4 * RUN)) & 15).to(tl.float32)
        else:
            column = tl.program_id(1) * BLOCK_K + stored
            code = w.to(tl.float32)
        if GROUP == 0:
            group = column * 0
        else:
            group = tl.minimum(column // GROUP, num_groups - 1)
        places = source[:, None] + (group.to(tl.int64) * total_rows)[None, :]
        if zeros is not None:
            code -= tl.load(zeros + places).to(tl.float32)
        elif BITS == 4:
            code -= 8.0
        value = code * tl.load(scales + places).to(tl.float32)
        mask = is_row[:, None]
        if not IS_EVEN:
            mask = mask & (column < in_features)[None, :]
        tl.store(out_rows[:, None] + column[None, :], value.to(out.dtype.element_ty), mask=mask)


def dequantize_rows_(
    out: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    *,
    bits: int,
    rows: int,
    first_row: int = 0,
) -> None:
    """Write rows of a weight from ``first_row`` on into ``out``.

    Parameters
    ----------
    out : Tensor [R, K]
        Its rows contiguous.
    words, scales, zeros, bits, rows
        As of :func:`kernels.triton.quantized_gemv.quantized_gemv`.
    """
    _dequantize((out, words, scales, zeros), bits, rows, first_row)


@planned
def _dequantize(
    out: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    rows: int,
    first_row: int,
) -> Launcher:
    num_rows, in_features = out.shape
    num_groups = scales.shape[0]
    assert words.shape == packed_shape(rows, in_features, bits) and words.is_contiguous()
    assert scales.shape == (num_groups, rows) and scales.is_contiguous()
    assert zeros is None or (zeros.shape == scales.shape and zeros.is_contiguous())
    assert out.stride(1) == 1 and first_row + num_rows <= rows
    is_dependent = has_dependent_launch(out.device)
    return Launcher(
        dequantize_kernel,
        (triton.cdiv(num_rows, _BLOCK_N), triton.cdiv(in_features, _BLOCK_K)),
        first_row,
        num_rows,
        rows - 1,
        in_features,
        out.stride(0),
        num_chunks(in_features),
        num_groups,
        rows,
        BITS=bits,
        GROUP=group_of(in_features, num_groups),
        BLOCK_N=_BLOCK_N,
        BLOCK_K=_BLOCK_K,
        IS_EVEN=in_features % _BLOCK_K == 0,
        IS_DEPENDENT=is_dependent,
        num_warps=_NUM_WARPS,
        **dependent_options(is_dependent),
    )


def example_launches() -> dict[str, Callable[[], object]]:
    """Calls that :mod:`kernels.triton.compile_ahead` builds."""

    def call(
        dtype: torch.dtype, rows: int, in_features: int, bits: int, group: int, has_zeros: bool
    ) -> Callable[[], object]:
        def run() -> None:
            shape = (in_features // group if group else 1, rows)
            dequantize_rows_(
                torch.empty(rows, in_features, dtype=dtype),
                torch.empty(packed_shape(rows, in_features, bits), dtype=torch.int32),
                torch.empty(shape, dtype=dtype),
                torch.empty(shape, dtype=torch.int8) if has_zeros else None,
                bits=bits,
                rows=rows,
            )

        return run

    return {
        "w4g128, 512 x 4096": call(torch.bfloat16, 512, 4096, 4, 128, False),
        "w4g32z, fp16, 100 x 96": call(torch.float16, 100, 96, 4, 32, True),
        "w8, 512 x 4096": call(torch.bfloat16, 512, 4096, 8, 0, False),
    }
