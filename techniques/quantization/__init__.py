"""Quantised weights: schemes, the quantisers that find their numbers, and what runs them."""

from techniques.quantization.linear import WeightOnly, WeightOnlyConfig
from techniques.quantization.packed_linear import CompressedTensors
from techniques.quantization.weights import (
    QuantizedWeight,
    WeightScheme,
    encode,
    find_grid,
)

__all__ = [
    "CompressedTensors",
    "QuantizedWeight",
    "WeightOnly",
    "WeightOnlyConfig",
    "WeightScheme",
    "encode",
    "find_grid",
]
