"""RMSNorm on the CPU. Semantics: :mod:`kernels.norm`."""

from __future__ import annotations

import numpy as np
import torch
from numba import prange
from torch import Tensor

from kernels.cpu.pointers import (
    MARKERS,
    advance,
    entry,
    helper,
    load,
    parallel_entry,
    pointer,
    rounded,
    store,
)
from kernels.cpu.threads import num_threads

# Under this many elements a second thread costs more than it saves.
_PARALLEL_NUMEL = 1 << 17


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    """See :func:`kernels.norm.rms_norm`."""
    out = torch.empty(x.shape, dtype=x.dtype)
    if x.dim() == 2:
        rows, hidden = x.shape
        heads, row_stride, head_stride, dense = 1, x.stride(0), 0, x.stride(1)
    else:
        rows, heads, hidden = x.shape
        row_stride, head_stride, dense = x.stride()
    assert (dense == 1 or hidden == 1) and weight.is_contiguous() and weight.shape == (hidden,)
    assert weight.dtype == x.dtype
    arguments = (
        MARKERS[x.dtype],
        x.data_ptr(),
        weight.data_ptr(),
        out.data_ptr(),
        rows * heads,
        heads,
        hidden,
        row_stride,
        head_stride,
        eps,
        offset,
    )
    if x.numel() >= _PARALLEL_NUMEL and num_threads() > 1:
        _rms_norm_parallel(*arguments)
    else:
        _rms_norm_serial(*arguments)
    return out


def add_rms_norm_(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float
) -> Tensor:
    """See :func:`kernels.norm.add_rms_norm_`."""
    rows, hidden = x.shape
    assert residual.shape == x.shape and weight.shape == (hidden,) and weight.is_contiguous()
    assert residual.dtype == weight.dtype == x.dtype
    assert (x.stride(1) == residual.stride(1) == 1) or hidden == 1
    out = torch.empty(x.shape, dtype=x.dtype)
    arguments = (
        MARKERS[x.dtype],
        x.data_ptr(),
        residual.data_ptr(),
        weight.data_ptr(),
        out.data_ptr(),
        rows,
        hidden,
        x.stride(0),
        residual.stride(0),
        eps,
        offset,
    )
    if x.numel() >= _PARALLEL_NUMEL and num_threads() > 1:
        _add_rms_norm_parallel(*arguments)
    else:
        _add_rms_norm_serial(*arguments)
    return out


@helper
def sum_of_squares(x, hidden):
    """Over one row."""
    total = np.float32(0)
    for j in range(hidden):
        value = load(x, j)
        total += value * value
    return total


@helper
def normalize(x, total, weight, out, hidden, eps, offset):
    """Scale one row whose sum of squares is ``total``; ``out`` may be ``x``."""
    scale = np.float32(1) / np.sqrt(total / np.float32(hidden) + np.float32(eps))
    if offset != 0.0:
        shift = np.float32(offset)
        for j in range(hidden):
            store(out, j, load(x, j) * scale * (shift + load(weight, j)))
    else:
        for j in range(hidden):
            store(out, j, rounded(out, load(x, j) * scale) * load(weight, j))


@helper
def _add(x, residual, hidden):
    for j in range(hidden):
        store(residual, j, load(residual, j) + load(x, j))


@helper
def _norm_row(x, weight, out, row, heads, hidden, row_stride, head_stride, eps, offset):
    x = advance(x, row // heads * row_stride + row % heads * head_stride)
    total = sum_of_squares(x, hidden)
    normalize(x, total, weight, advance(out, row * hidden), hidden, eps, offset)


@helper
def _add_norm_row(x, residual, weight, out, row, hidden, x_stride, residual_stride, eps, offset):
    residual = advance(residual, row * residual_stride)
    _add(advance(x, row * x_stride), residual, hidden)
    total = sum_of_squares(residual, hidden)
    normalize(residual, total, weight, advance(out, row * hidden), hidden, eps, offset)


@entry
def _rms_norm_serial(
    marker, x, weight, out, rows, heads, hidden, row_stride, head_stride, eps, offset
):
    x, weight, out = pointer(x, marker), pointer(weight, marker), pointer(out, marker)
    for row in range(rows):
        _norm_row(x, weight, out, row, heads, hidden, row_stride, head_stride, eps, offset)


@parallel_entry
def _rms_norm_parallel(
    marker, x, weight, out, rows, heads, hidden, row_stride, head_stride, eps, offset
):
    x, weight, out = pointer(x, marker), pointer(weight, marker), pointer(out, marker)
    for row in prange(rows):
        _norm_row(x, weight, out, row, heads, hidden, row_stride, head_stride, eps, offset)


@entry
def _add_rms_norm_serial(
    marker, x, residual, weight, out, rows, hidden, x_stride, residual_stride, eps, offset
):
    x, residual = pointer(x, marker), pointer(residual, marker)
    weight, out = pointer(weight, marker), pointer(out, marker)
    for row in range(rows):
        _add_norm_row(
            x, residual, weight, out, row, hidden, x_stride, residual_stride, eps, offset
        )


@parallel_entry
def _add_rms_norm_parallel(
    marker, x, residual, weight, out, rows, hidden, x_stride, residual_stride, eps, offset
):
    x, residual = pointer(x, marker), pointer(residual, marker)
    weight, out = pointer(weight, marker), pointer(out, marker)
    for row in prange(rows):
        _add_norm_row(
            x, residual, weight, out, row, hidden, x_stride, residual_stride, eps, offset
        )
