"""Products of few rows with a weight by a Triton kernel that reads it at full bandwidth.

Losslessness: exact. Evidence: ``linear.skinny_calls``.
"""

from techniques.skinny_gemm.method import SkinnyLinear, SkinnyLinearConfig

__all__ = ["SkinnyLinear", "SkinnyLinearConfig"]
