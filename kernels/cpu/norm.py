"""RMSNorm on the CPU. Semantics: :mod:`kernels.norm`."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kernels.cpu.launch import float_argument, int_arguments, kernel
from kernels.cpu.pointers import advance, helper, load, pointer, rounded, store

# Under this many elements a second thread costs more than it saves.
_PARALLEL_NUMEL = 1 << 17


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    """See :func:`kernels.norm.rms_norm`."""
    if x.dim() == 2:
        rows, hidden = x.shape
        row_stride, dense = x.stride()
        heads, head_stride = 1, 0
    else:
        rows, heads, hidden = x.shape
        row_stride, head_stride, dense = x.stride()
    assert (dense == 1 or hidden == 1) and weight.dtype == x.dtype
    assert weight.shape[0] == hidden and weight.is_contiguous()
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    sources = (x.data_ptr(), weight.data_ptr(), out.data_ptr())
    strides = (row_stride, head_stride)
    count = rows * heads
    is_parallel = count * hidden >= _PARALLEL_NUMEL
    _rms_norm(x.dtype, count, is_parallel, *sources, heads, hidden, *strides, eps, offset)
    return out


def add_rms_norm_(x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    """See :func:`kernels.norm.add_rms_norm_`."""
    rows, hidden = x.shape
    x_stride, x_dense = x.stride()
    residual_stride, residual_dense = residual.stride()
    assert residual.shape == x.shape and weight.shape[0] == hidden and weight.is_contiguous()
    assert residual.dtype == weight.dtype == x.dtype
    assert x_dense == residual_dense == 1 or hidden == 1
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    sources = (x.data_ptr(), residual.data_ptr(), weight.data_ptr(), out.data_ptr())
    strides = (x_stride, residual_stride)
    is_parallel = rows * hidden >= _PARALLEL_NUMEL
    _add_rms_norm(x.dtype, rows, is_parallel, *sources, hidden, *strides, eps, offset)
    return out


@helper
def normalize(x, weight, out, hidden, eps, offset):
    """One row; ``out`` may be ``x``."""
    total = np.float32(0)
    for j in range(hidden):
        value = load(x, j)
        total += value * value
    scale = np.float32(1) / np.sqrt(total / np.float32(hidden) + eps)
    if offset != 0:
        for j in range(hidden):
            store(out, j, load(x, j) * scale * (offset + load(weight, j)))
    else:
        for j in range(hidden):
            store(out, j, rounded(out, load(x, j) * scale) * load(weight, j))


@kernel(ints=7, floats=2)
def _rms_norm(marker, arguments, begin, end):
    x, weight, out, heads, hidden, row_stride, head_stride = int_arguments(arguments, 7)
    eps, offset = float_argument(arguments, 7), float_argument(arguments, 8)
    x, weight, out = pointer(x, marker), pointer(weight, marker), pointer(out, marker)
    for index in range(begin, end):
        row = advance(x, index // heads * row_stride + index % heads * head_stride)
        normalize(row, weight, advance(out, index * hidden), hidden, eps, offset)


@kernel(ints=7, floats=2)
def _add_rms_norm(marker, arguments, begin, end):
    x, residual, weight, out, hidden, x_stride, residual_stride = int_arguments(arguments, 7)
    eps, offset = float_argument(arguments, 7), float_argument(arguments, 8)
    x, residual = pointer(x, marker), pointer(residual, marker)
    weight, out = pointer(weight, marker), pointer(out, marker)
    for index in range(begin, end):
        source = advance(x, index * x_stride)
        row = advance(residual, index * residual_stride)
        for j in range(hidden):
            store(row, j, load(row, j) + load(source, j))
        normalize(row, weight, advance(out, index * hidden), hidden, eps, offset)
