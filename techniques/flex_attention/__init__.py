"""Attention by torch's FlexAttention over the pool itself, pages found by a block mask.

Dong et al., arXiv:2412.05496. Losslessness: exact. Evidence: ``decode_calls``, ``prefill_calls``.
"""

from techniques.flex_attention.backend import FlexAttention, FlexAttentionConfig

__all__ = ["FlexAttention", "FlexAttentionConfig"]
