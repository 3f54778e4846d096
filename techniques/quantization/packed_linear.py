"""Slot ``linear``: a checkpoint whose weights are quantised, as it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from kernels.quantized_linear import pack_quantized_linear
from techniques.quantization.compressed_tensors import (
    PACKED,
    SCALE,
    SHAPE,
    ZERO,
    codes_of,
    is_kept,
    read_config,
)
from techniques.quantization.products import QuantizedProducts
from techniques.quantization.weights import WeightScheme
from workbench.core.errors import UnsupportedError
from workbench.slots.linear import LinearLayer


class CompressedTensors(QuantizedProducts):
    """Weights of a compressed-tensors checkpoint; activations stay in 16 bits.

    Layers that the checkpoint leaves out are in the model's dtype.
    """

    error_bound = 0.15  # of the codes, against what was rounded
    unread_suffixes = (SHAPE,)

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self._scheme: WeightScheme | None = None
        self._ignored: tuple[str, ...] = ()
        self._dtype = torch.float32

    def read_checkpoint(self, quantization: Mapping[str, Any] | None) -> None:
        if quantization is None:
            raise UnsupportedError(
                "the model's checkpoint is not quantised (its config.json has no "
                "quantization_config); choose engine/linear=dense, or weight_only to round it as "
                "it is loaded."
            )
        self._scheme, self._ignored = read_config(quantization)

    def create_weights(self, layer: LinearLayer, dtype: torch.dtype, device: torch.device) -> None:
        rows, columns = layer.out_features, layer.in_features
        self._dtype = dtype
        scheme = self._scheme_of(layer)
        if layer.has_bias:
            layer.params["bias"] = torch.empty(rows, dtype=dtype, device=device)
        if scheme is None:
            layer.params["weight"] = torch.empty(rows, columns, dtype=dtype, device=device)
            return
        per_word, num_groups = 32 // scheme.bits, scheme.num_groups(columns)
        if scheme.has_zeros and any(width % per_word for _, width in layer.shards):
            raise UnsupportedError(
                f"layer {layer.name} has outputs that {per_word} does not divide, and zero points: "
                "its parts cannot be stacked."
            )

        def words(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=torch.int32, device=device)

        layer.params[PACKED] = words(rows, -(-columns // per_word))
        layer.params[SCALE] = torch.empty(rows, num_groups, dtype=torch.float32, device=device)
        if scheme.has_zeros:
            layer.params[ZERO] = words(rows // per_word, num_groups)

    def _scheme_of(self, layer: LinearLayer) -> WeightScheme | None:
        kept = [is_kept(name, self._ignored) for name, _ in layer.shards]
        if all(kept):
            return None
        if any(kept):
            raise UnsupportedError(
                f"the checkpoint quantises some parts of layer {layer.name} and leaves out others; "
                "they are multiplied as one here, so all or none must be quantised."
            )
        return self._scheme

    def process_weights_after_loading(self, layer: LinearLayer, expected_tokens: int) -> None:
        bias, weight = layer.params.pop("bias", None), layer.params.pop("weight", None)
        if weight is not None:  # left out, or a head that is the embedding
            self.keep_dense(layer, weight, bias, expected_tokens)
            return
        assert self._scheme is not None
        scales = layer.params.pop(SCALE)
        if not torch.isfinite(scales).all():
            raise UnsupportedError(f"layer {layer.name} has scales that are no finite numbers.")
        codes, zeros = codes_of(
            layer.params.pop(PACKED), layer.params.pop(ZERO, None), self._scheme, layer.in_features
        )
        bits, dtype = self._scheme.bits, self._dtype
        state = pack_quantized_linear(codes, scales, zeros, bias, bits=bits, dtype=dtype)
        self.keep_quantized(layer, state)
