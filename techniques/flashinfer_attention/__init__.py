"""Attention by FlashInfer's kernels for paged KV.

Ye et al., arXiv:2501.01005. Losslessness: exact. Evidence: ``decode_calls``, ``prefill_calls``,
``plans``.
"""

from techniques.flashinfer_attention.backend import (
    FlashInferAttention,
    FlashInferConfig,
)

__all__ = ["FlashInferAttention", "FlashInferConfig"]
