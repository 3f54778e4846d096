"""Attention by the Triton kernels of this repository.

Kwon et al., SOSP 2023, arXiv:2309.06180; Dao, arXiv:2307.08691. Losslessness: exact. Evidence:
``decode_calls`` and ``prefill_calls``.
"""

from techniques.triton_attention.backend import TritonAttention

__all__ = ["TritonAttention"]
