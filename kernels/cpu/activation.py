"""Gated activations on the CPU. Semantics: :mod:`kernels.activation`."""

from __future__ import annotations

import numpy as np
import torch
from numba import prange
from torch import Tensor

from kernels.cpu.pointers import (
    MARKERS,
    advance,
    entry,
    exp,
    helper,
    load,
    parallel_entry,
    pointer,
    rounded,
    store,
)
from kernels.cpu.threads import num_threads

SILU = 0
GELU_TANH = 1

_PARALLEL_NUMEL = 1 << 15  # outputs
_SQRT_2_OVER_PI = 0.7978845608028654


def gated(gate_up: Tensor, kind: int) -> Tensor:
    """``activation(gate) * up`` with the activation ``SILU`` or ``GELU_TANH``."""
    rows, width = gate_up.shape
    assert width % 2 == 0 and gate_up.stride(1) == 1
    out = torch.empty((rows, width // 2), dtype=gate_up.dtype)
    is_parallel = out.numel() >= _PARALLEL_NUMEL and num_threads() > 1
    (_gated_parallel if is_parallel else _gated_serial)(
        MARKERS[gate_up.dtype],
        gate_up.data_ptr(),
        out.data_ptr(),
        rows,
        width // 2,
        gate_up.stride(0),
        kind,
    )
    return out


@helper
def _gated_row(gate, up, out, width, kind):
    # gelu_tanh(x) = x / 2 * (1 + tanh(u)) = x * sigmoid(2 u): without the cancellation of tanh at negative x
    for j in range(width):
        x = load(gate, j)
        u = x
        if kind == GELU_TANH:
            u = np.float32(2 * _SQRT_2_OVER_PI) * (x + np.float32(0.044715) * x * x * x)
        activated = x / (np.float32(1) + exp(-u))
        store(out, j, rounded(out, activated) * load(up, j))


@entry
def _gated_serial(marker, gate_up, out, rows, width, row_stride, kind):
    gate_up, out = pointer(gate_up, marker), pointer(out, marker)
    for row in range(rows):
        gate = advance(gate_up, row * row_stride)
        _gated_row(gate, advance(gate, width), advance(out, row * width), width, kind)


@parallel_entry
def _gated_parallel(marker, gate_up, out, rows, width, row_stride, kind):
    gate_up, out = pointer(gate_up, marker), pointer(out, marker)
    for row in prange(rows):
        gate = advance(gate_up, row * row_stride)
        _gated_row(gate, advance(gate, width), advance(out, row * width), width, kind)
