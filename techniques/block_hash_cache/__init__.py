"""Prefix cache by the block: a dictionary whose keys chain each block to the one before it.

Kwon et al. 2023, arXiv:2309.06180, and vLLM's design notes. Losslessness: exact.
Evidence: ``hit_tokens``, ``hit_blocks``.
"""

from techniques.prefix_cache.block_hash import BlockHashCache

__all__ = ["BlockHashCache"]
