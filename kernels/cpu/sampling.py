"""Greedy token choice on the CPU. Semantics: :mod:`kernels.sampling`."""

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
    store_int,
)
from kernels.cpu.threads import num_threads
from kernels.cpu.vector import LANES, greatest, vfill, vload, vmax

_PARALLEL_NUMEL = 1 << 18
_CHUNK = 1024


def argmax(logits: Tensor) -> Tensor:
    """See :func:`kernels.sampling.argmax`."""
    rows, width = logits.shape
    assert width > 0 and (logits.stride(1) == 1 or width == 1)
    out = torch.empty(rows, dtype=torch.int64)
    is_parallel = rows > 1 and logits.numel() >= _PARALLEL_NUMEL and num_threads() > 1
    (_argmax_parallel if is_parallel else _argmax_serial)(
        MARKERS[logits.dtype], logits.data_ptr(), out.data_ptr(), rows, width, logits.stride(0)
    )
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
    a = b = vfill(-np.inf)
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


@entry
def _argmax_serial(marker, logits, out, rows, width, row_stride):
    logits, out = pointer(logits, marker), pointer(out, np.int64(0))
    for row in range(rows):
        store_int(out, row, _argmax_row(advance(logits, row * row_stride), width))


@parallel_entry
def _argmax_parallel(marker, logits, out, rows, width, row_stride):
    logits, out = pointer(logits, marker), pointer(out, np.int64(0))
    for row in prange(rows):
        store_int(out, row, _argmax_row(advance(logits, row * row_stride), width))
