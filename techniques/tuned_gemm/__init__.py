"""Products by whichever of the matrix library's algorithms was the fastest for their shape.

Losslessness: exact. Evidence: ``linear.tuned_calls``.
"""

from techniques.tuned_gemm.method import TunedLinear

__all__ = ["TunedLinear"]
