"""Slot ``linear``: a checkpoint whose weights and activations have 8 bits, as it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from kernels.scaled_linear import BLOCK_SIZE, code_dtype_of, pack_scaled_linear
from techniques.quantization.compressed_tensors import is_kept
from techniques.quantization.scaled import ScaledMethod, unsupported_reasons
from techniques.quantization.scaled_formats import (
    INPUT_SCALE,
    SCALE,
    WEIGHT,
    ScaledScheme,
    check_scales,
    read_scaled_config,
)
from workbench.core.errors import UnsupportedError
from workbench.slots.linear import LinearLayer


class ScaledCheckpoint(ScaledMethod):
    """Weights of a compressed-tensors checkpoint (``float-quantized``, ``int-quantized``), or of
    one in DeepSeek-V3's blocks; layers that it leaves out are in the model's dtype."""

    error_bound = 0.05  # of the codes, against what was rounded

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self._scheme: ScaledScheme | None = None

    def read_checkpoint(self, quantization: Mapping[str, Any] | None) -> None:
        if quantization is None:
            raise UnsupportedError(
                "the model's checkpoint is not quantised (its config.json has no "
                "quantization_config); choose engine/linear=scaled to round it as it is loaded."
            )
        self._scheme = read_scaled_config(quantization)

    def create_weights(self, layer: LinearLayer, dtype: torch.dtype, device: torch.device) -> None:
        rows, columns = layer.out_features, layer.in_features
        scheme = self._scheme_of(layer)
        if layer.has_bias:
            layer.params["bias"] = torch.empty(rows, dtype=dtype, device=device)
        if scheme is None:
            layer.params[WEIGHT] = torch.empty(rows, columns, dtype=dtype, device=device)
            return
        if device.type != "meta" and (found := unsupported_reasons(scheme.format, device, dtype)):
            raise UnsupportedError(f"the checkpoint's format {scheme.format}: {'; '.join(found)}.")
        layer.params[WEIGHT] = torch.empty(
            rows, columns, dtype=code_dtype_of(scheme.format), device=device
        )

        def scales_of(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=torch.float32, device=device)

        if scheme.format == "fp8_block":
            if len(layer.shards) > 1 and any(width % BLOCK_SIZE for _, width in layer.shards):
                raise UnsupportedError(
                    f"layer {layer.name} is stacked of {[w for _, w in layer.shards]} outputs, of "
                    f"which {BLOCK_SIZE} does not divide all: their blocks cannot be stacked."
                )
            blocks = (-(-rows // BLOCK_SIZE), -(-columns // BLOCK_SIZE))
            layer.params[scheme.scale] = scales_of(*blocks)
            return
        parts = len(layer.shards)
        shape = (parts,) if scheme.per_tensor else (rows, 1)
        layer.params[SCALE] = scales_of(*shape)
        if scheme.is_static:
            layer.params[INPUT_SCALE] = scales_of(parts)

    def _scheme_of(self, layer: LinearLayer) -> ScaledScheme | None:
        if self._scheme is None:
            return None
        kept = [is_kept(name, self._scheme.kept) for name, _ in layer.shards]
        if all(kept):
            return None
        if any(kept):
            raise UnsupportedError(
                f"the checkpoint quantises some parts of layer {layer.name} and leaves out others; "
                "they are multiplied as one here, so all or none must be quantised."
            )
        return self._scheme

    def process_weights_after_loading(self, layer: LinearLayer, expected_tokens: int) -> None:
        weight, bias = layer.params.pop(WEIGHT), layer.params.pop("bias", None)
        inputs = layer.params.pop(INPUT_SCALE, None)
        scheme = self._scheme
        scales = None if scheme is None else layer.params.pop(scheme.scale, None)
        if scheme is None or scales is None:  # left out, or a head that is the embedding
            self.keep_dense(layer, weight, bias, expected_tokens)
            return
        check_scales(layer.name, scales)
        if weight.is_floating_point() and bool(weight.float().isnan().any()):
            raise UnsupportedError(f"layer {layer.name} has weights that are no numbers.")
        if scheme.per_tensor:
            widths = torch.tensor([width for _, width in layer.shards], device=scales.device)
            scales = scales.repeat_interleave(widths)
        elif scheme.format != "fp8_block":
            scales = scales.squeeze(1)
        input_scale = None
        if inputs is not None:
            check_scales(layer.name, inputs)
            # Parts that are stacked have one input: the scale that holds what each has seen of it.
            input_scale = inputs.amax().view(1)
        format = scheme.format
        self.keep(
            layer, pack_scaled_linear(weight, scales, bias, format=format, input_scale=input_scale)
        )

    def unsupported_reasons(self, device: torch.device, dtype: torch.dtype) -> list[str]:
        # The format, which may need more than int8 does, is known once the checkpoint is read.
        return unsupported_reasons("int8", device, dtype)
