"""Greedy token choice on the CPU. Semantics: :mod:`kernels.sampling`."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kernels.cpu.launch import int_arguments, kernel
from kernels.cpu.pointers import advance, helper, int64_pointer, load, pointer, store_int
from kernels.cpu.vector import LANES, greatest, vfill, vload, vmax

_PARALLEL_NUMEL = 1 << 18  # under which a second thread costs more than it saves
_CHUNK = 1024  # logits that stay in the first-level cache between two passes


def argmax(logits: Tensor) -> Tensor:
    """See :func:`kernels.sampling.argmax`."""
    rows, width = logits.shape
    row_stride, dense = logits.stride()
    assert width > 0 and (dense == 1 or width == 1)
    out = torch.empty(rows, dtype=torch.int64)
    is_parallel = rows > 1 and rows * width >= _PARALLEL_NUMEL
    addresses = (logits.data_ptr(), out.data_ptr())
    _argmax(logits.dtype, rows, is_parallel, *addresses, width, row_stride)
    return out


@helper
def _has_nan(x, start, stop):
    count = np.int32(0)  # summed, not tested one by one: that vectorises
    for j in range(start, stop):
        value = load(x, j)
        count += np.int32(value != value)
    return count != 0


@helper
def _max(x, start, stop):
    """Greatest of ``x[start:stop]`` apart from NaNs."""
    a = b = vfill(np.float32(-np.inf))
    end = start + (stop - start) // (2 * LANES) * (2 * LANES)
    for j in range(start, end, 2 * LANES):
        a = vmax(a, vload(x, j))
        b = vmax(b, vload(x, j + LANES))
    best = greatest(vmax(a, b))
    for j in range(end, stop):
        best = max(best, load(x, j))
    return best


@helper
def _argmax_row(x, width):
    best, best_start = np.float32(-np.inf), 0
    for start in range(0, width, _CHUNK):
        stop = min(start + _CHUNK, width)
        if _has_nan(x, start, stop):
            for j in range(start, stop):
                if load(x, j) != load(x, j):
                    return j
        value = _max(x, start, stop)
        if value > best:
            best, best_start = value, start
    for j in range(best_start, width):
        if load(x, j) == best:
            return j
    return 0


@kernel(ints=4)
def _argmax(marker, arguments, begin, end):
    logits, out, width, row_stride = int_arguments(arguments, 4)
    logits, out = pointer(logits, marker), int64_pointer(out)
    for row in range(begin, end):
        store_int(out, row, _argmax_row(advance(logits, row * row_stride), width))
