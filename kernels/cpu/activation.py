"""Gated activations on the CPU. Semantics: :mod:`kernels.activation`."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from kernels.cpu.launch import int_arguments, kernel
from kernels.cpu.pointers import advance, exp, load, pointer, rounded, store

SILU = 0
GELU_TANH = 1

_PARALLEL_NUMEL = 1 << 15  # outputs, under which a second thread costs more than it saves
_SQRT_2_OVER_PI = 0.7978845608028654


def gated(gate_up: Tensor, kind: int) -> Tensor:
    """``activation(gate) * up`` with the activation ``SILU`` or ``GELU_TANH``."""
    rows, double_width = gate_up.shape
    row_stride, dense = gate_up.stride()
    assert double_width % 2 == 0 and dense == 1
    width = double_width // 2
    out = gate_up.new_empty(rows, width)
    is_parallel = rows * width >= _PARALLEL_NUMEL
    addresses = (gate_up.data_ptr(), out.data_ptr())
    _gated(gate_up.dtype, rows, is_parallel, *addresses, width, row_stride, kind)
    return out


@kernel(ints=5)
def _gated(marker, arguments, begin, end):
    gate_up, out, width, row_stride, kind = int_arguments(arguments, 5)
    gate_up, out = pointer(gate_up, marker), pointer(out, marker)
    for row in range(begin, end):
        gate = advance(gate_up, row * row_stride)
        up = advance(gate, width)
        target = advance(out, row * width)
        for j in range(width):
            x = load(gate, j)
            u = x
            if kind == GELU_TANH:
                # x / 2 * (1 + tanh(u)) = x * sigmoid(2 u), which does not cancel at negative x
                cubic = x + np.float32(0.044715) * x * x * x
                u = np.float32(2 * _SQRT_2_OVER_PI) * cubic
            activated = x / (np.float32(1) + exp(-u))
            store(target, j, rounded(target, activated) * load(up, j))
