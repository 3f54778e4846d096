"""Products of layers whose weights are in 4 or 8 bits, on whatever device they lie."""

from __future__ import annotations

from typing import Any

import torch

import kernels
from kernels import RowNorm
from kernels.linear import PackedLinear
from kernels.quantized_linear import (
    QuantizedLinear,
    apply_quantized_linear,
    apply_quantized_row,
    kernel_of,
)
from kernels.triton import is_interpreted
from techniques.fused_kernels.ops import unsupported_reasons
from workbench.slots.linear import LinearLayer, LinearMethod

#: Counters of products: by Triton's kernels, by the CPU's, and by none.
_COUNTERS = {
    "gemv": "gemv_calls",
    "split": "split_calls",
    "gemm": "gemm_calls",
    "written_out": "written_out_calls",
    "native": "native_calls",
    "reference": "reference_calls",
}
#: Of more rows, gate and up are multiplied by a launch of its own: sums of both in one program
#: would leave too few registers.
_MOST_GATED_ROWS = 64


class QuantizedProducts(LinearMethod):
    """Layers that are :class:`QuantizedLinear`, or dense where a scheme leaves them out.

    On Triton's kernels, few rows of gate and up are multiplied where they come out. A step of one
    token has its norms and additions in its products as well where weights are of 8 bits.
    """

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        #: Layers that stayed in the model's dtype.
        self.dense_layers: list[str] = []
        self._num_quantized = self._packed_bytes = 0
        # Whether every quantised layer, and every one of gate and up, is laid out for Triton.
        self._is_triton = True
        # Weights of 4 bits are multiplied faster by tensor cores than by what takes a norm in.
        self._has_4_bits = False
        self._can_gate = True
        self.reset_counters()

    def keep_dense(
        self,
        layer: LinearLayer,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        expected_tokens: int,
    ) -> None:
        """Make a layer one in the model's dtype."""
        self.dense_layers.append(layer.name)
        layer.state = kernels.pack_linear(weight, bias, expected_tokens)
        self._can_gate &= not layer.name.endswith("gate_up_proj")

    def keep_quantized(self, layer: LinearLayer, state: QuantizedLinear) -> None:
        """Make a layer one of codes."""
        layer.state = state
        self._num_quantized += 1
        self._packed_bytes += state.num_bytes
        self._is_triton &= state.implementation == "triton"
        self._has_4_bits |= state.bits == 4

    # -- products -----------------------------------------------------------------------------

    def apply(self, layer: LinearLayer, x: torch.Tensor) -> torch.Tensor:
        if isinstance(layer.state, PackedLinear):
            return kernels.apply_linear(layer.state, x)
        self._calls[kernel_of(layer.state, len(x), x.dtype)] += 1
        return apply_quantized_linear(layer.state, x)

    def gates(self, num_tokens: int) -> bool:
        is_served = self._num_quantized > 0 and self._is_triton and self._can_gate
        return is_served and num_tokens <= _MOST_GATED_ROWS

    def apply_gated(self, layer: LinearLayer, x: torch.Tensor, activation: str) -> torch.Tensor:
        self._fused += 1
        self._calls[kernel_of(layer.state, len(x), x.dtype)] += 1
        return apply_quantized_linear(layer.state, x, activation)

    def fuses(self, num_tokens: int) -> bool:
        is_served = self._num_quantized > 0 and self._is_triton and not self._has_4_bits
        return num_tokens == 1 and is_served

    def apply_normed(
        self, layer: LinearLayer, x: torch.Tensor, norm: RowNorm, activation: str | None = None
    ) -> torch.Tensor:
        return self._row(layer, x, norm=norm, activation=activation)

    def apply_add_(self, layer: LinearLayer, x: torch.Tensor, residual: torch.Tensor) -> None:
        self._row(layer, x, residual=residual)

    def _row(self, layer: LinearLayer, x: torch.Tensor, **options: Any) -> torch.Tensor:
        self._fused += 1
        if isinstance(layer.state, PackedLinear):
            from kernels.triton.gemv import gemv

            return gemv(x, layer.state.dense_weight(), layer.state.bias, **options)
        self._calls["gemv"] += 1
        return apply_quantized_row(layer.state, x, **options)

    def unsupported_reasons(self, device: torch.device, dtype: torch.dtype) -> list[str]:
        if device.type == "cpu" and not is_interpreted():
            return []
        return unsupported_reasons(device, dtype)

    def counters(self) -> dict[str, float]:
        return {
            "quantized_layers": self._num_quantized,
            "dense_layers": len(self.dense_layers),
            "packed_bytes": self._packed_bytes,
            "quantized_calls": sum(self._calls.values()),
            "fused_calls": self._fused,
            **{_COUNTERS[name]: count for name, count in self._calls.items()},
        }

    def reset_counters(self) -> None:
        self._calls = dict.fromkeys(_COUNTERS, 0)
        self._fused = 0
