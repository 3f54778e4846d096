"""Linear layers whose weight is laid out once for the machine.

On a CPU the weight goes through oneDNN's reordering, as torch's compiler does when it freezes a
model: a product with few rows then streams it at memory bandwidth, where
``torch.nn.functional.linear`` takes about twice as long. On a GPU, and for a dtype that oneDNN does
not serve, the weight stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# oneDNN's layout for one row is up to half slower at more; the one for this many is as good at one.
_MIN_EXPECTED_M = 32


@dataclass(slots=True, frozen=True, eq=False)
class PackedLinear:
    """A linear layer ready to be applied; made by :func:`pack_linear`.

    Attributes
    ----------
    weight : Tensor [out_features, in_features]
        An opaque oneDNN tensor if ``is_packed``.
    bias : Tensor [out_features] or None
    is_packed : bool
    """

    in_features: int
    out_features: int
    weight: Tensor
    bias: Tensor | None
    is_packed: bool

    @property
    def num_bytes(self) -> int:
        """Bytes that the layer keeps in memory, without the padding of a packed weight's tiles."""
        bias = 0 if self.bias is None else self.bias.numel() * self.bias.element_size()
        return self.in_features * self.out_features * self.weight.element_size() + bias

    def dense_weight(self) -> Tensor:
        """The weight as a plain tensor ``[out_features, in_features]``; a copy if packed."""
        return self.weight.to_dense() if self.is_packed else self.weight


def can_pack(weight: Tensor) -> bool:
    """Whether :func:`pack_linear` will lay ``weight`` out anew, rather than keep it."""
    if not (weight.is_cpu and torch._C._has_mkldnn):
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


def pack_linear(weight: Tensor, bias: Tensor | None = None, expected_m: int = 32) -> PackedLinear:
    """Lay a weight out for :func:`apply_linear`.

    A packed layer does not refer to ``weight``: the caller drops the original, and the layer is
    held once. A tied embedding needs its rows as well, so there the original stays beside the
    packed head and costs its size once more (SmolLM2-135M: 54 MiB in bf16 beside 257 MiB of
    weights).

    Parameters
    ----------
    weight : Tensor [N, K]
        Not modified.
    bias : Tensor [N] or None
    expected_m : int
        Number of rows for which the layout is chosen; any other number works too.

    Returns
    -------
    PackedLinear
    """
    if weight.dim() != 2:
        raise ValueError(f"a linear layer's weight has 2 dimensions, not the shape {weight.shape}")
    out_features, in_features = weight.shape
    if bias is not None and bias.shape != (out_features,):
        raise ValueError(f"bias of shape {bias.shape} for a weight of shape {weight.shape}")
    is_packed = can_pack(weight)
    if is_packed:
        rows = max(expected_m, _MIN_EXPECTED_M)
        weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), rows)
    return PackedLinear(in_features, out_features, weight, bias, is_packed)


def apply_linear(packed: PackedLinear, x: Tensor) -> Tensor:
    """``x @ weight.T + bias``.

    Parameters
    ----------
    packed : PackedLinear
    x : Tensor [T, K]
        In the dtype of the weight; any strides.

    Returns
    -------
    Tensor [T, N]
        Contiguous, in the dtype of ``x``; sums are fp32.
    """
    if packed.is_packed:
        op = torch.ops.mkldnn._linear_pointwise
        out: Tensor = op(x, packed.weight, packed.bias, "none", [], "")  # no activation behind it
        return out
    return F.linear(x, packed.weight, packed.bias)


def linear_reference(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """Plain torch form of :func:`apply_linear`, from a weight that is not packed."""
    return F.linear(x, weight, bias)
