"""Slot ``linear``: weights and activations in 8 bits, weights rounded as they are loaded."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch

import kernels
from kernels import RowNorm
from kernels import triton as triton_kernels
from kernels.scaled_linear import (
    FORMATS,
    QuantizedRows,
    ScaledLinear,
    apply_scaled_linear,
    choose_implementation,
    pack_scaled_linear,
    quantize_input,
    quantize_weight,
    unsupported_reason,
)
from workbench.core.errors import ConfigError, unknown_name
from workbench.slots.linear import LinearLayer, LinearMethod

#: Relative error of a product of normally distributed numbers, of both roundings.
_ERROR_BOUNDS = {"fp8": 0.05, "fp8_tensor": 0.05, "fp8_block": 0.05, "int8": 0.025}


class ScaledMethod(LinearMethod):
    """Products of 8-bit weights with activations that are put into 8 bits as they come.

    What stands in ``state`` is a :class:`~kernels.scaled_linear.ScaledLinear`, or of layers in the
    model's dtype what :func:`kernels.pack_linear` made.
    """

    def __init__(self, config: object = None) -> None:
        super().__init__(config)
        #: Layers that stayed in the model's dtype.
        self.dense_layers: list[str] = []
        self._num_quantized = self._packed_bytes = 0
        self.reset_counters()

    def keep(self, layer: LinearLayer, state: ScaledLinear) -> None:
        """Take a quantised layer."""
        layer.state = state
        self._num_quantized += 1
        self._packed_bytes += state.num_bytes

    def keep_dense(
        self,
        layer: LinearLayer,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        expected_tokens: int,
    ) -> None:
        """Take a layer that stays in the model's dtype."""
        self.dense_layers.append(layer.name)
        layer.state = kernels.pack_linear(weight, bias, expected_tokens)

    def apply(self, layer: LinearLayer, x: torch.Tensor | QuantizedRows) -> torch.Tensor:
        if not isinstance(layer.state, ScaledLinear):
            assert isinstance(x, torch.Tensor)
            return kernels.apply_linear(layer.state, x)
        rows = x if isinstance(x, QuantizedRows) else quantize_input(layer.state, x)
        implementation = choose_implementation(layer.state, len(rows), rows.dtype)
        self._products[implementation] += 1
        return apply_scaled_linear(layer.state, rows, implementation)

    def prepares(self, layer: LinearLayer) -> bool:
        state = layer.state
        return (
            isinstance(state, ScaledLinear)
            and triton_kernels.unsupported_reason(state.codes) is None
        )

    def prepare_normed(
        self,
        layer: LinearLayer,
        x: torch.Tensor,
        norm: RowNorm,
        residual: torch.Tensor | None = None,
    ) -> QuantizedRows:
        self._joined += 1
        return quantize_input(layer.state, x, norm=norm, residual=residual)

    def prepare_gated(
        self, layer: LinearLayer, gate_up: torch.Tensor, activation: str
    ) -> QuantizedRows:
        self._joined += 1
        return quantize_input(layer.state, gate_up, activation=activation)

    def counters(self) -> dict[str, float]:
        products: dict[str, float] = {
            "skinny_calls": self._products["skinny"],
            "triton_calls": self._products["triton"],
            "cublas_calls": self._products["cublas"],
            "int_mm_calls": self._products["int_mm"],
            "reference_calls": self._products["reference"],
        }
        return {
            "quantized_layers": self._num_quantized,
            "dense_layers": len(self.dense_layers),
            **{f"dense_layers.{name}": 1 for name in self.dense_layers},
            "packed_bytes": self._packed_bytes,
            "quantized_calls": sum(products.values()),
            **products,
            "joined_inputs": self._joined,
        }

    def reset_counters(self) -> None:
        self._products: Counter[str] = Counter()
        self._joined = 0


