"""Gated activations of a SwiGLU or GeGLU block, on the fused gate-and-up projection.

Paper: Shazeer, "GLU Variants Improve Transformer", 2020.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kernels import dispatch


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` for ``gate_up = [gate | up]``.

    Parameters
    ----------
    gate_up : Tensor [T, 2F]
        The fused projection: gate in the first half of each row, up in the second. Rows may be
        strided.

    Returns
    -------
    Tensor [T, F]
        In the dtype of ``gate_up``; the activation is rounded to that dtype before the product, as
        an unfused model does.
    """
    if dispatch.is_native(gate_up):
        from kernels.cpu import activation

        return activation.gated(gate_up, activation.SILU)
    return silu_and_mul_reference(gate_up)


def gelu_tanh_and_mul(gate_up: Tensor) -> Tensor:
    """``gelu_tanh(gate) * up`` for ``gate_up = [gate | up]``; shapes as in :func:`silu_and_mul`."""
    if dispatch.is_native(gate_up):
        from kernels.cpu import activation

        return activation.gated(gate_up, activation.GELU_TANH)
    return gelu_tanh_and_mul_reference(gate_up)


def silu_and_mul_reference(gate_up: Tensor) -> Tensor:
    """Plain torch form of :func:`silu_and_mul`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def gelu_tanh_and_mul_reference(gate_up: Tensor) -> Tensor:
    """Plain torch form of :func:`gelu_tanh_and_mul`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up
