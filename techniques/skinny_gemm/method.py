"""Linear layers whose products of few rows are this repository's Triton kernel."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels import RowNorm
from kernels.cublaslt import unavailable_reasons
from techniques.fused_kernels.ops import unsupported_reasons
from techniques.tuned_gemm import TunedLinear
from workbench.core.errors import ConfigError
from workbench.slots.linear import LinearLayer

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
    gate_rows
        Whether products of more rows multiply gate and up where they come out.
    tune_dense
        Whether products of more rows than the kernel takes are those of ``tuned_gemm``.
    """

    max_rows: int = 32
    fuse_one_row: bool = True
    gate_rows: bool = True
    tune_dense: bool = False


class SkinnyLinear(TunedLinear):
    """Weights in the model's dtype; products of few rows by ``kernels.triton.skinny_gemm``."""

    Config = SkinnyLinearConfig
    config: SkinnyLinearConfig

    def __init__(self, config: SkinnyLinearConfig | None = None) -> None:
        super().__init__(config)
        if not 1 <= self.config.max_rows <= _MOST_ROWS:
            raise ConfigError(
                f"engine.linear.max_rows={self.config.max_rows} must be from 1 to {_MOST_ROWS}."
            )
        self._is_exact_only = False  # until a layer is known
        self.reset_counters()

    def process_weights_after_loading(self, layer: LinearLayer, expected_tokens: int) -> None:
        super().process_weights_after_loading(layer, expected_tokens)
        self._is_exact_only = layer.state.weight.dtype == torch.float32

    def _takes(self, num_rows: int) -> bool:
        # Tensor cores would round values of fp32, and without them more rows take longer.
        return num_rows <= (1 if self._is_exact_only else self.config.max_rows)

    def apply(self, layer: LinearLayer, x: torch.Tensor) -> torch.Tensor:
        if not self._takes(x.shape[0]):
            return super().apply(layer, x)
        self._skinny += 1
        weight, bias = layer.state.weight, layer.state.bias
        if x.shape[0] == 1:
            from kernels.triton.gemv import gemv

            return gemv(x, weight, bias)
        from kernels.triton.skinny_gemm import skinny_linear

        return skinny_linear(x, weight, bias)

    def tuned(self, layer: LinearLayer, x: torch.Tensor) -> torch.Tensor | None:
        return super().tuned(layer, x) if self.config.tune_dense else None

    def gates(self, num_tokens: int) -> bool:
        return self.config.gate_rows and num_tokens > 1 and self._takes(num_tokens)

    def apply_gated(self, layer: LinearLayer, x: torch.Tensor, activation: str) -> torch.Tensor:
        from kernels.triton.skinny_gemm import skinny_linear

        self._fused += 1
        return skinny_linear(x, layer.state.weight, layer.state.bias, activation=activation)

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
        reasons = unsupported_reasons(device, dtype)
        return reasons + (unavailable_reasons(device) if self.config.tune_dense else [])

    def counters(self) -> dict[str, float]:
        return super().counters() | {
            "skinny_calls": self._skinny + self._fused,
            "fused_calls": self._fused,
        }

    def reset_counters(self) -> None:
        super().reset_counters()
        self._skinny = self._fused = 0
