"""Norms and draws, which are computed row by row, by kernels that cut no row by their number."""

from __future__ import annotations

import torch

from techniques.batch_invariant import device as where
from techniques.fused_kernels import FusedOps, FusedSampler
from workbench.slots.ops import DispatchedOps
from workbench.slots.sampler import Sampler, SamplerOutput, SamplingMetadata, TorchSampler


class InvariantOps(DispatchedOps):
    """The compiled kernels on a CPU. On a GPU the fused ones, with as many threads to a row
    however many rows there are: torch's means are added in an order that follows from that."""

    def __init__(self, config: object = None) -> None:
        super().__init__(config)
        self._fused = FusedOps()

    def rms_norm(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, *, offset: float = 0.0
    ) -> torch.Tensor:
        if not where.has_triton(x.device):
            return super().rms_norm(x, weight, eps, offset=offset)
        from kernels.triton import norm

        return norm.rms_norm(x, weight, eps, offset=offset, is_invariant=True)

    def add_rms_norm_(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        *,
        offset: float = 0.0,
    ) -> torch.Tensor:
        if not where.has_triton(x.device):
            return super().add_rms_norm_(x, residual, weight, eps, offset=offset)
        from kernels.triton import norm

        return norm.add_rms_norm_(x, residual, weight, eps, offset=offset, is_invariant=True)

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        if not where.has_triton(gate_up.device):
            return super().silu_and_mul(gate_up)
        return self._fused.silu_and_mul(gate_up)

    def gelu_tanh_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        if not where.has_triton(gate_up.device):
            return super().gelu_tanh_and_mul(gate_up)
        return self._fused.gelu_tanh_and_mul(gate_up)

    def unsupported_reasons(self, device: torch.device, dtype: torch.dtype) -> list[str]:
        return where.unsupported_reasons(device, dtype)


class InvariantSampler(Sampler):
    """torch's operations on a CPU, one fused kernel a row on a GPU, where torch's cumulative sum
    is cut by the number of rows."""

    def __init__(self, config: object = None) -> None:
        super().__init__(config)
        self._fused, self._torch = FusedSampler(), TorchSampler()

    def sample(self, logits: torch.Tensor, metadata: SamplingMetadata) -> SamplerOutput:
        sampler = self._fused if where.has_triton(logits.device) else self._torch
        return sampler.sample(logits, metadata)

    def unsupported_reasons(self, device: torch.device, dtype: torch.dtype) -> list[str]:
        return where.unsupported_reasons(device, dtype)
