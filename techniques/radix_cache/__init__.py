"""Prefix cache as a compressed tree over token ids.

SGLang, Zheng et al. 2024, arXiv:2312.07104. Losslessness: exact.
Evidence: ``hit_tokens``, ``hit_blocks``.
"""

from techniques.prefix_cache.radix import RadixCache

__all__ = ["RadixCache"]
