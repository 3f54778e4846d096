"""Slot ``linear``: a checkpoint whose weights are quantised, as it is."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from typing import Any

import torch

from kernels.quantized_linear import (
    QuantizedLinear,
    apply_quantized_linear,
    kernel_of,
    pack_quantized_linear,
)
from techniques.quantization.compressed_tensors import SHAPE
from techniques.quantization.packed_formats import (
    PackedFormat,
    checked_groups,
    checked_index,
    consecutive_index,
    read_packed_config,
)
from techniques.quantization.products import QuantizedProducts
from techniques.quantization.weights import WeightScheme
from workbench.core.errors import UnsupportedError
from workbench.slots.linear import LinearLayer

#: One run of outputs that share an order of inputs: the first, the one behind the last, the order.
_Run = tuple[int, int, torch.Tensor | None]


class PackedCheckpoint(QuantizedProducts):
    """Weights of a checkpoint in 4 or 8 bits; activations stay in 16 bits.

    Layers that the checkpoint leaves out are in the model's dtype. Stacked layers whose inputs are
    in different orders (act-order) are multiplied one after another.
    """

    error_bound = 0.15  # of the codes, against what was rounded
    unread_suffixes = (SHAPE,)

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self._format: PackedFormat | None = None
        self._dtype = torch.float32
        self._num_ordered = self._num_split = 0

    def read_checkpoint(self, quantization: Mapping[str, Any] | None) -> None:
        if quantization is None:
            raise UnsupportedError(
                "the model's checkpoint is not quantised (its config.json has no "
                "quantization_config); choose engine/linear=dense, or weight_only to round it as "
                "it is loaded."
            )
        self._format = read_packed_config(quantization)

    def create_weights(self, layer: LinearLayer, dtype: torch.dtype, device: torch.device) -> None:
        rows, columns = layer.out_features, layer.in_features
        self._dtype = dtype
        scheme = self._scheme_of(layer)
        if layer.has_bias:
            layer.params["bias"] = torch.empty(rows, dtype=dtype, device=device)
        if scheme is None or self._format is None:
            layer.params["weight"] = torch.empty(rows, columns, dtype=dtype, device=device)
            return
        layout = self._format.layout
        checked_groups(layer.name, scheme, columns)
        reason = layout.uneven(scheme, [width for _, width in layer.shards], columns)
        if reason is not None:
            raise UnsupportedError(
                f"layer {layer.name} has {reason}: its words of 32 bits cannot be taken apart."
            )
        for suffix, (shape, kind) in layout.shapes(scheme, rows, columns).items():
            layer.params[suffix] = torch.empty(shape, dtype=kind, device=device)
        if layout.index is not None:
            index = consecutive_index(scheme, columns).to(device)
            layer.params[layout.index] = index.repeat(len(layer.shards), 1)
            if not layout.needs_index:
                layer.optional.add(layout.index)
        if layout.adds_bias and not layer.has_bias:
            layer.params["bias"] = torch.zeros(rows, dtype=dtype, device=device)
            layer.optional.add("bias")

    def _scheme_of(self, layer: LinearLayer) -> WeightScheme | None:
        if self._format is None:
            return None
        schemes = {self._format.scheme_of(name) for name, _ in layer.shards}
        if len(schemes) == 1:
            return schemes.pop()
        if None in schemes:
            raise UnsupportedError(
                f"the checkpoint quantises some parts of layer {layer.name} and leaves out others; "
                "they are multiplied as one here, so all or none must be quantised."
            )
        named = ", ".join(
            f"{name} {scheme.bits} bits in groups of {scheme.group_size or 'all inputs'}"
            for name, _ in layer.shards
            if (scheme := self._format.scheme_of(name)) is not None
        )
        raise UnsupportedError(
            f"the checkpoint has parts of layer {layer.name} in different schemes ({named}); they "
            "are multiplied as one here, so all must have the same."
        )

    def process_weights_after_loading(self, layer: LinearLayer, expected_tokens: int) -> None:
        params, bias = layer.params, layer.params.pop("bias", None)
        if "weight" in params:  # left out, or a head that is the embedding
            self.keep_dense(layer, params.pop("weight"), bias, expected_tokens)
            return
        format, scheme = self._format, self._scheme_of(layer)
        assert format is not None and scheme is not None
        if bias is not None and not layer.has_bias and not bool(bias.any()):
            bias = None
        index = None if format.layout.index is None else params.pop(format.layout.index)
        try:
            codes, scales, zeros = format.layout.decode(
                params, scheme, layer.out_features, layer.in_features
            )
        except UnsupportedError as error:
            raise UnsupportedError(f"layer {layer.name} has {error}") from error
        params.clear()
        if not torch.isfinite(scales).all():
            raise UnsupportedError(f"layer {layer.name} has scales that are no finite numbers.")
        half = 1 << (scheme.bits - 1)
        if zeros is not None and bool((zeros == half).all()):  # symmetric, which more kernels take
            codes, zeros = codes - half, None
        parts = [
            pack_quantized_linear(
                codes[first:end], scales[first:end],
                None if zeros is None else zeros[first:end],
                None if bias is None else bias[first:end],
                bits=scheme.bits, dtype=self._dtype, group_index=order,
            )
            for first, end, order in _runs(layer, index, scheme)
        ]  # fmt: skip
        self._num_ordered += any(part.input_order is not None for part in parts)
        for part in parts:
            self.keep_quantized(layer, part)
        if len(parts) > 1:
            self._num_quantized -= len(parts) - 1
            self._num_split += 1
            self._is_triton = False  # what fuses a product with its neighbours takes one weight
            layer.state = tuple(parts)

    def apply(self, layer: LinearLayer, x: torch.Tensor) -> torch.Tensor:
        if not isinstance(layer.state, tuple):
            return super().apply(layer, x)
        parts: tuple[QuantizedLinear, ...] = layer.state
        for part in parts:
            self._calls[kernel_of(part, len(x), x.dtype)] += 1
        return torch.cat([apply_quantized_linear(part, x) for part in parts], 1)

    def counters(self) -> dict[str, float]:
        return {
            **super().counters(),
            **{f"dense_layers.{name}": 1 for name in self.dense_layers},
            "ordered_layers": self._num_ordered,
            "split_layers": self._num_split,
        }


def _runs(layer: LinearLayer, index: torch.Tensor | None, scheme: WeightScheme) -> list[_Run]:
    """Outputs of a stacked layer by the order of their inputs; ``index`` is ``[shards, K]``."""
    if index is None:
        return [(0, layer.out_features, None)]
    runs: list[_Run] = []
    start = 0
    for (name, width), row in zip(layer.shards, index, strict=True):
        order = checked_index(name, row, scheme)
        runs.append((start, start + width, order))
        start += width
    joined: list[_Run] = []
    for _, same in groupby(runs, lambda run: None if run[2] is None else tuple(run[2].tolist())):
        members = list(same)
        joined.append((members[0][0], members[-1][1], members[0][2]))
    return joined
