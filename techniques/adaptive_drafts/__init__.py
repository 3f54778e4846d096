"""Draft length by measured costs and acceptance; no drafts where they do not pay.

SmartSpec, Liu et al. 2024, arXiv:2406.14066. Losslessness: exact. Evidence: ``decided_steps``.
"""

from techniques.adaptive_drafts.controller import Adaptive, AdaptiveConfig

__all__ = ["Adaptive", "AdaptiveConfig"]
