"""Norms and gated activations in one launch each, in Triton (``kernels.triton``)."""

from __future__ import annotations

from typing import Any

import torch

from kernels import RowNorm, triton
from workbench.slots.linear import LinearLayer, LinearMethod
from workbench.slots.ops import Ops

#: Of the oldest cards that the kernels are built for in tests.
_LEAST_CAPABILITY = (8, 0)


def unsupported_reasons(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Why the kernels cannot serve ``dtype`` on ``device``."""
    if not triton.HAS_TRITON:
        return ["Triton is not installed: pip install triton"]
    reasons = []
    if device.type != "cuda" and not triton.is_interpreted():
        reasons.append(
            f"Triton needs a CUDA device, not {device} (or TRITON_INTERPRET=1, for tests)"
        )
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < _LEAST_CAPABILITY:
        found = ".".join(map(str, torch.cuda.get_device_capability(device)))
        reasons.append(f"compute capability {found}: 8.0 or more is needed")
    if dtype not in triton.DTYPES:
        known = ", ".join(str(d).removeprefix("torch.") for d in triton.DTYPES)
        reasons.append(f"{str(dtype).removeprefix('torch.')} is none of {known}")
    return reasons


class FusedOps(Ops):
    """Every op is one kernel that reads and writes each value once."""

    def __init__(self, config: object = None) -> None:
        super().__init__(config)
        self.reset_counters()

    def rms_norm(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, *, offset: float = 0.0
    ) -> torch.Tensor:
        from kernels.triton import norm

        self._norms += 1
        return norm.rms_norm(x, weight, eps, offset=offset)

    def add_rms_norm_(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        *,
        offset: float = 0.0,
    ) -> torch.Tensor:
        from kernels.triton import norm

        self._added_norms += 1
        return norm.add_rms_norm_(x, residual, weight, eps, offset=offset)

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        from kernels.triton import activation

        self._activations += 1
        return activation.silu_and_mul(gate_up)

    def gelu_tanh_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        from kernels.triton import activation

        self._activations += 1
        return activation.gelu_tanh_and_mul(gate_up)

    def norm_input(
        self,
        method: LinearMethod | None,
        layer: LinearLayer,
        x: torch.Tensor,
        norm: RowNorm,
        residual: torch.Tensor | None = None,
    ) -> Any:
        if method is None or not method.prepares(layer):
            return super().norm_input(method, layer, x, norm, residual)
        if residual is None:
            self._norms += 1
        else:
            self._added_norms += 1
        self._joined += 1
        return method.prepare_normed(layer, x, norm, residual)

    def gate_input(
        self,
        method: LinearMethod | None,
        layer: LinearLayer,
        gate_up: torch.Tensor,
        activation: str,
    ) -> Any:
        if method is None or not method.prepares(layer):
            return super().gate_input(method, layer, gate_up, activation)
        self._activations += 1
        self._joined += 1
        return method.prepare_gated(layer, gate_up, activation)

    def unsupported_reasons(self, device: torch.device, dtype: torch.dtype) -> list[str]:
        return unsupported_reasons(device, dtype)

    def counters(self) -> dict[str, float]:
        return {
            "rms_norm_calls": self._norms,
            "add_rms_norm_calls": self._added_norms,
            "activation_calls": self._activations,
            "joined_calls": self._joined,
        }

    def reset_counters(self) -> None:
        self._norms = self._added_norms = self._activations = self._joined = 0
