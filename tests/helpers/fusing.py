"""A linear method that takes its neighbours into its products, in plain torch."""

from __future__ import annotations

import torch

import kernels
from workbench.slots.linear import DenseLinear, LinearLayer


class FusingLinear(DenseLinear):
    """Takes norms and sums into its products, as the kernels for small steps do."""

    def fuses(self, num_tokens: int) -> bool:
        return True

    def apply_normed(
        self,
        layer: LinearLayer,
        x: torch.Tensor,
        norm: kernels.RowNorm,
        activation: str | None = None,
    ) -> torch.Tensor:
        y = self.apply(layer, kernels.rms_norm(x, norm.weight, norm.eps, offset=norm.offset))
        if activation is None:
            return y
        gate, up = y.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up

    def apply_add_(self, layer: LinearLayer, x: torch.Tensor, residual: torch.Tensor) -> None:
        residual.add_(self.apply(layer, x))
