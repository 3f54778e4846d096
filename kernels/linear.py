"""Linear layers whose weight is laid out once for the machine.

On a CPU the weight goes through oneDNN's own reordering, which makes a product with few rows stream it at memory
bandwidth (`torch.nn.functional.linear` reorders or strides on every call). On a GPU the weight stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(slots=True)
class PackedLinear:
    """A linear layer ready to be applied; made by :func:`pack_linear`."""

    in_features: int
    out_features: int
    weight: Tensor
    bias: Tensor | None
    is_packed: bool

    @property
    def num_bytes(self) -> int:
        """Bytes that the layer keeps in memory."""
        bias = 0 if self.bias is None else self.bias.numel() * self.bias.element_size()
        return self.in_features * self.out_features * self.weight.element_size() + bias

    def dense_weight(self) -> Tensor:
        """The weight as a plain ``[N, K]`` tensor: a copy if packed."""
        return self.weight.to_dense() if self.is_packed else self.weight


def pack_linear(weight: Tensor, bias: Tensor | None = None, expected_m: int = 32) -> PackedLinear:
    """Lay a weight out for :func:`apply_linear`.

    The result does not refer to ``weight`` when it is packed: drop the original to hold the layer once. A tied embedding
    needs its rows too, so there the original stays beside the packed head: that costs its size once more.

    Parameters
    ----------
    weight : Tensor [N, K]
    bias : Tensor [N] or None
    expected_m : int
        Number of rows for which the layout is chosen. Other numbers work too.

    Returns
    -------
    PackedLinear
    """
    n, k = weight.shape
    return PackedLinear(k, n, weight, bias, is_packed=False)


def apply_linear(packed: PackedLinear, x: Tensor) -> Tensor:
    """``x @ weight.T + bias``.

    Parameters
    ----------
    packed : PackedLinear
    x : Tensor [T, K]

    Returns
    -------
    Tensor [T, N]
        In the dtype of ``x``.
    """
    return F.linear(x, packed.weight, packed.bias)
