"""Two prefix caches: by the block, and as a tree over token ids. Losslessness: exact.

``block_hash_cache`` (vLLM, Kwon et al. 2023, arXiv:2309.06180) and ``radix_cache`` (SGLang, Zheng
et al. 2024, arXiv:2312.07104). Evidence of both: ``hit_tokens``, ``hit_blocks``.
"""

from techniques.prefix_cache.block_hash import BlockHashCache
from techniques.prefix_cache.radix import RadixCache

__all__ = ["BlockHashCache", "RadixCache"]
