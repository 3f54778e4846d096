"""fp8 weights and activations (Micikevicius et al. 2022, arXiv:2209.05433), rounded to nearest; a
static scale of activations is measured on calibration texts where the scheme wants one."""

from __future__ import annotations

from torch import Tensor

from kernels.scaled_linear import LIMITS, quantize_weight
from techniques.quantization.quantizers.base import InputStatistics, Needs, Quantizer
from techniques.quantization.weights import FP8Scheme, QuantizedWeight, Scheme
from workbench.core.errors import ConfigError


class FP8(Quantizer):
    """Round to the nearest e4m3 number."""

    def needs_for(self, scheme: Scheme) -> Needs:
        if not isinstance(scheme, FP8Scheme):
            raise ConfigError(
                f"FP8 finds codes of schemes fp8 and fp8_static, not of {scheme.name}: give one of "
                "them as scheme=, or take another quantizer."
            )
        return Needs(sizes=scheme.is_static)

    def quantize(
        self, weight: Tensor, scheme: FP8Scheme, inputs: InputStatistics | None, name: str = ""
    ) -> QuantizedWeight:
        if not scheme.is_static:
            codes, scales = quantize_weight(weight, "fp8")
            return QuantizedWeight(scheme, codes, scales.unsqueeze(1))
        if inputs is None or not inputs.num_tokens:
            raise ConfigError(f"{name}: fp8_static measures activations: give calibration texts.")
        codes, scales = quantize_weight(weight, "fp8_tensor")
        most = inputs.max_abs.amax().view(1)
        # Inputs that were never other than 0 have no size to go by.
        input_scale = most.where(most > 0, most.new_ones(())) / LIMITS[codes.dtype]
        per_output = scales.expand(len(weight), 1).contiguous()
        return QuantizedWeight(scheme, codes, per_output, input_scale=input_scale)
