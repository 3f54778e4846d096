"""Linear layers whose rows do not depend on how many others there are, nor on their place."""

from __future__ import annotations

import torch

import kernels
from kernels.linear import PackedLinear
from techniques.batch_invariant import device as where
from workbench.core.errors import UnsupportedError
from workbench.slots.linear import DenseLinear, LinearLayer

#: Rows of every product on a CPU: fewer are filled up, more are cut.
ROWS = 16


class InvariantLinear(DenseLinear):
    """Weights in the model's dtype; every product of a layer is cut in the same way.

    On a GPU by ``kernels.triton.invariant_gemm``. On a CPU, products of ``ROWS`` rows by the matrix
    library, which then has nothing to choose by. That a row does not depend on its place among
    them is tried for each shape of a weight when it is loaded.
    """

    def __init__(self, config: object = None) -> None:
        super().__init__(config)
        self._tried: set[tuple[object, ...]] = set()
        self.reset_counters()

    def process_weights_after_loading(self, layer: LinearLayer, expected_tokens: int) -> None:
        if where.has_triton(layer.params["weight"].device):
            weight, bias = layer.params.pop("weight"), layer.params.pop("bias", None)
            out_features, in_features = weight.shape
            layer.state = PackedLinear(in_features, out_features, weight, bias, is_packed=False)
            return
        dtype = layer.params["weight"].dtype
        super().process_weights_after_loading(layer, ROWS)
        shape = (layer.out_features, layer.in_features, layer.has_bias, dtype)
        if shape not in self._tried:
            require_equal_rows(layer, dtype)
            self._tried.add(shape)

    def apply(self, layer: LinearLayer, x: torch.Tensor) -> torch.Tensor:
        self._calls += 1
        if where.has_triton(x.device):
            from kernels.triton.invariant_gemm import invariant_linear

            return invariant_linear(x, layer.state.weight, layer.state.bias)
        return linear_by_chunks(layer.state, x)

    def unsupported_reasons(self, device: torch.device, dtype: torch.dtype) -> list[str]:
        return where.unsupported_reasons(device, dtype)

    def counters(self) -> dict[str, float]:
        return {"invariant_calls": self._calls}

    def reset_counters(self) -> None:
        self._calls = 0


def linear_by_chunks(packed: PackedLinear, x: torch.Tensor) -> torch.Tensor:
    """``x[T, K] @ weight.T + bias``, ``ROWS`` rows at a time, the last ones filled up with 0."""
    num_tokens = x.shape[0]
    missing = -num_tokens % ROWS
    if missing:
        x = torch.cat([x, x.new_zeros(missing, x.shape[1])])
    x = x.contiguous()
    if x.shape[0] == ROWS:
        return kernels.apply_linear(packed, x)[:num_tokens]
    out = x.new_empty(x.shape[0], packed.out_features)
    for start in range(0, x.shape[0], ROWS):
        out[start : start + ROWS] = kernels.apply_linear(packed, x[start : start + ROWS])
    return out[:num_tokens]


def require_equal_rows(layer: LinearLayer, dtype: torch.dtype) -> None:
    """Try rows at every place of a product.

    Raises
    ------
    UnsupportedError
        The matrix library computes a row in another way at another place.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, layer.in_features, generator=generator).to(dtype)
    expected = kernels.apply_linear(layer.state, x)
    for shift in range(1, ROWS):
        found = kernels.apply_linear(layer.state, x.roll(shift, 0))
        if not torch.equal(found, expected.roll(shift, 0)):
            raise UnsupportedError(
                f"linear InvariantLinear cannot be used: in products of {ROWS} rows with a "
                f"{dtype} weight {layer.out_features} x {layer.in_features} ({layer.name}), this "
                "machine's matrix library gives a row other bits at another place. Run without "
                "it (engine/linear=dense), in another dtype, or on a GPU."
            )
