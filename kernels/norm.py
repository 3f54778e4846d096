"""RMS normalisation, alone and fused with the residual addition before it.

``offset`` chooses between the two conventions in use: 0 multiplies by ``weight`` in the model's
dtype (Llama, Mistral, Qwen), any other value multiplies by ``offset + weight`` in fp32 before the
cast (Gemma has 1). Paper: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import dispatch


@dataclass(frozen=True, slots=True)
class RowNorm:
    """What :func:`rms_norm` takes beside the rows, for a product that norms them itself.

    Attributes
    ----------
    weight : Tensor [H]
    eps, offset
        As of :func:`rms_norm`.
    """

    weight: Tensor
    eps: float
    offset: float = 0.0


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0) -> Tensor:
    """Normalise each row of ``x`` to unit root mean square, in fp32, and scale it.

    Parameters
    ----------
    x : Tensor [T, H] or [T, heads, H]
        Rows; any strides in the leading dimensions, the last one dense.
    weight : Tensor [H]
        Scale, in the dtype of ``x``.
    eps : float
        Added to the mean square.
    offset : float
        0 for Llama-like models, 1 for Gemma (see the module's docstring).

    Returns
    -------
    Tensor
        Same shape and dtype as ``x``, contiguous.
    """
    if dispatch.is_native(x):
        from kernels.cpu import norm

        return norm.rms_norm(x, weight, eps, offset)
    return rms_norm_reference(x, weight, eps, offset=offset)


def add_rms_norm_(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0
) -> Tensor:
    """Add ``x`` to ``residual`` in place and return the normalised sum.

    Parameters
    ----------
    x : Tensor [T, H]
        What the last block put out.
    residual : Tensor [T, H]
        The residual stream; overwritten with ``residual + x``, rounded to its dtype.
    weight, eps, offset
        As in :func:`rms_norm`.

    Returns
    -------
    Tensor [T, H]
        ``rms_norm(residual + x)``, contiguous.
    """
    if dispatch.is_native(x):
        from kernels.cpu import norm

        return norm.add_rms_norm_(x, residual, weight, eps, offset)
    return add_rms_norm_reference_(x, residual, weight, eps, offset=offset)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0) -> Tensor:
    """Plain torch form of :func:`rms_norm`."""
    wide = x.to(dispatch.accumulate_dtype(x))
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if offset:
        return (normed * (offset + weight.to(wide.dtype))).to(x.dtype).contiguous()
    return (normed.to(x.dtype) * weight).contiguous()


def add_rms_norm_reference_(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0
) -> Tensor:
    """Plain torch form of :func:`add_rms_norm_`."""
    residual.add_(x)
    return rms_norm_reference(residual, weight, eps, offset=offset)
