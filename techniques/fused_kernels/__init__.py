"""The elementwise work of a step and its sampling in few kernels, in Triton.

Losslessness: exact. Evidence: ``ops.rms_norm_calls``, ``ops.add_rms_norm_calls``,
``ops.activation_calls`` and ``sampler.fused_calls``.
"""

from techniques.fused_kernels.ops import FusedOps
from techniques.fused_kernels.sampler import FusedSampler

__all__ = ["FusedOps", "FusedSampler"]
