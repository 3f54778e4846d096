"""The elementwise work of a step in few kernels, in Triton.

Losslessness: exact. Evidence: ``ops.rms_norm_calls``, ``ops.add_rms_norm_calls`` and
``ops.activation_calls``.
"""

from techniques.fused_kernels.ops import FusedOps

__all__ = ["FusedOps"]
