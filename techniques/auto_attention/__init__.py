"""The attention backend that was measured to be fastest, for each kind of step.

After FlashInfer's and vLLM's choice of kernels by device (Ye et al., arXiv:2501.01005).
Losslessness: exact. Evidence: ``decode_calls``, ``prefill_calls``.
"""

from techniques.auto_attention.backend import AutoAttention

__all__ = ["AutoAttention"]
