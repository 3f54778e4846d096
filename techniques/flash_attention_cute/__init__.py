"""Attention by the ``flash_attn.cute`` package (FlashAttention 4's kernels, on Hopper as well).

Shah et al., arXiv:2407.08608. Losslessness: exact. Evidence: ``decode_calls``, ``prefill_calls``.
"""

from techniques.flash_attention_cute.backend import FlashAttention, FlashAttentionConfig

__all__ = ["FlashAttention", "FlashAttentionConfig"]
