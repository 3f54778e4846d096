"""A request's outputs have the same bits whatever batch it runs in.

He et al., "Defeating Nondeterminism in LLM Inference", Thinking Machines Lab, 2025. Losslessness:
exact. Evidence: ``linear.invariant_calls``, ``attention.decode_calls`` and
``attention.prefill_calls``.
"""

from techniques.batch_invariant.attention import InvariantAttention
from techniques.batch_invariant.elementwise import InvariantOps, InvariantSampler
from techniques.batch_invariant.linear import InvariantLinear

__all__ = ["InvariantAttention", "InvariantLinear", "InvariantOps", "InvariantSampler"]
