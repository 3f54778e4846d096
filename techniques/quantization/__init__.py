"""Quantised weights: schemes, the quantisers that find their numbers, and what runs them."""

from techniques.quantization.linear import WeightOnly, WeightOnlyConfig
from techniques.quantization.packed_linear import PackedCheckpoint
from techniques.quantization.scaled import ScaledConfig, ScaledWeights
from techniques.quantization.scaled_checkpoint import ScaledCheckpoint
from techniques.quantization.weights import (
    QuantizedWeight,
    WeightScheme,
    encode,
    find_grid,
)

__all__ = [
    "PackedCheckpoint",
    "QuantizedWeight",
    "ScaledCheckpoint",
    "ScaledConfig",
    "ScaledWeights",
    "WeightOnly",
    "WeightOnlyConfig",
    "WeightScheme",
    "encode",
    "find_grid",
]
