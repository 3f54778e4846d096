"""Slot ``linear``: weights in 4 or 8 bits, rounded as they are loaded."""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch

from kernels.quantized_linear import kernel_limit, pack_quantized_linear
from techniques.quantization.products import QuantizedProducts
from techniques.quantization.weights import WeightScheme, encode, find_grid
from workbench.core.errors import ConfigError
from workbench.slots.linear import LinearLayer

DENSE = "dense"
_ROWS_AT_ONCE = 8192  # of a weight, while it is rounded


@dataclass(frozen=True, slots=True)
class WeightOnlyConfig:
    """Options of :class:`WeightOnly`.

    Attributes
    ----------
    scheme
        Of all layers that ``layers`` says nothing of (:meth:`WeightScheme.parse`).
    layers
        Exceptions, each a pattern of layers' names and their scheme, such as ``lm_head:w8``; the
        first that fits holds, and ``dense`` keeps a layer in the model's dtype.
    """

    scheme: str = "w8"
    layers: list[str] = field(default_factory=list)


class WeightOnly(QuantizedProducts):
    """Weights are rounded to the nearest code when the checkpoint is read (RTN); activations stay
    in 16 bits."""

    Config = WeightOnlyConfig
    config: WeightOnlyConfig

    def __init__(self, config: WeightOnlyConfig | None = None) -> None:
        super().__init__(config)
        self._default = WeightScheme.parse(self.config.scheme)
        self._by_pattern: dict[str, WeightScheme | None] = {}
        for entry in self.config.layers:
            pattern, colon, name = entry.rpartition(":")
            if not colon or not pattern:
                raise ConfigError(
                    f"engine.linear.layers has {entry!r}; an entry is a pattern of names, a colon "
                    "and a scheme, as in 'lm_head:dense' or '*.down_proj:w8'."
                )
            self._by_pattern[pattern] = None if name == DENSE else WeightScheme.parse(name)
        #: Patterns that fitted some layer.
        self._fitted: set[str] = set()

    @property
    def error_bound(self) -> float:  # type: ignore[override]
        """Of products with normally distributed weights."""
        return 0.015 if self._default.bits == 8 else 0.15

    def create_weights(self, layer: LinearLayer, dtype: torch.dtype, device: torch.device) -> None:
        shape = (layer.out_features, layer.in_features)
        layer.params["weight"] = torch.empty(shape, dtype=dtype, device=device)
        if layer.has_bias:
            layer.params["bias"] = torch.empty(layer.out_features, dtype=dtype, device=device)

    def process_weights_after_loading(self, layer: LinearLayer, expected_tokens: int) -> None:
        weight, bias = layer.params.pop("weight"), layer.params.pop("bias", None)
        scheme = self._scheme_of(layer.name)
        if scheme is None:
            self.keep_dense(layer, weight, bias, expected_tokens)
            return
        if not torch.isfinite(weight).all():
            raise ConfigError(
                f"layer {layer.name} has weights that are no finite numbers: they have no codes."
            )
        self._check(layer, scheme, weight.device)
        codes, scales, zeros = round_weight(weight, scheme)
        dtype = weight.dtype
        del weight  # of the device's memory, there is at most one layer's besides what is packed
        self.keep_quantized(
            layer,
            pack_quantized_linear(codes, scales, zeros, bias, bits=scheme.bits, dtype=dtype),
        )

    def _check(self, layer: LinearLayer, scheme: WeightScheme, device: torch.device) -> None:
        """Raise where the scheme does not fit the layer, or no kernel here serves it."""
        try:
            scheme.num_groups(layer.in_features)
            limit = kernel_limit(
                scheme.bits, scheme.group_size, scheme.has_zeros, layer.out_features, device
            )
        except ConfigError as error:
            limit = str(error).rstrip(".")
        if limit is not None:
            raise ConfigError(
                f"layer {layer.name} cannot be served in scheme {scheme.name} here: {limit}. "
                "Choose another with engine.linear.scheme, or for this layer alone with "
                f"engine.linear.layers=['{layer.name}:{DENSE}']."
            )

    def _scheme_of(self, name: str) -> WeightScheme | None:
        for pattern, scheme in self._by_pattern.items():
            if fnmatchcase(name, pattern):
                self._fitted.add(pattern)
                return scheme
        return self._default

    def finish_loading(self) -> None:
        idle = sorted(self._by_pattern.keys() - self._fitted)
        if idle:
            raise ConfigError(
                f"engine.linear.layers has {idle[0]!r}, which fits no layer of the model. Names "
                "are lm_head, and layers.N. with qkv_proj, o_proj, gate_up_proj or down_proj "
                "behind it; '*.down_proj' fits that of every layer."
            )


def round_weight(
    weight: torch.Tensor, scheme: WeightScheme
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Codes, scales and zero points of ``[N, K]``, as :class:`QuantizedWeight` has them, some rows
    at a time: in fp32 a large head would take many times its own memory."""
    parts = []
    for some in torch.split(weight, _ROWS_AT_ONCE):
        scales, zeros = find_grid(some, scheme)
        parts.append((encode(some, scheme, scales, zeros).codes, scales, zeros))
    codes, grid, zero_points = zip(*parts, strict=True)
    points = [zeros for zeros in zero_points if zeros is not None]
    return torch.cat(codes), torch.cat(grid), torch.cat(points) if points else None
