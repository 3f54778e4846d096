"""Greedy choice of a token from its logits."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import dispatch


def argmax(logits: Tensor) -> Tensor:
    """Index of the greatest logit of each row; the first one where several are equal.

    Parameters
    ----------
    logits : Tensor [L, V]
        Rows may be strided, the last dimension is dense. A NaN counts as the greatest, as in torch.

    Returns
    -------
    Tensor [L] int64
        On the device of ``logits``.
    """
    if dispatch.is_native(logits):
        from kernels.cpu import sampling

        return sampling.argmax(logits)
    return argmax_reference(logits)


def argmax_reference(logits: Tensor) -> Tensor:
    """Plain torch form of :func:`argmax`."""
    return torch.argmax(logits, dim=-1)
