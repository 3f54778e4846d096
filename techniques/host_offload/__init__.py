"""A second tier for KV, in host memory. Losslessness: exact.

Papers: Kwon et al. 2023, arXiv:2309.06180 (section 4.5, swapping); Gao et al. 2024,
arXiv:2403.19708 (CachedAttention, KV of earlier turns in host memory). Evidence: ``blocks_out``,
``blocks_in``, ``hit_blocks``.
"""

from techniques.host_offload.tier import HostTier, HostTierConfig

__all__ = ["HostTier", "HostTierConfig"]
