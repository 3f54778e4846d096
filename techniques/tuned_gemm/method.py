"""Linear layers whose products take the algorithm that was timed to be the fastest."""

from __future__ import annotations

import torch

from kernels.cublaslt import TunedProducts, unavailable_reasons
from kernels.linear import PackedLinear
from workbench.slots.linear import DenseLinear, LinearLayer


class TunedLinear(DenseLinear):
    """Weights in the model's dtype; products of recurring shapes by ``kernels.cublaslt``."""

    def __init__(self, config: object = None) -> None:
        super().__init__(config)
        self._products: TunedProducts | None = None
        self.reset_counters()

    def process_weights_after_loading(self, layer: LinearLayer, expected_tokens: int) -> None:
        weight, bias = layer.params.pop("weight"), layer.params.pop("bias", None)
        out_features, in_features = weight.shape
        layer.state = PackedLinear(in_features, out_features, weight, bias, is_packed=False)

    def apply(self, layer: LinearLayer, x: torch.Tensor) -> torch.Tensor:
        out = self.tuned(layer, x)
        if out is None:
            self._dense += 1
            return super().apply(layer, x)
        self._tuned += 1
        return out

    def tuned(self, layer: LinearLayer, x: torch.Tensor) -> torch.Tensor | None:
        """The product by an algorithm other than the library's choice, if one is faster."""
        if layer.state.bias is not None:
            return None
        if self._products is None:
            self._products = TunedProducts(x.device)
        return self._products.linear(x, layer.state.weight)

    def unsupported_reasons(self, device: torch.device, dtype: torch.dtype) -> list[str]:
        return unavailable_reasons(device)

    def counters(self) -> dict[str, float]:
        products = self._products
        shapes = [] if products is None else list(products.tuned.values())
        return {
            "tuned_calls": self._tuned,
            "dense_calls": self._dense,
            "timed_shapes": len(shapes),
            "changed_shapes": sum(s.algorithm is not None for s in shapes),
        }

    def reset_counters(self) -> None:
        self._tuned = self._dense = 0
