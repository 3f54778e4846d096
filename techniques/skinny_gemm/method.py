"""Linear layers whose products of few rows are this repository's Triton kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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
    fuse_rows
        The same of more tokens, as many as the kernel takes, in bf16.
    gate_rows
        Whether products of more rows multiply gate and up where they come out, where they have
        nothing else within.
    tune_dense
        Whether products of more rows than the kernel takes are those of ``tuned_gemm``.
    """

    max_rows: int = 32
    fuse_one_row: bool = True
    fuse_rows: bool = True
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
        self._is_exact_only = self._may_fuse_rows = False  # until a layer is known
        self.reset_counters()

    def process_weights_after_loading(self, layer: LinearLayer, expected_tokens: int) -> None:
        super().process_weights_after_loading(layer, expected_tokens)
        self._is_exact_only = layer.state.weight.dtype == torch.float32
        # A row times its norm's weight, not yet divided by its size, may be more than fp16 holds.
        self._may_fuse_rows = layer.state.weight.dtype == torch.bfloat16

    def _takes(self, num_rows: int) -> bool:
        # Tensor cores would round values of fp32, and without them more rows take longer.
        return num_rows <= (1 if self._is_exact_only else self.config.max_rows)

    def apply(self, layer: LinearLayer, x: torch.Tensor) -> torch.Tensor:
        if not self._takes(x.shape[0]):
            return super().apply(layer, x)
        self._skinny += 1
        return _product(x)(x, layer.state.weight, layer.state.bias)

    def tuned(self, layer: LinearLayer, x: torch.Tensor) -> torch.Tensor | None:
        return super().tuned(layer, x) if self.config.tune_dense else None

    def gates(self, num_tokens: int) -> bool:
        return self.config.gate_rows and num_tokens > 1 and self._takes(num_tokens)

    def apply_gated(self, layer: LinearLayer, x: torch.Tensor, activation: str) -> torch.Tensor:
        self._fused += 1
        return _product(x)(x, layer.state.weight, layer.state.bias, activation=activation)

    def fuses(self, num_tokens: int) -> bool:
        if num_tokens == 1:
            return self.config.fuse_one_row
        return self.config.fuse_rows and self._may_fuse_rows and self._takes(num_tokens)

    def begin_normed(self, x: torch.Tensor, norm: RowNorm) -> Any:
        if x.shape[0] == 1:
            return x, norm
        from kernels.triton.skinny_gemm import scale_rows

        return scale_rows(x, norm)

    def apply_normed(
        self, layer: LinearLayer, rows: Any, activation: str | None = None
    ) -> torch.Tensor:
        self._fused += 1
        weight, bias = layer.state.weight, layer.state.bias
        if isinstance(rows, tuple):
            from kernels.triton.gemv import gemv

            x, norm = rows
            return gemv(x, weight, bias, norm=norm, activation=activation)
        from kernels.triton.skinny_gemm import skinny_linear

        return skinny_linear(rows, weight, bias, activation=activation)

    def apply_add_(
        self, layer: LinearLayer, x: torch.Tensor, residual: torch.Tensor, norm: RowNorm | None
    ) -> Any:
        self._fused += 1
        weight, bias = layer.state.weight, layer.state.bias
        if norm is None or x.shape[0] == 1:
            _product(x)(x, weight, bias, residual=residual)
            return None if norm is None else (residual, norm)
        from kernels.triton.skinny_gemm import skinny_add_

        return skinny_add_(x, weight, bias, residual, norm)

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


def _product(x: torch.Tensor) -> Callable[..., torch.Tensor]:
    """The kernel for as many rows as ``x`` has."""
    if x.shape[0] == 1:
        from kernels.triton.gemv import gemv

        return gemv
    from kernels.triton.skinny_gemm import skinny_linear

    return skinny_linear
