"""A head of one layer goes on from the target's hidden states: EAGLE and EAGLE-3.

Li et al. 2024, arXiv:2401.15077; 2025, arXiv:2503.01840. Losslessness: exact. Evidence:
``drafted_tokens``, ``draft_passes``, ``accepted_tokens``.
"""

from techniques.eagle.drafter import Eagle, EagleConfig

__all__ = ["Eagle", "EagleConfig"]
