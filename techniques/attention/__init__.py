"""What the techniques of the ``attention`` slot share: counters, and reasons why one cannot run."""

from techniques.attention.base import CountingAttention, Phase, phase_of
from techniques.attention.reasons import (
    capability_reasons,
    cuda_reasons,
    dtype_reasons,
    head_dim_reasons,
    library_reasons,
    quantized_reasons,
)

__all__ = [
    "CountingAttention",
    "Phase",
    "capability_reasons",
    "cuda_reasons",
    "dtype_reasons",
    "head_dim_reasons",
    "library_reasons",
    "phase_of",
    "quantized_reasons",
]
