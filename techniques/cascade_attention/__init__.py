"""Attention to a shared prefix in one pass for all requests that share it. Losslessness: exact.

Papers: Juravsky et al. 2024, arXiv:2402.05099 (Hydragen); Ye et al. 2024, arXiv:2402.15220
(ChunkAttention); FlashInfer's cascade inference. Evidence: ``prefix_groups``,
``prefix_tokens_saved``.
"""

from techniques.cascade_attention.backend import CascadeAttention, CascadeConfig

__all__ = ["CascadeAttention", "CascadeConfig"]