@dataclass(frozen=True, slots=True)
class ScaledConfig:
    """Options of :class:`ScaledWeights`.

    Attributes
    ----------
    format
        One of :data:`kernels.scaled_linear.FORMATS`.
    skip
        Patterns of layers' names that stay in the model's dtype.
    """

    format: str = "fp8"
    skip: list[str] = field(default_factory=lambda: ["lm_head"])


class ScaledWeights(ScaledMethod):
    """Weights are rounded to the nearest code when the checkpoint is read, activations at every
    product, by the scale of each row (W8A8)."""

    Config = ScaledConfig
    config: ScaledConfig

    def __init__(self, config: ScaledConfig | None = None) -> None:
        super().__init__(config)
        if self.config.format not in FORMATS:
            raise unknown_name("engine.linear.format", self.config.format, FORMATS)
        self._fitted: set[str] = set()

    @property
    def error_bound(self) -> float:  # type: ignore[override]
        """Of products of normally distributed numbers."""
        return _ERROR_BOUNDS[self.config.format]

    def create_weights(self, layer: LinearLayer, dtype: torch.dtype, device: torch.device) -> None:
        shape = (layer.out_features, layer.in_features)
        layer.params["weight"] = torch.empty(shape, dtype=dtype, device=device)
        if layer.has_bias:
            layer.params["bias"] = torch.empty(layer.out_features, dtype=dtype, device=device)

    def process_weights_after_loading(self, layer: LinearLayer, expected_tokens: int) -> None:
        weight, bias = layer.params.pop("weight"), layer.params.pop("bias", None)
        patterns = [p for p in self.config.skip if fnmatchcase(layer.name, p)]
        if patterns:
            self._fitted.update(patterns)
            self.keep_dense(layer, weight, bias, expected_tokens)
            return
        if not torch.isfinite(weight).all():
            raise ConfigError(
                f"layer {layer.name} has weights that are no finite numbers: they have no codes. "
                f"Leave it in the model's dtype with engine.linear.skip=['{layer.name}'], or take "
                "another checkpoint."
            )
        format = self.config.format
        if format == "fp8_tensor":
            codes, scales = _by_shard(layer, weight)
        else:
            codes, scales = quantize_weight(weight, format)
        self.keep(layer, pack_scaled_linear(codes, scales, bias, format=format))

    def finish_loading(self) -> None:
        idle = [p for p in self.config.skip if p not in self._fitted]
        if idle:
            raise ConfigError(
                f"engine.linear.skip has {idle[0]!r}, which fits no layer of the model. Names are "
                "lm_head, and layers.N. with qkv_proj, o_proj, gate_up_proj or down_proj behind "
                "it; '*.down_proj' fits that of every layer."
            )

    def unsupported_reasons(self, device: torch.device, dtype: torch.dtype) -> list[str]:
        return unsupported_reasons(self.config.format, device, dtype)


def unsupported_reasons(format: str, device: torch.device, dtype: torch.dtype) -> list[str]:
    """Why products of a format cannot serve a model of ``dtype`` on ``device``."""
    found = unsupported_reason(format, device)
    reasons = [] if found is None else [found]
    if dtype not in triton_kernels.DTYPES:
        known = ", ".join(str(d).removeprefix("torch.") for d in triton_kernels.DTYPES)
        reasons.append(f"{str(dtype).removeprefix('torch.')} is none of {known}")
    return reasons


def _by_shard(layer: LinearLayer, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of ``fp8_tensor``: each of the checkpoint's layers that are stacked has a
    scale of its own, which its outputs share."""
    widths = [width for _, width in layer.shards]
    parts = [quantize_weight(part, "fp8_tensor") for part in torch.split(weight, widths)]
    scales = [s.expand(width) for (_, s), width in zip(parts, widths, strict=True)]
    # Joined as bytes: not every device joins fp8.
    codes = torch.cat([codes.view(torch.uint8) for codes, _ in parts])
    return codes.view(torch.float8_e4m3fn), torch.cat(scales)
