"""Slot ``ops``: norms and gated activations, between a model's linear layers and attention."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch

import kernels
from workbench.slots.component import Component
from workbench.slots.linear import LinearLayer, LinearMethod


class Ops(Component):
    """Elementwise work of a layer, row by row. Results depend on no other row of the batch.

    Called inside the forward pass: nothing may wait for the device, and what is launched may depend
    on shapes alone, so that a pass can be captured.
    """

    @abstractmethod
    def rms_norm(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, *, offset: float = 0.0
    ) -> torch.Tensor:
        """Norm of the rows of ``x[T, H]`` or ``[T, heads, H]``, as ``kernels.rms_norm``; new and
        contiguous."""

    @abstractmethod
    def add_rms_norm_(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        *,
        offset: float = 0.0,
    ) -> torch.Tensor:
        """Add ``x[T, H]`` to ``residual[T, H]`` in place; the norm of the sum, ``[T, H]``."""

    @abstractmethod
    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """``silu(gate) * up`` of ``gate_up[T, 2F] = [gate | up]``; ``[T, F]``."""

    @abstractmethod
    def gelu_tanh_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """``gelu_tanh(gate) * up`` of ``gate_up[T, 2F] = [gate | up]``; ``[T, F]``."""

    def norm_input(
        self,
        method: LinearMethod | None,
        layer: LinearLayer,
        x: torch.Tensor,
        norm: kernels.RowNorm,
        residual: torch.Tensor | None = None,
    ) -> Any:
        """What ``method`` applies ``layer`` to: the norm of ``x[T, H]``, or of its sum with
        ``residual``, which is kept there. Ops that are one launch each leave it to a method that
        prepares its inputs (:meth:`LinearMethod.prepares`); None: nothing may stand between."""
        if residual is None:
            return self.rms_norm(x, norm.weight, norm.eps, offset=norm.offset)
        return self.add_rms_norm_(x, residual, norm.weight, norm.eps, offset=norm.offset)

    def gate_input(
        self,
        method: LinearMethod | None,
        layer: LinearLayer,
        gate_up: torch.Tensor,
        activation: str,
    ) -> Any:
        """What ``method`` applies ``layer`` to: the gated activation (``silu``, ``gelu_tanh``) of
        ``gate_up[T, 2F]``; as :meth:`norm_input`."""
        gated: torch.Tensor = getattr(self, f"{activation}_and_mul")(gate_up)
        return gated

    @abstractmethod
    def unsupported_reasons(self, device: torch.device, dtype: torch.dtype) -> list[str]:
        """Why it cannot serve a model of ``dtype`` on ``device``; empty when it can."""


class DispatchedOps(Ops):
    """What ``kernels`` has for the device, compiled ones on a CPU and torch's elsewhere.

    The null object.
    """

    def rms_norm(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, *, offset: float = 0.0
    ) -> torch.Tensor:
        return kernels.rms_norm(x, weight, eps, offset=offset)

    def add_rms_norm_(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        *,
        offset: float = 0.0,
    ) -> torch.Tensor:
        return kernels.add_rms_norm_(x, residual, weight, eps, offset=offset)

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        return kernels.silu_and_mul(gate_up)

    def gelu_tanh_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        return kernels.gelu_tanh_and_mul(gate_up)

    def unsupported_reasons(self, device: torch.device, dtype: torch.dtype) -> list[str]:
        return []
