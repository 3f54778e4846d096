"""Linear layers whose products of few rows are this repository's Triton kernel."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels import RowNorm
from kernels.linear import PackedLinear
from techniques.fused_kernels.ops import unsupported_reasons
from workbench.core.errors import ConfigError
from workbench.slots.linear import DenseLinear, LinearLayer

_MOST_ROWS = 64  # of the kernel


@dataclass(frozen=True, slots=True)
class SkinnyLinearConfig:
    """Options of :class:`SkinnyLinear`.

    Attributes
    ----------
    max_rows
        Most rows that the kernel takes; products of more are dense. In fp32 it takes one at most.
    fuse_one_row
        Whether a step of one token has its norms, activations and additions in its products.
    """

    max_rows: int = 32
    fuse_one_row: bool = True


class SkinnyLinear(DenseLinear):
    """Weights in the model's dtype; products of few rows by ``kernels.triton.skinny_gemm``."""

    Config = SkinnyLinearConfig
    config: SkinnyLinearConfig

    def __init__(self, config: SkinnyLinearConfig | None = None) -> None:
        super().__init__(config)
        if not 1 <= self.config.max_rows <= _MOST_ROWS:
            raise ConfigError(
                f"engine.linear.max_rows={self.config.max_rows} must be from 1 to {_MOST_ROWS}."
            )
        self.reset_counters()

    def process_weights_after_loading(self, layer: LinearLayer, expected_tokens: int) -> None:
        weight, bias = layer.params.pop("weight"), layer.params.pop("bias", None)
        out_features, in_features = weight.shape
        layer.state = PackedLinear(in_features, out_features, weight, bias, is_packed=False)

    def apply(self, layer: LinearLayer, x: torch.Tensor) -> torch.Tensor:
        # Tensor cores would round values of fp32, and without them more rows take longer.
        most = 1 if x.dtype == torch.float32 else self.config.max_rows
        if x.shape[0] > most:
            self._dense += 1
            return super().apply(layer, x)
        self._skinny += 1
        weight, bias = layer.state.weight, layer.state.bias
        if x.shape[0] == 1:
            from kernels.triton.gemv import gemv

            return gemv(x, weight, bias)
        from kernels.triton.skinny_gemm import skinny_linear

        return skinny_linear(x, weight, bias)

    def fuses(self, num_tokens: int) -> bool:
        return num_tokens == 1 and self.config.fuse_one_row

    def apply_normed(
        self, layer: LinearLayer, x: torch.Tensor, norm: RowNorm, activation: str | None = None
    ) -> torch.Tensor:
        from kernels.triton.gemv import gemv

        self._fused += 1
        return gemv(x, layer.state.weight, layer.state.bias, norm=norm, activation=activation)

    def apply_add_(self, layer: LinearLayer, x: torch.Tensor, residual: torch.Tensor) -> None:
        from kernels.triton.gemv import gemv

        self._fused += 1
        gemv(x, layer.state.weight, layer.state.bias, residual=residual)

    def unsupported_reasons(self, device: torch.device, dtype: torch.dtype) -> list[str]:
        return unsupported_reasons(device, dtype)

    def counters(self) -> dict[str, float]:
        return {
            "skinny_calls": self._skinny + self._fused,
            "fused_calls": self._fused,
            "dense_calls": self._dense,
        }

    def reset_counters(self) -> None:
        self._skinny = self._fused = self._dense = 0
